"""Where a shard set is kept: a folder, or a prefix of an object store (any URL that fsspec writes to).

A set's folders are committed as wholes: a folder that has its marker is complete, also when a machine stops or two
workers do the same shard.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec

from megadual.errors import UserError
from megadual.run.files import sync
from megadual.run.lock import RunLock

MARKER = "_SUCCESS"  # not *.json: streaming's merge_index takes every .json below a set for an index
TEMPORARY = "_tmp"


def open_store(output: str) -> "Store":
    """The store of the set at `output`, a path or a URL; UserError where fsspec cannot open it."""
    if "://" not in output:
        return Folder(output)
    try:
        return Store(output)
    except (ImportError, ValueError) as error:
        raise UserError(f"output: '{output}' cannot be opened: {error}") from error


class Store:
    """An object store: it renames nothing, but an object is there whole or not at all, so markers go last."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.files, self.root = fsspec.core.url_to_fs(self.url)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """A run on the set; UserError before it starts where the store takes no objects.

        Nothing keeps a second run away. Both put the same bytes, and temporary files are on their workers' disks.
        """
        probe = self.path(f"{TEMPORARY}/probe")
        try:
            self.files.pipe_file(probe, b"?")
            self.files.rm_file(probe)
        except Exception as error:  # every store has errors of its own
            raise UserError(f"output: cannot write to '{self.url}': {type(error).__name__}: {error}") from error
        yield

    def new_folder(self, name: str) -> Path:
        """An empty folder in which a worker writes, on its own disk."""
        return Path(tempfile.mkdtemp(prefix=f"{name}."))

    def commit(self, folder: Path, name: str) -> None:
        """Make a finished folder the set's folder `name`, in the place of one that was made of another input.

        Two workers that do the same shard put the same bytes.
        """
        target = self.path(name)
        self.files.invalidate_cache()
        if self.files.exists(f"{target}/{MARKER}"):
            if self.files.cat_file(f"{target}/{MARKER}") == (folder / MARKER).read_bytes():
                return
            self.files.rm_file(f"{target}/{MARKER}")  # first: from here on it is unfinished
        names = {path.name for path in folder.iterdir()}
        for path in self.files.find(target):  # no others: another worker may be putting the same ones
            if path.rpartition("/")[2] not in names:
                self.files.rm_file(path)
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == MARKER, path.name)):
            self.files.put_file(str(path), f"{target}/{path.name}")

    def replace(self, name: str, chunks: Iterable[str]) -> None:
        """Write a file of the set's root; readers see the old or the new one."""
        with self.files.open(self.path(name), "wb") as file:
            file.writelines(chunk.encode("utf-8", "backslashreplace") for chunk in chunks)

    def remove(self, name: str) -> None:
        """Remove a file of the set's root, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self.path(name))

    def read(self, name: str) -> str:
        return self.files.cat_file(self.path(name)).decode()

    def markers(self) -> dict[str, dict]:
        """The markers of the committed folders by name."""
        self.files.invalidate_cache()
        try:
            paths = [path for path in self.files.find(self.root, maxdepth=2) if path.endswith(f"/{MARKER}")]
            found = self.files.cat(paths) if paths else {}
        except FileNotFoundError:
            return {}
        except Exception as error:  # every store has errors of its own
            raise UserError(f"cannot read '{self.url}': {type(error).__name__}: {error}") from error
        return {path.split("/")[-2]: json.loads(found[path]) for path in sorted(found)}

    def sha256(self, name: str) -> str:
        with self.files.open(self.path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def clean(self) -> None:
        """Remove what unfinished work left, within a `run`."""


class Folder(Store):
    """A local or shared folder: a new folder of the set is written beside the others and renamed."""

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """The only run on the set; UserError where another is at it, or the folder can't be written to."""
        temporary = Path(self.root) / TEMPORARY
        lock = RunLock(temporary, key="output", value=self.url)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise UserError(f"output: cannot write to '{self.url}': {error}") from error
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):  # something was left unfinished
                temporary.rmdir()

    def new_folder(self, name: str) -> Path:
        folder = Path(self.root) / TEMPORARY / name
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str) -> None:
        for path in [*folder.iterdir(), folder]:
            sync(path)
        target = Path(self.root) / name
        try:
            folder.rename(target)
        except OSError:
            if not (target / MARKER).exists():
                raise
            if (target / MARKER).read_bytes() != (folder / MARKER).read_bytes():
                old = folder.with_name(f"{folder.name}.old")
                target.rename(old)
                folder.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            # else another worker did the same shard first, with the same bytes
        sync(Path(self.root))

    def replace(self, name: str, chunks: Iterable[str]) -> None:
        temporary = Path(tempfile.mkdtemp(dir=Path(self.root) / TEMPORARY)) / name
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(chunks)
        sync(temporary)
        os.replace(temporary, Path(self.root) / name)
        sync(Path(self.root))
        temporary.parent.rmdir()

    def clean(self) -> None:
        for path in (Path(self.root) / TEMPORARY).iterdir():
            if path.is_dir():  # beside the run's lock
                shutil.rmtree(path, ignore_errors=True)
