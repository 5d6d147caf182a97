"""Memory-mapped reading of a shard set: any document by number, and of its codes those that are asked for.

A shard is mosaicml-streaming's MDS file: uint32 count, uint32[count + 1] offsets, a JSON header, then one
record per document: the byte sizes of its columns (uint32 each), then the columns.
"""

import itertools
import json
import math
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megadual.data.cache import THREADS, Cache
from megadual.data.contents import AGAIN, Contents, ShardFile, load_captions, load_lengths
from megadual.data.places import Place, place
from megadual.errors import UserError, first_line
from megadual.streams import CAPTIONS, CODES, COLUMNS, LENGTHS, Document, Lengths, mds_columns

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

    def __init__(self, root: str, columns: dict[str, str], streams: Iterable[str] | None, meta: bool):
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
        if start != len(record):
            raise ValueError(f"its columns have {start} bytes, it has {len(record)}")
        return Document.from_row(row)


def _map(path: Path) -> memoryview:
    """A file's bytes, mapped into memory. No descriptor stays open, as Python's own maps keep one: sets are large."""
    try:
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"shard '{path}' can't be mapped into memory ({first_line(error)}); a process may map as many "
            "files as `sysctl vm.max_map_count` says: raise it, or make the set again with larger shards"
        ) from error
    return mapped.numpy().data


class _Shard:
    """One MDS file, mapped when its place has it: at once, or once a document of it is read."""

    def __init__(self, place: Place, file: ShardFile, sha256: str | None, records: _Records):
        self.place, self.file, self.sha256, self.records = place, file, sha256, records
        self.path = f"{place.root}/{file.name}"
        self.mapped: tuple[memoryview, np.ndarray] | None = None  # its bytes, and where its documents are
        self.coming = False
        self._mapping = threading.Lock()

    def __getitem__(self, i: int) -> Document:
        content, offsets = self.mapped or self.map()
        begin, end = offsets[i : i + 2].tolist()
        record = bytes(content[begin:end])
        try:
            return self.records.decode(record)
        except (ValueError, IndexError, struct.error) as error:
            raise UserError(f"shard '{self.path}' is damaged at its document {i}: {error}") from error

    def map(self) -> tuple[memoryview, np.ndarray]:
        """Its bytes and its documents' offsets; UserError where they are not as the set says."""
        with self._mapping:
            if self.mapped is None:
                with self.place.held(self.file.name, self.sha256, self.file.bytes) as path:
                    self.mapped = self._map(path)
        return self.mapped

    def _map(self, path: Path) -> tuple[memoryview, np.ndarray]:
        if not path.is_file():
            raise UserError(f"shard '{self.path}' is listed in the set's index.json but does not exist")
        if (size := path.stat().st_size) != self.file.bytes:
            raise UserError(
                f"shard '{self.path}' has {size:,} bytes, index.json says {self.file.bytes:,}: "
                f"it is damaged or cut off; {AGAIN}"
            )
        content = _map(path)
        count = int.from_bytes(content[:4], "little")
        if count != self.file.documents:
            raise UserError(
                f"shard '{self.path}' says it holds {count} documents, index.json says {self.file.documents}"
            )
        offsets = np.frombuffer(content, "<u4", count + 1, 4)
        if offsets[-1] != len(content) or (np.diff(offsets.astype(np.int64)) <= 0).any():
            raise UserError(f"shard '{self.path}' is damaged: its document offsets do not fit its {size:,} bytes")
        return content, offsets


