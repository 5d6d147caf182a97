"""Where a shard set's files are: in a local folder, or in a store, out of which they come into a cache."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import fsspec

from megadual.data.cache import Cache, StoreError, read_all
from megadual.data.contents import AGAIN
from megadual.errors import UserError


class Place(Protocol):
    """A set's files, by their names below its root."""

    root: str  # path or URL
    here: bool  # files are on this disk, and stay
    room_ahead: float  # bytes that may be fetched ahead

    def read(self, name: str) -> bytes:
        """A small file; FileNotFoundError where there is none."""

    def held(self, name: str, sha256: str | None, size: int) -> contextlib.AbstractContextManager[Path]:
        """A file's path on this disk, where it is meanwhile; about `size` bytes. FileNotFoundError likewise."""

    def evicted(self, hashes: list[str | None]) -> set[str | None]:
        """Those of the files with these SHA-256 that are no longer on this disk."""

    def ahead(self, work: Callable[[], object]) -> None:
        """Do what holds a file in a thread, if it takes long here."""


def place(root: str | Path, cache: Cache | None) -> Place:
    """That of the set at `root`; a URL needs a cache. UserError where there can be no set."""
    return Remote(str(root), cache) if "://" in str(root) else Folder(root)


class Folder:
    """On a local or shared disk."""

    here = True
    room_ahead = 0.0

    def __init__(self, root: str | Path):
        self.root = str(root)

    def read(self, name: str) -> bytes:
        return Path(self.root, name).read_bytes()

    @contextlib.contextmanager
    def held(self, name: str, sha256: str | None, size: int) -> Iterator[Path]:
        yield Path(self.root, name)

    def evicted(self, hashes: list[str | None]) -> set[str | None]:
        return set()

    def ahead(self, work: Callable[[], object]) -> None:
        pass


class Remote:
    """In a store: any URL that fsspec reads."""

    here = False

    def __init__(self, url: str, cache: Cache | None):
        if cache is None:
            raise UserError(f"shard set '{url}' is a URL: give data.cache, a folder on this machine's own disk")
        self.root, self.cache, self.room_ahead = url.rstrip("/"), cache, cache.room_ahead
        try:
            fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise UserError(f"shard set '{url}' can't be opened: {error}") from error
        except OSError as error:  # of a store that is asked at once, as FTP's
            raise StoreError(f"shard set '{url}' can't be opened: {error}") from error

    def read(self, name: str) -> bytes:
        return read_all(f"{self.root}/{name}")

    def held(self, name: str, sha256: str | None, size: int) -> contextlib.AbstractContextManager[Path]:
        if sha256 is None:
            raise UserError(f"'{self.root}/manifest.json' has no SHA-256 of '{name}': {AGAIN}")
        return self.cache.held(f"{self.root}/{name}", sha256, size)

    def evicted(self, hashes: list[str | None]) -> set[str | None]:
        return self.cache.evicted(hashes)

    def ahead(self, work: Callable[[], object]) -> None:
        self.cache.ahead(work)
