"""Input shards: which there are, and the raw samples in them."""

import codecs
import glob
import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import braceexpand
import fsspec
import pyarrow
from pyarrow.parquet import ParquetFile
from webdataset.tariterators import group_by_keys

from megadual.errors import UserError
from megadual.tars import tar_members

ROWS = 64  # of a parquet file, decoded at a time
JSON_PIECE = 1 << 20  # characters of a JSON array, read at a time
JSON_ENTRY = 1 << 28  # characters of one of its entries, at most
SUFFIXES = (".tar", ".parquet", ".json", ".json.gz", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class InputShard:
    """One input file. `name` is its path below its pattern's fixed folder: the name of its folder in the set."""

    name: str
    url: str
    size: int  # bytes

    def __str__(self) -> str:
        return self.url


@dataclass
class RawSample:
    """One sample as stored: what it holds by name (member suffix, column, field), or why it could not be read."""

    key: str
    members: dict[str, Any] = field(default_factory=dict)
    damage: str = ""


def _spelled_as_matches(pattern: str) -> str:
    """A URL as its file system spells it, e.g. gs:// for gcs://; a path as it is."""
    if "://" not in pattern:
        return pattern
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        raise UserError(f"inputs: '{pattern}' cannot be opened: {error}") from error
    return filesystem.unstrip_protocol(path)


def _matches(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern, recursive=True))
    filesystem, path = fsspec.core.url_to_fs(pattern)
    try:
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"inputs: '{pattern}' cannot be listed: {type(error).__name__}: {error}") from error


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard or brace, down to a whole folder."""
    first = min((pattern.find(c) for c in "*?[{" if c in pattern), default=len(pattern))
    return pattern[: pattern.rfind("/", 0, first) + 1]


def list_inputs(patterns: list[str]) -> list[InputShard]:
    """The input shards that `patterns` (paths, globs, brace ranges, URLs) match, by name.

    A pattern that matches nothing and two files of one name raise UserError.
    """
    shards: dict[str, InputShard] = {}
    for pattern in map(_spelled_as_matches, patterns):
        fixed = _fixed_folder(pattern)
        try:
            parts = list(braceexpand.braceexpand(pattern))
        except braceexpand.UnbalancedBracesError as error:
            raise UserError(f"inputs: the braces of '{pattern}' do not match") from error
        for part in parts:
            urls = _matches(part)
            if not urls:
                raise UserError(f"inputs: '{part}' matches no file")
            for url in urls:
                suffix = next((suffix for suffix in SUFFIXES if url.endswith(suffix)), None)
                if suffix is None:
                    raise UserError(f"inputs: '{url}' is none of {', '.join(SUFFIXES)}")
                below = PurePosixPath(url[len(fixed) :].removesuffix(suffix))
                name = "--".join(below.parts)
                known = shards.get(name)
                if known is not None and known.url != url:
                    raise UserError(
                        f"inputs: '{known.url}' and '{url}' would both become '{name}'; name the folder that holds "
                        f"both in one pattern (FOLDER/*/*{suffix}), or make two sets"
                    )
                filesystem, path = fsspec.core.url_to_fs(url)
                shards[name] = InputShard(name, url, filesystem.size(path))
    if not shards:
        raise UserError("inputs: the list is empty; give at least one path or glob")
    return [shards[name] for name in sorted(shards)]


class Damage(Exception):
    """The rest of an input shard cannot be decoded; the message says where and why."""


class Source:
    """An input's stream that remembers a failed read: decoders turn it into errors that look like damage."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.error = stream, None

    def read(self, *size: int) -> bytes:
        try:
            return self.stream.read(*size)
        except Exception as error:  # every file system has errors of its own
            self.error = error
            raise

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def read_samples(shard: InputShard) -> Iterator[tuple[RawSample, int]]:
    """The samples of an input shard in order, each with the bytes of the shard read so far.

    Where a file is damaged the rest of it cannot be read: a last sample says so. Errors of the file system are
    raised, since trying again may help.
    """
    suffix = next(suffix for suffix in SUFFIXES if shard.url.endswith(suffix))
    read = {".tar": _read_tar, ".parquet": _read_parquet, ".json": _read_json, ".json.gz": _read_json}
    with fsspec.open(shard.url, "rb") as stream:
        source = Source(stream)
        try:
            yield from read.get(suffix, _read_json_lines)(shard, source)
        except Damage as damage:
            if source.error:
                raise source.error from None
            yield RawSample(f"{shard.name}/", damage=str(damage)), shard.size


