"""Where the images are that samples only name: a folder, a URL, or a tar."""

import errno
import hashlib
import re
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.config import ReadConfig
from data_pipeline.documents import Missing, Unusable
from megadual.errors import UserError
from megadual.tars import SAMPLE_BYTES

SUFFIXES = ("", ".jpg", ".png", ".webp", ".jpeg")  # that a file named by its URL's hash may have
NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
SHARD = "{shard}"  # in `read.image_root`, the name of the input shard


class ImageRoot:
    """Finds images by name below `root`; nothing outside of it is ever read.

    A name is a path below the root, with or without the root itself in front. An address (http://...) that isn't below
    it names the file `sha256(address).hexdigest()`, with or without one of SUFFIXES.
    """

    def __init__(self, root: str, limit: int = SAMPLE_BYTES):
        """`limit`: bytes of an image, at most."""
        self.root, self.limit = root.rstrip("/"), limit
        try:
            self.files, self.path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise UserError(f"read.image_root: '{root}' cannot be opened: {error}") from error
        self.local = isinstance(self.files, LocalFileSystem)
        self.members = _members(self.files, self.path) if root.endswith(".tar") else None

    def reader(self, name: str) -> Callable[[], bytes]:
        """What reads the image; Unusable where the name leads elsewhere; Missing, once it reads, where none is."""
        paths = self._paths(name)

        def read() -> bytes:
            for path in paths:
                try:
                    return self._read(path)
                except OSError as error:
                    if not isinstance(error, FileNotFoundError) and error.errno not in NO_FILE:
                        raise
                except ValueError as error:  # of a name that no address may have
                    raise Unusable(f"the image '{name}' can't be asked for: {error}") from error
            raise Missing(f"no image '{name}' in read.image_root={self.root}")

        return read

    def _paths(self, name: str) -> list[str]:
        try:
            name.encode()
        except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair
            raise Unusable(f"the image's name {name!a} is not UTF-8") from error
        below = name.removeprefix(self.root + "/").removeprefix(self.path + "/")
        if re.match(r"[a-zA-Z][\w+.-]*://", below):
            digest = hashlib.sha256(below.encode()).hexdigest()
            return [digest + suffix for suffix in SUFFIXES]
        path = PurePosixPath(below)
        if path.is_absolute() or ".." in path.parts or "\0" in below or not path.parts:
            raise Unusable(f"the image '{name}' is not below read.image_root={self.root}")
        return [str(path)]

    def _read(self, path: str) -> bytes:
        if self.members is None:
            # Not of a store, some of which know no part of an object that has no bytes.
            part = {"start": 0, "end": self.limit + 1} if self.local else {}
            data = self.files.cat_file(f"{self.path}/{path}", **part)
            self._check_size(path, len(data))
            return data
        if path not in self.members:
            raise FileNotFoundError(path)
        begin, size = self.members[path]
        self._check_size(path, size)
        return self.files.cat_file(self.path, start=begin, end=begin + size) if size else b""

    def _check_size(self, path: str, size: int) -> None:
        if size > self.limit:
            raise Unusable(f"the image '{path}' has more than read.max_bytes={self.limit} bytes")


def _members(files: fsspec.AbstractFileSystem, path: str) -> dict[str, tuple[int, int]]:
    """Place and size of every file in a tar."""
    members = {}
    with files.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.isreg() and not member.issparse():
                members[str(PurePosixPath(member.name))] = member.offset_data, member.size
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
    return members


_opened = lru_cache(maxsize=1)(ImageRoot)


def open_image_root(read: ReadConfig, shard: str) -> ImageRoot | None:
    """That of an input shard; a worker keeps the last one, and so the index of its tar."""
    return _opened(read.image_root.replace(SHARD, shard), read.max_bytes) if read.image_root else None


def check_image_root(root: str | None) -> None:
    """UserError where there is none: told before work starts."""
    if root is None:
        return
    if re.search(r"\.(tar\.\w+|tgz)$", root):
        raise UserError(f"read.image_root: single images of '{root}' can't be read; unpack it to a plain .tar")
    if SHARD in root or root.startswith(("http://", "https://")):  # known by shard, or not listed
        return
    try:
        files, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise UserError(f"read.image_root: '{root}' cannot be opened: {error}") from error
    if not files.exists(path):
        raise UserError(f"read.image_root: '{root}' does not exist; give the folder, URL or .tar that holds the images")