class ShardSet:
    """A shard set made by data_pipeline/tokenize.py: `set[i]` is document i, in the order of index.json.

    Its documents have the codes of `streams` (None: of all that the set has, in the order of its columns), and their
    `meta` unless that is not wanted, since training has no use for it. A set at a URL is read through `cache`, shard by
    shard as documents are read; `expect` has them fetched before. Raises
    UserError where the set is missing, unfinished, empty, lacks one of them, or a file does not fit the index.
    """

    def __init__(
        self, root: str | Path, streams: Iterable[str] | None = None, meta: bool = True, cache: Cache | None = None
    ):
        self.place = place(root, cache)
        self.root, self.here = self.place.root, self.place.here
        manifest, index = (self.read(name) for name in ("manifest.json", "index.json"))
        contents = Contents.parse(index, f"{self.root}/index.json", manifest, f"{self.root}/manifest.json")
        self.manifest, self.hashes = contents.manifest, contents.hashes
        records = _Records(self.root, contents.columns, streams, meta)
        self.streams = records.streams
        self.shards = [_Shard(self.place, file, self.hashes.get(file.name), records) for file in contents.shards]
        for shard in self.shards if self.here else []:
            shard.map()
        self._ends = np.cumsum([file.documents for file in contents.shards]).tolist()
        self.lengths, self.captions = self._read_lengths(contents.shards)

    def _read_lengths(self, files: list[ShardFile]) -> tuple[Lengths[np.ndarray], np.ndarray]:
        """As the pipeline noted them beside each folder's documents: those of the documents, int32 arrays, and the text
        ids of every caption of the pairs that have several, in order.
        """
        folders = [(folder, list(shards)) for folder, shards in itertools.groupby(files, lambda file: file.folder)]
        with ThreadPoolExecutor(1 if self.here else THREADS) as pool:
            noted = list(pool.map(lambda folder: self._noted(*folder), folders))
        lengths, captions = zip(*noted, strict=True)
        return Lengths(*np.concatenate(lengths).T), np.concatenate(captions)

    def _noted(self, folder: str, files: list[ShardFile]) -> tuple[np.ndarray, np.ndarray]:
        documents, size = (sum(getattr(file, each) for file in files) for each in ("documents", "bytes"))

        def held(name: str, numbers: int):
            file = f"{folder}/{name}".lstrip("/")
            return self.place.held(file, self.hashes.get(file), 4 * numbers + 128), f"{self.root}/{file}"

        opened, file = held(LENGTHS, documents * len(Lengths._fields))
        with opened as path:
            lengths = load_lengths(path, file, documents, size)
        several = Lengths(*lengths.T).captions
        if not (count := int(several[several > 1].sum())):
            return lengths, np.zeros(0, dtype=np.int32)
        opened, file = held(CAPTIONS, count)
        with opened as path:
            return lengths, load_captions(path, file, lengths)

    def read(self, name: str) -> bytes:
        """A file of the set's root; UserError where it is not there."""
        try:
            return self.place.read(name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"no finished shard set in '{self.root}': it has no {name}; make one with data_pipeline/tokenize.py"
            ) from error
        except OSError as error:
            raise UserError(f"'{self.root}/{name}' can't be read: {error.strerror}") from error

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Document:
        shard = bisect_right(self._ends, i)
        return self.shards[shard][i - (self._ends[shard - 1] if shard else 0)]

    def documents_of(self, shards: Iterable[int]) -> list[int]:
        """The documents that these shards hold."""
        starts = [0, *self._ends]
        return [i for shard in shards for i in range(starts[shard], starts[shard + 1])]

    def where(self, i: int) -> str:
        """The shard of document i and its number there, for people."""
        shard = bisect_right(self._ends, i)
        return f"shard '{self.shards[shard].path}', its document {i - (self._ends[shard - 1] if shard else 0)}"

    def files_of(self, documents: Iterable[int]) -> list[ShardFile]:
        """What these documents are in, each once."""
        return [shard.file for shard in self._shards_of(documents)]

    def _shards_of(self, documents: Iterable[int]) -> Iterable[_Shard]:
        """In the order in which the documents need them."""
        return dict.fromkeys(self.shards[bisect_right(self._ends, i)] for i in documents)

    def expect(self, documents: Iterable[int]) -> None:
        """These documents are read next: of a set in a store, fetch what they are in, in the background and in this
        order, as far as the cache has room.
        """
        room = self.place.room_ahead
        for shard in self._shards_of(documents):
            room -= shard.file.bytes
            if room < 0:
                return
            if not shard.coming:
                shard.coming = True
                self.place.ahead(shard.map)

    def let_go(self) -> None:
        """Of shards that were evicted: their disk's space is only free once nobody has them mapped."""
        evicted = self.place.evicted([shard.sha256 for shard in self.shards if shard.mapped])
        for shard in self.shards if evicted else []:
            if shard.sha256 in evicted:
                shard.mapped, shard.coming = None, False

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