def _read_tar(shard: InputShard, stream: Source) -> Iterator[tuple[RawSample, int]]:
    """Webdataset samples; a last one also names each member that a sample holds twice."""
    twice, damage = [], []

    def keep_first_of_two(error: Exception) -> bool:
        twice.append(error)
        return True  # goes on

    def members() -> Iterator[dict]:
        try:
            yield from tar_members(stream, shard.url)
        except tarfile.TarError as error:  # kept, so that what is complete of the last sample still comes
            damage.append(error)

    for sample in group_by_keys(members(), handler=keep_first_of_two):
        found = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
        key = sample["__key__"].encode("utf-8", "replace").decode()  # names in a tar may be any bytes
        yield RawSample(f"{shard.name}/{key}", found), stream.tell()
    for error in twice:
        yield RawSample(f"{shard.name}/", damage=f"damaged tar: {error.args[0]}"), shard.size
    for error in damage:
        raise Damage(f"damaged tar: {error}")


def _read_parquet(shard: InputShard, stream: Source) -> Iterator[tuple[RawSample, int]]:
    """Rows; a `key` column, as img2dataset writes it, names them, else their number."""
    done = 0
    try:
        # Buffered, so that a row group of any size is not read whole.
        file = ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        for batch in file.iter_batches(ROWS):
            for row in batch.to_pylist():
                key = row.get("key") or f"{done:08d}"
                done += 1
                yield RawSample(f"{shard.name}/{key}", row), shard.size * done // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise Damage(f"damaged parquet after {done} rows: {error}") from error


def _read_json_lines(shard: InputShard, stream: Source) -> Iterator[tuple[RawSample, int]]:
    """One JSON object a line, named by the number of its line."""
    lines = gzip.GzipFile(fileobj=stream) if shard.url.endswith(".gz") else stream
    number = -1
    try:
        for number, line in enumerate(lines):
            key = f"{shard.name}/{number:08d}"
            try:
                members = json.loads(line)
            except (ValueError, RecursionError) as error:  # also where it is not UTF-8
                yield RawSample(key, damage=f"the line is not JSON: {error}"), stream.tell()
                continue
            yield _json_object(key, members, "the line"), stream.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damage(f"damaged gzip after {number + 1} lines: {error}") from error


def _json_object(key: str, value: Any, what: str) -> RawSample:
    return RawSample(key, value) if isinstance(value, dict) else RawSample(key, damage=f"{what} is not a JSON object")


def _read_json(shard: InputShard, stream: Source) -> Iterator[tuple[RawSample, int]]:
    """The objects of one array, named by their numbers; lines, where the file is none."""
    plain = gzip.GzipFile(fileobj=stream) if shard.url.endswith(".gz") else stream
    number = 0
    try:
        is_array = plain.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        plain.seek(0)
        if not is_array:
            stream.seek(0)
            yield from _read_json_lines(shard, stream)
            return
        for entry in _ArrayReader(plain):
            yield _json_object(f"{shard.name}/{number:08d}", entry, "the entry"), stream.tell()
            number += 1
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise Damage(f"damaged JSON after {number} entries: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damage(f"damaged gzip after {number} entries: {error}") from error


class _ArrayReader:
    """The entries of a JSON array of any size, of which little more than one is held. ValueError where it is broken."""

    def __init__(self, stream: Any):
        self.stream, self.utf8 = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.decoder, self.text, self.at = json.JSONDecoder(), "", 0

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._mark() == "]":
            return
        while True:
            yield self._value()
            if self._take(",]") == "]":
                break
        if self._mark():
            raise ValueError("there is more behind the array")

    def _more(self) -> bool:
        # As much as there is, so that an entry of many pieces is not read again for each.
        piece = self.stream.read(max(JSON_PIECE, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self.utf8.decode(piece, final=not piece), 0
        return bool(piece)

    def _mark(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            rest = self.text[self.at : self.at + 1]
            if rest and not rest.isspace():
                return rest
            if rest:
                self.at += 1
            elif not self._more():
                return ""

    def _take(self, marks: str) -> str:
        mark = self._mark()
        if not mark or mark not in marks:
            found = f"'{mark}'" if mark else "the end"
            raise ValueError(f"{found} where {' or '.join(marks)} must stand")
        self.at += 1
        return mark

    def _value(self) -> Any:
        self._mark()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:  # or is there more of it?
                if len(self.text) - self.at > JSON_ENTRY or not self._more():
                    raise ValueError(f"{error.msg}") from error
