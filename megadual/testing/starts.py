"""Starts of `pretrain/pretrain.py` whose ranks come from the tests' forkserver, which has imported everything: that
takes a rank longer than the few steps that a test trains. They meet as those do that `run.ranks` starts."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megadual.run.local import STORE, hold_stop_signals
from megadual.testing.distributed import forkserver

ROOT = Path(__file__).parents[2]


def nothing() -> None:
    pass


def _rank(rank: int, ranks: int, folder: Path, arguments: list[str], environment: dict, meddle: Callable) -> None:
    from pretrain import pretrain  # known once this process is where the tests are

    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(
        environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **{STORE: str(folder / "store")},
    )  # fmt: skip
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.argv = ["pretrain.py", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
    meddle()
    hold_stop_signals()
    pretrain.main()


class Start:
    """A start under way of `ranks` ranks, of which the one `at` does `meddle` first. What it prints goes to `folder`.

    As a context it is ended when that is left.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[object],
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        meddle: Callable[[], None] = nothing,
        at: int = 0,
    ):
        self.folder, given = folder, [str(argument) for argument in arguments]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr", "store"):  # of another start
            (folder / name).unlink(missing_ok=True)
        self.ranks = [
            forkserver().Process(
                target=_rank,
                args=(rank, ranks, folder, given, dict(environment or os.environ), meddle if rank == at else nothing),
            )
            for rank in range(ranks)
        ]
        for each in self.ranks:
            each.start()

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_) -> None:
        for each in self.ranks:
            each.kill()
            each.join()

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each rank, None of one that has not ended."""
        return [each.exitcode for each in self.ranks]

    def wait(self, seconds: float = 100) -> list[int | None]:
        """`codes` once all have ended, or after so many seconds."""
        deadline = time.monotonic() + seconds
        for each in self.ranks:
            each.join(max(deadline - time.monotonic(), 0))
        return self.codes

    def send_signal(self, number: int) -> None:
        for each in self.ranks:
            os.kill(each.pid, number)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()
