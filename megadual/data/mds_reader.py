"""Memory-mapped reading of a local shard set: any document by number, and of its codes those that are asked for.

A shard is mosaicml-streaming's MDS file: uint32 count, uint32[count + 1] offsets, a JSON header, then one
record per document: the byte sizes of its columns (uint32 each), then the columns.
"""

import itertools
import json
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megadual.errors import UserError
from megadual.streams import CAPTIONS, CODES, COLUMNS, LENGTHS, Document, Lengths, mds_columns

_AGAIN = "make the set again with data_pipeline/tokenize.py"


# An array's first byte (number of axes << 2 | log2 of the bytes of each, the fewest that do) -> its shape after that.
_SHAPES = {axes << 2 | log2: struct.Struct(f"<{axes}{kind}") for axes in (1, 2) for log2, kind in enumerate("BHIQ")}


def _decode_array(dtype: np.dtype, buffer: bytes, start: int, size: int) -> np.ndarray:
    layout = _SHAPES.get(buffer[start])
    if layout is None:
        raise ValueError(f"an array of one or two axes doesn't begin with the byte {buffer[start]}")
    shape = layout.unpack_from(buffer, start + 1)
    values = start + 1 + layout.size
    if (found := start + size - values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{found} bytes for an array of {' x '.join(map(str, shape))} values of {dtype}")
    return np.ndarray(shape, dtype, buffer, values)


def _decode_text(buffer: bytes, start: int, size: int) -> str:
    return buffer[start : start + size].decode()


def _decode_json(buffer: bytes, start: int, size: int) -> Any:
    return json.loads(_decode_text(buffer, start, size))


def _decoder(encoding: str) -> Callable[[bytes, int, int], Any]:
    if encoding.startswith("ndarray:"):
        return partial(_decode_array, np.dtype(encoding.partition(":")[2]))
    return {"str": _decode_text, "json": _decode_json}[encoding]


class _Records:
    """How the records of a set's documents are read."""

    def __init__(self, root: Path, columns: dict[str, str], streams: Iterable[str] | None, meta: bool):
        """`columns`: name -> encoding, in the records' order; `streams`: those to decode, None for all."""
        there = [name for name, encoding in columns.items() if encoding == CODES and name not in COLUMNS]
        if columns != mds_columns(there):
            raise UserError(f"shard set '{root}': columns {columns} are not a shard set's {mds_columns(there)}")
        self.streams = there if streams is None else list(streams)
        if lacking := [stream for stream in self.streams if stream not in there]:
            raise UserError(
                f"shard set '{root}' has no codes of the streams {lacking}, only of {there}; tokenize the data again, "
                "or choose from these with model.streams"
            )
        self.columns = columns
        self.sizes = struct.Struct(f"<{len(columns)}I")
        decoded = {*COLUMNS, *self.streams} - ({"meta"} if not meta else set())
        self.decoders = [(name, _decoder(encoding) if name in decoded else None) for name, encoding in columns.items()]

    def decode(self, record: bytes) -> Document:
        """The document that `record` holds; ValueError, IndexError or struct.error where it is damaged."""
        start, row = self.sizes.size, {}
        for (name, decode), size in zip(self.decoders, self.sizes.unpack_from(record), strict=True):
            if decode:
                row[name] = decode(record, start, size)
            start += size
        return Document.from_row(row)


def _map(path: Path) -> memoryview:
    """A file's bytes, mapped into memory. No descriptor stays open, as Python's own maps keep one: sets are large."""
    try:
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"shard '{path}' can't be mapped into memory ({str(error).splitlines()[0]}); a process may map as many "
            "files as `sysctl vm.max_map_count` says: raise it, or make the set again with larger shards"
        ) from error
    return mapped.numpy().data


def _columns(info: dict) -> dict[str, str]:
    return dict(zip(info["column_names"], info["column_encodings"], strict=True))


class _Shard:
    """One MDS file."""

    def __init__(self, path: Path, info: dict, records: _Records):
        self.path, self.records = path, records
        if _columns(info) != records.columns or any(info["column_sizes"]):
            raise UserError(f"shard '{path}': columns {_columns(info)} are not those of its set, {records.columns}")
        if info["compression"]:
            raise UserError(f"shard '{path}' is compressed ({info['compression']}); shard sets are read uncompressed")
        if not path.is_file():
            raise UserError(f"shard '{path}' is listed in the set's index.json but does not exist")
        if path.stat().st_size != info["raw_data"]["bytes"]:
            raise UserError(
                f"shard '{path}' has {path.stat().st_size:,} bytes, index.json says {info['raw_data']['bytes']:,}: "
                f"it is damaged or cut off; {_AGAIN}"
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
        try:
            return self.records.decode(record)
        except (ValueError, IndexError, struct.error) as error:
            raise UserError(f"shard '{self.path}' is damaged at its document {i}: {error}") from error


def _load_numbers(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not file.is_file():
        raise UserError(f"'{file}' does not exist: {_AGAIN}")
    try:
        numbers = np.load(file)
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({error}): {_AGAIN}") from error
    if numbers.shape != shape:
        found, expected = (" x ".join(map(str, each)) for each in (numbers.shape, shape))
        raise UserError(f"'{file}' holds {found} numbers where its documents need {expected}: {_AGAIN}")
    return numbers


class ShardSet:
    """A shard set made by data_pipeline/tokenize.py: `set[i]` is document i, in the order of index.json.

    Its documents have the codes of `streams` (None: of all that the set has, in the order of its columns), and their
    `meta` unless that is not wanted, since training has no use for it. Raises
    UserError where the set is missing, unfinished, empty, lacks one of them, or a file does not fit the index.
    """

    def __init__(self, root: str | Path, streams: Iterable[str] | None = None, meta: bool = True):
        self.root = Path(root)
        self.manifest = self._read_json("manifest.json")
        entries = self._read_json("index.json")["shards"]
        if not sum(entry["samples"] for entry in entries):
            raise UserError(f"shard set '{root}' holds no documents")
        records = _Records(self.root, _columns(entries[0]), streams, meta)
        self.streams = records.streams
        self.shards = [_Shard(self.root / entry["raw_data"]["basename"], entry, records) for entry in entries]
        self._ends = np.cumsum([len(shard) for shard in self.shards]).tolist()
        if self._ends[-1] != self.manifest["documents"]:
            raise UserError(
                f"shard set '{root}': index.json lists {self._ends[-1]} documents, "
                f"manifest.json {self.manifest['documents']}; finish it with data_pipeline/tokenize.py"
            )
        self.lengths, self.captions = self._read_lengths()

    def _read_lengths(self) -> tuple[Lengths[np.ndarray], np.ndarray]:
        """As the pipeline noted them beside each folder's documents: those of the documents, int32 arrays, and the text
        ids of every caption of the pairs that have several, in order.
        """
        parts, captions = [], [np.zeros(0, dtype=np.int32)]
        for folder, shards in itertools.groupby(self.shards, lambda shard: shard.path.parent):
            documents = sum(map(len, shards))
            parts.append(_load_numbers(folder / LENGTHS, (documents, len(Lengths._fields))))
            several = Lengths(*parts[-1].T).captions
            if count := int(several[several > 1].sum()):
                captions.append(_load_numbers(folder / CAPTIONS, (count,)))
        return Lengths(*np.concatenate(parts).T), np.concatenate(captions)

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
