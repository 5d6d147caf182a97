"""What a training prints can't end it: its terminal may close, its pipe's reader end, its log's disk be full."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output:
    """A stream that falls silent, for C libraries too, where it can't be written any more."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with self._may_fail():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._may_fail():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # what was not written stays in the stream's buffer, and would fail again at the exit
            with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Make stdout and stderr an Output meanwhile."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outputs = [Output(stream) for stream in before]
    try:
        yield
    finally:
        for output in outputs:
            output.flush()
        sys.stdout, sys.stderr = before
