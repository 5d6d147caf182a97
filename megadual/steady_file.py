"""Reading a file out of a store that fails now and then."""

import contextlib
import time
import warnings
from typing import Any

import fsspec

from megadual.errors import UserError

# Seconds behind each failed try to read: minutes, but fewer than other ranks wait for one (NCCL: 10).
RETRY_PAUSES = (1, 5, 20, 60, 120)
PIECE = 1 << 20  # bytes
_answered: set[str] = set()  # stores (scheme://host or bucket) that this process has read from


class SteadyFile:
    """The bytes of a path, URL or `pipe:COMMAND` in order. A store that fails is asked again for minutes, from the byte
    that was due.

    UserError where the store knows no such file, or refuses before it has ever answered here: credentials are wrong
    then, later they may only have to be renewed. OSError where it goes on failing: a later start may read on.
    """

    def __init__(self, url: str):
        self.url, self.position = url, 0
        self.file: Any = None

    def read(self, size: int) -> bytes:
        store = "/".join(self.url.split("/")[:3])
        for pause in (*RETRY_PAUSES, None):
            try:
                if self.file is None:
                    self._open()
                data = self.file.read(size)
                if not data and self.url.startswith("pipe:"):
                    self.file.wait_for_child()  # raises where the command failed: this is not the end then
                self.position += len(data)
                _answered.add(store)
                return data
            except Exception as error:  # every store has errors of its own; HTTP's and S3's say why in their cause
                problem, forbidden = error.__cause__ or error, isinstance(error, PermissionError)
            self.close()
            kind, status = type(problem).__name__, getattr(problem, "status", None)
            told = f"'{self.url}' can't be read: {kind}: {problem}"
            missing = isinstance(problem, FileNotFoundError) or status == 404 or kind == "NoSuchBucket"
            refused = forbidden or status in (401, 403) or kind == "NoCredentialsError"
            if "://" in self.url and missing:  # it may never have been there; a path was, when files were listed
                raise UserError(told)
            if "://" in self.url and refused and store not in _answered:
                raise UserError(f"{told}: check the credentials for {store}")
            if pause is not None:
                warnings.warn(f"{told}; the next try is in {pause} s", stacklevel=2)
                time.sleep(pause)
        raise OSError(told)

    def _open(self) -> None:
        """`file`, where reading was."""
        left = self.position
        if self.url.startswith("pipe:"):
            from webdataset import gopen

            self.file = gopen(self.url)
        else:
            self.file = fsspec.open(self.url, "rb").open()
            with contextlib.suppress(ValueError):  # of a server that sends whole files only
                self.file.seek(left)
                left = 0
        while left:
            piece = self.file.read(min(left, PIECE))
            if not piece:
                raise OSError(f"it ends before byte {self.position}, up to which it was read before")
            left -= len(piece)

    def close(self) -> None:
        file, self.file = self.file, None
        if file:
            with contextlib.suppress(Exception):  # its bytes are read, or it has failed before
                file.close()
