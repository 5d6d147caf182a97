"""What a shard set's index.json and manifest.json say of it, and what is noted beside its documents.

All is checked before it is believed: such files are edited, cut off, and of another set.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from megadual.errors import UserError
from megadual.streams import LENGTHS, Lengths

AGAIN = "make the set again with data_pipeline/tokenize.py"

_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = 1 << 28  # of a document's text ids, positions ...: their sums stay within int32


class Fields:
    """An object of a JSON file, whose values are taken with their kinds checked: UserError names file, place, value."""

    def __init__(self, value: Any, file: str, at: str = ""):
        self.file, self.at = file, at
        self.values: dict[str, Any] = self._of_kind(value, dict, at or "all of it")

    @classmethod
    def parse(cls, data: bytes, file: str) -> "Fields":
        try:
            return cls(json.loads(data), file)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"'{file}' is not valid JSON ({error}): {AGAIN}") from error

    def take(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise UserError(f"'{self.file}' has no {self._name(key)}: {AGAIN}")
        return self._of_kind(self.values[key], kind, self._name(key))

    def text(self, key: str) -> str:
        return self.take(key, str)

    def count(self, key: str) -> int:
        if not 0 <= (value := self.take(key, int)) < 1 << 53:
            raise self.wrong(key, "not a count")
        return value

    def inside(self, key: str) -> "Fields":
        return Fields(self.take(key, dict), self.file, self._name(key))

    def each(self, key: str) -> "Iterator[Fields]":
        for i, value in enumerate(self.take(key, list)):
            yield Fields(value, self.file, f"{self._name(key)}[{i}]")

    def path(self, key: str) -> str:
        """The name of a file or folder below the one that this file is in."""
        name = self.text(key)
        if (
            "\0" in name
            or PurePosixPath(name).is_absolute()
            or ".." in name.split("/")
            or str(PurePosixPath(name)) != name
        ):
            raise self.wrong(key, "not the name of a file below the set's folder")
        return name

    def sha256(self, key: str) -> str:
        if not _SHA256.fullmatch(value := self.text(key)):
            raise self.wrong(key, "not a SHA-256 in hexadecimal digits")
        return value

    def wrong(self, key: str, problem: str) -> UserError:
        return UserError(f"'{self.file}': {self._name(key)} is {self.values[key]!r:.80}, {problem}: {AGAIN}")

    def _name(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def _of_kind(self, value: Any, kind: type, name: str) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"'{self.file}': {name} is {value!r:.80}, not {_KINDS[kind]}: {AGAIN}")
        return value


@dataclass(frozen=True)
class ShardFile:
    """One MDS file of a set."""

    name: str  # below the set's root
    documents: int
    bytes: int

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Contents:
    """What a set consists of."""

    manifest: dict
    columns: dict[str, str]  # name -> encoding, in the records' order
    shards: list[ShardFile]
    hashes: dict[str, str]  # file below the root -> its SHA-256, as far as the set says it

    @classmethod
    def parse(cls, index: bytes, index_file: str, manifest: bytes, manifest_file: str) -> "Contents":
        """UserError where one of the files is not what the pipeline writes, or one contradicts the other."""
        columns, shards, hashes = _parse_index(Fields.parse(index, index_file))
        said = Fields.parse(manifest, manifest_file)
        for part in ("dualtoken", "text_tokenizer"):
            said.inside(part).text("fingerprint"), said.inside(part).text("path")
        documents = sum(shard.documents for shard in shards)
        if documents != said.count("documents"):
            raise UserError(
                f"'{index_file}' lists {documents} documents, '{manifest_file}' {said.count('documents')}; finish the "
                "set with data_pipeline/tokenize.py"
            )
        if "shards" in said.values:
            listed = listed_files(said)
            for name in {shard.name for shard in shards} ^ {name for name in listed if name.endswith(".mds")}:
                where, lacking = (manifest_file, index_file) if name in listed else (index_file, manifest_file)
                raise UserError(f"'{name}' is listed in '{where}', but not in '{lacking}': {AGAIN}")
            for name, sha256 in hashes.items():
                if listed[name] != sha256:
                    raise UserError(f"'{index_file}' and '{manifest_file}' say other SHA-256 of '{name}': {AGAIN}")
            hashes |= listed
        return cls(said.values, columns, shards, hashes)


def listed_files(manifest: Fields) -> dict[str, str]:
    """The files of all folders that a manifest lists: name below the root -> SHA-256."""
    files: dict[str, str] = {}
    folders = set()
    for shard in manifest.each("shards"):
        if (folder := shard.path("folder")) in folders:
            raise shard.wrong("folder", "as another one is")
        folders.add(folder)
        for file in shard.each("files"):
            if (name := f"{folder}/{file.path('file')}") in files:
                raise file.wrong("file", "as another one is")
            files[name] = file.sha256("sha256")
    return files


def _parse_index(index: Fields) -> tuple[dict[str, str], list[ShardFile], dict[str, str]]:
    if index.count("version") != 2:
        raise index.wrong("version", "this is for 2")
    columns: dict[str, str] = {}
    files: dict[str, ShardFile] = {}
    hashes = {}
    for shard in index.each("shards"):
        raw = shard.inside("raw_data")
        if (name := raw.path("basename")) in files:
            raise raw.wrong("basename", "as another one is")
        if shard.take("column_names", list) and not all(isinstance(each, str) for each in shard.values["column_names"]):
            raise shard.wrong("column_names", "not texts")
        names, encodings = shard.values["column_names"], shard.take("column_encodings", list)
        if len(names) != len(encodings) or len(set(names)) < len(names):
            raise shard.wrong("column_names", f"with the encodings {encodings}")
        found = dict(zip(names, encodings, strict=True))
        columns = columns or found
        if found != columns or any(shard.take("column_sizes", list)):
            raise UserError(f"shard '{name}' in '{index.file}': columns {found} are not those of its set, {columns}")
        if compression := shard.values.get("compression"):
            raise UserError(f"shard '{name}' in '{index.file}' is compressed ({compression}); shard sets are not")
        files[name] = ShardFile(name, shard.count("samples"), raw.count("bytes"))
        if 4 * (files[name].documents + 2) > files[name].bytes:
            raise shard.wrong("samples", f"too many for {files[name].bytes:,} bytes")
        if raw.values.get("hashes"):
            hashes[name] = raw.inside("hashes").sha256("sha256")
    if not sum(file.documents for file in files.values()):
        raise UserError(f"'{index.file}': the shard set holds no documents")
    return columns, list(files.values()), hashes


def load_lengths(path: Path, file: str, documents: int, size: int) -> np.ndarray:
    """(documents, 7) int32, each document's `Lengths`, of a folder whose shards have `size` bytes.

    UserError where the file at `path`, for people `file`, is not that.
    """
    noted = _load_numbers(path, file, (documents, len(Lengths._fields)))
    of: Lengths[np.ndarray] = Lengths(*noted.T)
    for holds, problem in (
        (of.images <= of.text_tokens, "more images than text ids"),
        (of.images <= of.positions, "more images than positions"),
        ((of.captions == 0) | (of.images == 1), "captions of other than one image"),
        (of.droppable_text <= of.text_tokens, "more droppable text ids than there are"),
        (of.droppable_image <= of.positions + 2 * of.images, "more droppable positions than there are"),
    ):
        if not holds.all():
            raise UserError(f"'{file}' is damaged: document {holds.argmin()} has {problem}; {AGAIN}")
    if 4 * of.text_tokens.sum() > size or 2 * of.positions.sum() > size:
        raise UserError(f"'{file}' is damaged: it tells of more than the {size:,} bytes of its shards hold; {AGAIN}")
    return noted


def load_captions(path: Path, file: str, lengths: np.ndarray) -> np.ndarray:
    """int32, the text ids of every caption of the pairs that have several; `lengths` are of the same folder.

    UserError likewise.
    """
    of: Lengths[np.ndarray] = Lengths(*lengths.T)
    several = np.flatnonzero(of.captions > 1)
    noted = _load_numbers(path, file, (int(of.captions[several].sum()),))
    longest = np.maximum.reduceat(noted, np.cumsum(of.captions[several]) - of.captions[several])
    if (wrong := longest + 1 != of.text_tokens[several]).any():
        raise UserError(
            f"'{file}' is damaged: the longest caption of document {several[wrong][0]} has {longest[wrong][0]} text "
            f"ids, {LENGTHS} says {of.text_tokens[several][wrong][0] - 1}; {AGAIN}"
        )
    return noted


def _load_numbers(path: Path, file: str, shape: tuple[int, ...]) -> np.ndarray:
    """An .npy file's int32 of `shape`, none below 0. Its header is compared before memory is taken for its numbers."""
    try:
        with open(path, "rb") as opened:
            found, dtype = _read_header(opened, file)
            if dtype != np.dtype("<i4"):
                raise UserError(f"'{file}' holds numbers of type {dtype}, not int32: {AGAIN}")
            if found != shape:
                words = [" x ".join(map(str, each)) for each in (found, shape)]
                raise UserError(f"'{file}' holds {words[0]} numbers where its documents need {words[1]}: {AGAIN}")
            size = path.stat().st_size - opened.tell()
            if size != 4 * np.prod(shape, dtype=np.int64):
                raise UserError(
                    f"'{file}' is damaged: {size:,} bytes are not {' x '.join(map(str, shape))} int32; {AGAIN}"
                )
            numbers = np.fromfile(opened, dtype).reshape(shape)
    except FileNotFoundError as error:
        raise UserError(f"'{file}' does not exist: {AGAIN}") from error
    except OSError as error:
        raise UserError(f"'{file}' can't be read: {error.strerror}") from error
    if numbers.size and not 0 <= (least := numbers.min()) <= (most := numbers.max()) < _MOST:
        raise UserError(f"'{file}' is damaged: it holds the number {least if least < 0 else most}; {AGAIN}")
    return numbers


def _read_header(opened: BinaryIO, file: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an .npy file, which stands behind its header then. Nothing in it is run or unpickled."""
    try:
        if (version := np.lib.format.read_magic(opened)) != (1, 0):
            raise ValueError(f"version {version}")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(opened)
        if columns_first and len(shape) > 1:
            raise ValueError("columns first")
    except Exception as error:  # numpy's parser has many
        if isinstance(error, OSError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{file}' is damaged, it is no plain .npy file ({reason}): {AGAIN}") from error
    return shape, dtype
