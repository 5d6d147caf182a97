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


class SteadyFile:
    """The bytes of a path, URL or `pipe:COMMAND` in order. A store that fails is asked again for minutes, from the byte
    that was due.

    UserError where the store knows no such file. OSError where it goes on failing: a later start may read on.
    """

    def __init__(self, url: str):
        self.url, self.position = url, 0
        self.file: Any = None

    def read(self, size: int) -> bytes:
        for pause in (*RETRY_PAUSES, None):
            try:
                if self.file is None:
                    self._open()
                data = self.file.read(size)
                if not data and self.url.startswith("pipe:"):
                    self.file.wait_for_child()  # raises where the command failed: this is not the end then
                self.position += len(data)
                return data
            except Exception as error:  # every store has errors of its own; HTTP's says why in its cause
                problem = error.__cause__ or error
            self.close()
            told = f"'{self.url}' can't be read: {type(problem).__name__}: {problem}"
            missing = isinstance(problem, FileNotFoundError) or getattr(problem, "status", None) == 404
            missing = missing or type(problem).__name__ == "NoSuchBucket"  # s3fs has it for no FileNotFoundError
            if missing and "://" in self.url:  # it may never have been there; a path was, when files were listed
                raise UserError(told)
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
