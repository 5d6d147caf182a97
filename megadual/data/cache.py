"""Files of shard sets in stores, on this machine's disk: fetched once for all its processes, the oldest evicted.

A file has its content's SHA-256 as its name, so what is there is right, whichever set and run it came for. What is
fetched is named HASH.part until it is whole. Who fetches or opens a file has its lock (flock), which a process that is
killed leaves: nobody fetches what another one does, and nobody evicts what one is about to map. A mapped file may be
evicted: its bytes stay until it is let go of.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from megadual.errors import UserError
from megadual.run.files import sync
from megadual.steady_file import SteadyFile

PIECE = 1 << 22  # bytes
THREADS = 8  # that fetch ahead
PART = ".part"
LOCK = "lock"  # of who makes room


class StoreError(UserError):
    """A store, or the cache's disk, fails; another start may go well."""

    exit_code = 1


def read_all(url: str) -> bytes:
    """A small file of a store; FileNotFoundError where there is none."""
    return b"".join(_pieces(url))


def _pieces(url: str) -> Iterator[bytes]:
    with contextlib.closing(SteadyFile(url)) as file:
        while piece := _next(file):
            yield piece


def _next(file: SteadyFile) -> bytes:
    try:
        return file.read(PIECE)
    except OSError as error:
        raise StoreError(str(error)) from error


class Cache:
    """At most `gigabytes` (None: no bound) of files in `folder`."""

    def __init__(self, folder: str | Path, gigabytes: float | None = None):
        self.folder = Path(folder)
        self.bound = None if gigabytes is None else round(gigabytes * 1e9)
        # Bytes that this process may fetch before they are read: the node's processes leave half to what is read now.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.room_ahead = math.inf if self.bound is None else self.bound / (2 * ranks)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        except OSError as error:
            raise UserError(f"data.cache: '{folder}' can't be written: {error.strerror}") from error
        self._make_room(0)
        self._coming: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @contextlib.contextmanager
    def held(self, url: str, sha256: str, size: int) -> Iterator[Path]:
        """The path of the file that `url` has, fetched where it is not there; it is not evicted meanwhile.

        UserError where the store has none or only a damaged one, StoreError where it can't be read.
        """
        path = self.folder / sha256
        while True:
            file = _opened(path)
            if file is None:
                self._fetch(url, sha256, size)
                continue
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if _is(file, path):  # else it was evicted meanwhile
                    os.utime(path)
                    yield path
                    return

    def evicted(self, hashes: list[str | None]) -> set[str | None]:
        """Those of the files with these names that are not there."""
        return set() if self.bound is None else set(hashes).difference(os.listdir(self.folder))

    def ahead(self, work: Callable[[], object]) -> None:
        """Do `work` in a thread, in the order of these calls. What goes wrong is told where the outcome is needed."""
        self._coming.put(work)
        if len(self._threads) < THREADS:
            # A daemon: what is still to come keeps nobody from ending.
            self._threads.append(threading.Thread(target=self._work, name="fetch", daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while True:
            with contextlib.suppress(UserError, OSError):
                self._coming.get()()

    def _fetch(self, url: str, sha256: str, size: int) -> None:
        """Have the file in the folder, whoever fetches it."""
        path, part = self.folder / sha256, self.folder / (sha256 + PART)
        try:
            with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # waits for who fetches it
                if not _is(file, part):
                    return  # it is there now, or that one has failed
                if path.exists():
                    part.unlink()
                    return
                try:
                    self._download(url, file, sha256, size)
                except BaseException:
                    part.unlink()
                    raise
                os.rename(part, path)
                sync(self.folder)
        except OSError as error:
            raise StoreError(f"data.cache: '{self.folder}' can't take '{url}': {error.strerror or error}") from error

    def _download(self, url: str, file: BinaryIO, sha256: str, size: int) -> None:
        """Into the open file; a second time where it comes damaged."""
        found = ""
        for _ in range(2):
            self._reserve(file, size)
            digest = hashlib.sha256()
            for piece in _pieces(url):
                digest.update(piece)
                file.write(piece)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            if (found := digest.hexdigest()) == sha256:
                return
        raise UserError(
            f"'{url}' is damaged: its SHA-256 is {found[:16]}..., the set says {sha256[:16]}...; put it there again"
        )

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Empty `file`, and have it take `size` bytes once there is room for them."""
        file.seek(0)
        file.truncate()
        if self.bound is not None and size > self.bound:
            raise UserError(f"data.cache_gb={self.bound / 1e9:g} is less than one file takes, {size / 1e9:.3g} GB")
        while not self._make_room(size, file):
            time.sleep(0.05)  # until what others fetch is whole

    def _make_room(self, size: int, taker: BinaryIO | None = None) -> bool:
        """Evict the oldest until there is room for `size` bytes more, which `taker` then takes; False where there is
        none now.
        """
        if self.bound is None:
            return True
        with open(self.folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = self._files()
            over = sum(taken for _, taken, _ in files) + size - self.bound
            for _, taken, path in files:
                if over > 0 and path.name != LOCK and _evicted(path):
                    over -= taken
            if over <= 0 and taker:
                taker.truncate(size)
            return over <= 0

    def _files(self) -> list[tuple[int, int, Path]]:
        """(when last opened, bytes, path), the oldest first."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was a PART
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        return sorted(found)


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _evicted(path: Path) -> bool:
    """Remove the file, unless somebody fetches it or is about to map it."""
    if not (file := _opened(path)):
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
