"""Input shards: which there are, and the raw samples in them."""

import codecs
import glob
import gzip
import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import braceexpand
import fsspec
from webdataset.tariterators import group_by_keys

from data_pipeline.bounded_json import ArrayReader, bounded_lines, parse_json
from data_pipeline.parquet_rows import Unreadable, read_rows
from megadual.errors import UserError
from megadual.tars import SAMPLE_BYTES, Refused, tar_members

KEY_CHARACTERS = 200
RANGE = 10_000_000  # numbers of a brace range
END = 1 << 16  # bytes at either end of a file, by which it is known again
THREADS = 16
SUFFIXES = (".tar", ".parquet", ".json", ".json.gz", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class InputShard:
    """One input file. `name` is its path below its pattern's fixed folder: the name of its folder in the set."""

    name: str
    url: str
    size: int  # bytes
    mark: str | None = None  # changes with its content; None where it could not be read

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
    except (ImportError, ValueError, OSError) as error:
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
    found: dict[str, str] = {}  # name -> URL
    for pattern in map(_spelled_as_matches, patterns):
        fixed = _fixed_folder(pattern)
        for part in _expanded(pattern):
            urls = _matches(part)
            if not urls:
                raise UserError(f"inputs: '{part}' matches no file")
            for url in urls:
                suffix = next((suffix for suffix in SUFFIXES if url.endswith(suffix)), None)
                if suffix is None:
                    fix = "; unpack it" if re.search(r"\.(tar\.\w+|tgz)$", url) else ""
                    raise UserError(f"inputs: '{url}' is none of {', '.join(SUFFIXES)}{fix}")
                below = PurePosixPath(url[len(fixed) :].removesuffix(suffix))
                name = "--".join(below.parts)
                known = found.setdefault(name, url)
                if known != url:
                    raise UserError(
                        f"inputs: '{known}' and '{url}' would both become '{name}'; name the folder that holds "
                        f"both in one pattern (FOLDER/*/*{suffix}), or make two sets"
                    )
    if not found:
        raise UserError("inputs: the list is empty; give at least one path or glob")
    with ThreadPoolExecutor(THREADS) as pool:  # inputs may be far away
        return list(pool.map(_input_shard, *zip(*sorted(found.items()), strict=True)))


def _expanded(pattern: str) -> Iterator[str]:
    """The paths that a pattern's braces spell."""
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
        if abs(int(last) - int(first)) >= RANGE:
            raise UserError(f"inputs: the range {{{first}..{last}}} of '{pattern}' has more than {RANGE} numbers")
    try:
        yield from braceexpand.braceexpand(pattern)
    except braceexpand.UnbalancedBracesError as error:
        raise UserError(f"inputs: the braces of '{pattern}' do not match") from error


def _input_shard(name: str, url: str) -> InputShard:
    """What a file is now; UserError where it can be no input, whenever it is read."""
    try:
        url.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"inputs: the name of {url!a} is not UTF-8; rename it") from error
    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        info = filesystem.info(path)
    except FileNotFoundError as error:
        raise UserError(f"inputs: '{url}' is not there, or a link that leads nowhere") from error
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"inputs: '{url}' cannot be read: {type(error).__name__}: {error}") from error
    if info["type"] == "other":  # reading a pipe would wait for ever
        raise UserError(f"inputs: '{url}' is no file")
    return InputShard(name, url, info["size"], _mark(filesystem, path, info))


def _mark(filesystem: fsspec.AbstractFileSystem, path: str, info: dict) -> str | None:
    """What changes with a file's content: its store's mark, else a hash of its ends; None where it can't be read."""
    if mark := info.get("ETag") or info.get("etag"):
        return f"etag {mark}"
    state, size = hashlib.blake2b(digest_size=16), info["size"]
    try:
        for begin in (0, max(0, size - END)):
            state.update(filesystem.cat_file(path, start=begin, end=min(begin + END, size)))
    except Exception:  # every file system has errors of its own; whoever reads the input will tell
        return None
    return f"ends {state.hexdigest()}"


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


