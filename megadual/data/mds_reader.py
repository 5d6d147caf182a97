"""Memory-mapped reading of a local shard set: any document by number, lengths without decoding the codes.

A shard is mosaicml-streaming's MDS file: uint32 count, uint32[count + 1] offsets, a JSON header, then one
record per document: the byte sizes of its columns (uint32 each), then the columns.
"""

import itertools
import json
import struct
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megadual.errors import UserError
from megadual.streams import LENGTHS, MDS_COLUMNS, Document

# The type of an array column's values, None where it holds text.
_DTYPES = {
    name: np.dtype(encoding.partition(":")[2]) if encoding.startswith("ndarray:") else None
    for name, encoding in MDS_COLUMNS.items()
}
_SIZES = struct.Struct(f"<{len(MDS_COLUMNS)}I")


class Lengths(NamedTuple):
    """What `streams.sequence_length` needs, for every document of a set: int32 arrays of one length."""

    text_tokens: np.ndarray
    images: np.ndarray
    positions: np.ndarray


# An array's first byte (number of axes << 2 | log2 of the bytes of each, the fewest that do) -> its shape after that.
_SHAPES = {axes << 2 | log2: struct.Struct(f"<{axes}{kind}") for axes in (1, 2) for log2, kind in enumerate("BHIQ")}


def _decode_array(buffer: bytes, start: int, size: int, dtype: np.dtype) -> np.ndarray:
    shape = _SHAPES.get(buffer[start])
    if shape is None:
        raise ValueError(f"an array of one or two axes doesn't begin with the byte {buffer[start]}")
    values = start + 1 + shape.size
    count, rest = divmod(start + size - values, dtype.itemsize)
    if rest:
        raise ValueError(f"{rest} bytes more than whole values of {dtype}")
    return np.frombuffer(buffer, dtype, count, values).reshape(shape.unpack_from(buffer, start + 1))


def _map(path: Path) -> memoryview:
    """A file's bytes, mapped into memory. No descriptor stays open, as Python's own maps keep one: sets are large."""
    try:
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"shard '{path}' can't be mapped into memory ({str(error).splitlines()[0]}); a process may map as many "
            "files as `sysctl vm.max_map_count` says: raise it, or make the set again with larger shards"
        ) from error
    return memoryview(mapped.numpy())