def read_samples(shard: InputShard, limit: int = SAMPLE_BYTES) -> Iterator[tuple[RawSample, int]]:
    """The samples of an input shard in order, each with the bytes of the shard read so far.

    One of more than `limit` bytes says so in place of what it holds, and none takes much more memory than that. Where
    a file is damaged the rest of it cannot be read: a last sample says so. Errors of the file system are raised, since
    trying again may help.
    """
    if shard.size == 0:
        yield RawSample(f"{shard.name}/", damage="the file is empty: it has 0 bytes"), 0
        return
    suffix = next(suffix for suffix in SUFFIXES if shard.url.endswith(suffix))
    read = {".tar": _read_tar, ".parquet": _read_parquet, ".json": _read_json, ".json.gz": _read_json}
    with fsspec.open(shard.url, "rb") as stream:
        source = Source(stream)
        try:
            yield from read.get(suffix, _read_json_lines)(shard, source, limit)
        except Damage as damage:
            if source.error:
                raise source.error from None
            yield RawSample(f"{shard.name}/", damage=str(damage)), shard.size


def _read_tar(shard: InputShard, stream: Source, limit: int) -> Iterator[tuple[RawSample, int]]:
    """Webdataset samples; a last one also names each member that a sample holds twice."""
    twice, damage = [], []

    def keep_first_of_two(error: Exception) -> bool:
        twice.append(error)
        return True  # goes on

    def members() -> Iterator[dict]:
        try:
            yield from tar_members(stream, shard.url, limit)
        except tarfile.TarError as error:  # kept, so that what is complete of the last sample still comes
            damage.append(error)

    for sample in group_by_keys(members(), handler=keep_first_of_two):
        found = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
        refused = next((data.reason for data in found.values() if isinstance(data, Refused)), "")
        key = sample["__key__"].encode("utf-8", "replace").decode()  # names in a tar may be any bytes
        yield RawSample(f"{shard.name}/{key}", {} if refused else found, refused), stream.tell()
    for error in twice:
        yield RawSample(f"{shard.name}/", damage=f"damaged tar: {error.args[0]}"), shard.size
    for error in damage:
        raise Damage(f"damaged tar: {error}")


def _read_parquet(shard: InputShard, stream: Source, limit: int) -> Iterator[tuple[RawSample, int]]:
    """Rows; a `key` column, as img2dataset writes it, names them, else their number."""
    try:
        for (number, row), share in read_rows(stream, shard.size, limit):
            key = f"{shard.name}/{_row_key(row, number)}"
            sample = RawSample(key, row) if isinstance(row, dict) else RawSample(key, damage=row)
            yield sample, int(shard.size * share)
    except Unreadable as error:
        raise Damage(str(error)) from error


def _row_key(row: dict | str, number: int) -> str:
    key = row.get("key") if isinstance(row, dict) else None
    return str(key)[:KEY_CHARACTERS] if isinstance(key, (str, int)) and key != "" else f"{number:08d}"


def _read_json_lines(shard: InputShard, stream: Source, limit: int) -> Iterator[tuple[RawSample, int]]:
    """One JSON object a line, named by the number of its line."""
    lines = gzip.GzipFile(fileobj=stream) if shard.url.endswith(".gz") else stream
    number = -1
    try:
        for number, line in enumerate(bounded_lines(lines, limit)):
            key = f"{shard.name}/{number:08d}"
            if line is None:
                yield RawSample(key, damage=f"the line has more than read.max_bytes={limit} bytes"), stream.tell()
                continue
            try:
                members = parse_json(line)
            except ValueError as error:  # also where it is not UTF-8
                yield RawSample(key, damage=f"the line is not JSON: {error}"), stream.tell()
                continue
            yield _json_object(key, members, "the line"), stream.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damage(f"damaged gzip after {number + 1} lines: {error}") from error


def _json_object(key: str, value: Any, what: str) -> RawSample:
    return RawSample(key, value) if isinstance(value, dict) else RawSample(key, damage=f"{what} is not a JSON object")


def _read_json(shard: InputShard, stream: Source, limit: int) -> Iterator[tuple[RawSample, int]]:
    """The objects of one array, named by their numbers; lines, where the file is none."""
    plain = gzip.GzipFile(fileobj=stream) if shard.url.endswith(".gz") else stream
    number = 0
    try:
        is_array = plain.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        plain.seek(0)
        if not is_array:
            stream.seek(0)
            yield from _read_json_lines(shard, stream, limit)
            return
        for entry in ArrayReader(plain, limit):
            yield _json_object(f"{shard.name}/{number:08d}", entry, "the entry"), stream.tell()
            number += 1
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise Damage(f"damaged JSON after {number} entries: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damage(f"damaged gzip after {number} entries: {error}") from error