class _Shard:
    """One MDS file."""

    def __init__(self, path: Path, info: dict):
        self.path = path
        self.columns = dict(zip(info["column_names"], info["column_encodings"], strict=True))
        if self.columns != MDS_COLUMNS or any(info["column_sizes"]):
            raise UserError(f"shard '{path}': columns {self.columns} are not a shard set's {MDS_COLUMNS}")
        if info["compression"]:
            raise UserError(f"shard '{path}' is compressed ({info['compression']}); shard sets are read uncompressed")
        if not path.is_file():
            raise UserError(f"shard '{path}' is listed in the set's index.json but does not exist")
        if path.stat().st_size != info["raw_data"]["bytes"]:
            raise UserError(
                f"shard '{path}' has {path.stat().st_size:,} bytes, index.json says {info['raw_data']['bytes']:,}: "
                "it is damaged or cut off; make it again with data_pipeline/tokenize.py"
            )
        self.bytes = _map(path)
        count = int.from_bytes(self.bytes[:4], "little")
        if count != info["samples"]:
            raise UserError(f"shard '{path}' says it holds {count} documents, index.json says {info['samples']}")
        self.offsets = np.frombuffer(self.bytes, "<u4", count + 1, 4)
        if self.offsets[-1] != len(self.bytes) or (np.diff(self.offsets.astype(np.int64)) <= 0).any():
            raise UserError(f"shard '{path}' is damaged: its document offsets do not fit its {len(self.bytes):,} bytes")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Document:
        record = bytes(self.bytes[self.offsets[i] : self.offsets[i + 1]])
        start, values = _SIZES.size, {}
        try:
            for name, size in zip(self.columns, _SIZES.unpack_from(record), strict=True):
                if dtype := _DTYPES[name]:
                    values[name] = _decode_array(record, start, size, dtype)
                else:
                    text = record[start : start + size].decode()
                    values[name] = json.loads(text) if self.columns[name] == "json" else text
                start += size
        except (ValueError, IndexError, struct.error) as error:
            raise UserError(f"shard '{self.path}' is damaged at its document {i}: {error}") from error
        return Document.from_row(values)

    def lengths(self) -> Lengths:
        buffer = np.frombuffer(self.bytes, np.uint8)
        starts = self.offsets[:-1].astype(np.int64)
        header = 4 * len(self.columns)
        sizes = buffer[starts[:, None] + np.arange(header)].view("<u4").astype(np.int64)
        begins = starts[:, None] + header + np.cumsum(sizes, axis=1) - sizes
        names = list(self.columns)

        def values(column: str, itemsize: int) -> np.ndarray:
            j = names.index(column)
            kind = buffer[begins[:, j]].astype(np.int64)
            return (sizes[:, j] - 1 - (kind >> 2 << (kind & 3))) // itemsize

        begin = begins[:, names.index("semantic")]
        width = 1 << (buffer[begin].astype(np.int64) & 3)  # bytes of the shape's first entry: the positions
        positions = sum(
            np.where(byte < width, buffer[begin + 1 + byte].astype(np.int64) << 8 * byte, 0) for byte in range(4)
        )
        begin = begins[:, names.index("grids")]
        kind = buffer[begin].astype(np.int64)
        first_rows = begin + 1 + (kind >> 2 << (kind & 3))
        has_images = (buffer[first_rows] | buffer[first_rows + 1]) > 0  # a 0 x 0 grid stands for none
        images = np.where(has_images, values("grids", 2) // 2, 0)
        return Lengths(*(column.astype(np.int32) for column in (values("text_ids", 4), images, positions * has_images)))


class ShardSet:
    """A shard set made by data_pipeline/tokenize.py: `set[i]` is document i, in the order of index.json.

    Raises UserError where the set is missing, unfinished, empty, or a file does not fit the index.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.manifest = self._read_json("manifest.json")
        entries = self._read_json("index.json")["shards"]
        self.shards = [_Shard(self.root / entry["raw_data"]["basename"], entry) for entry in entries]
        self._ends = np.cumsum([len(shard) for shard in self.shards]).tolist()
        if not self.shards or self._ends[-1] == 0:
            raise UserError(f"shard set '{root}' holds no documents")
        if self._ends[-1] != self.manifest["documents"]:
            raise UserError(
                f"shard set '{root}': index.json lists {self._ends[-1]} documents, "
                f"manifest.json {self.manifest['documents']}; finish it with data_pipeline/tokenize.py"
            )
        self.lengths = self._read_lengths()

    def _read_lengths(self) -> Lengths:
        """As the pipeline noted them; where it did not, from the documents, which reads most of a set's pages."""
        parts = []
        for folder, group in itertools.groupby(self.shards, lambda shard: shard.path.parent):
            shards, noted = list(group), None
            if (folder / LENGTHS).is_file():
                try:
                    noted = np.load(folder / LENGTHS)
                except ValueError as error:
                    raise UserError(f"'{folder / LENGTHS}' is damaged ({error}); remove it to do without") from error
            if noted is not None and noted.shape == (sum(map(len, shards)), len(Lengths._fields)):
                parts.append(noted.T)
            else:
                parts += [np.stack(shard.lengths()) for shard in shards]
        return Lengths(*np.concatenate(parts, axis=1))

    def _read_json(self, name: str) -> dict:
        path = self.root / name
        if not path.is_file():
            raise UserError(
                f"no finished shard set in '{self.root}': it has no {name}; make one with data_pipeline/tokenize.py"
            )
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"'{path}' is not valid JSON: {error}") from error

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Document:
        shard = bisect_right(self._ends, i)
        return self.shards[shard][i - (self._ends[shard - 1] if shard else 0)]

    def check(self, dualtoken: str, dualtoken_path: str, text_tokenizer: str, text_tokenizer_path: str) -> None:
        """Refuse the set if it was not made with this DualToken and text tokenizer (their fingerprints)."""
        for name, fingerprint, path in (
            ("dualtoken", dualtoken, dualtoken_path),
            ("text_tokenizer", text_tokenizer, text_tokenizer_path),
        ):
            made = self.manifest[name]
            if made["fingerprint"] != fingerprint:
                raise UserError(
                    f"shard set '{self.root}' was made with the {name} of '{made['path']}' "
                    f"({made['fingerprint'][:12]}), the model uses the one of '{path}' ({fingerprint[:12]}); "
                    f"tokenize the data again or set model.{name}"
                )
