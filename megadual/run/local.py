"""The ranks of one machine, started without a launcher: `python -m megadual.run.local RANKS SCRIPT ARGUMENTS...`

They meet through a file in a folder that only their user can open; no port is listened on for it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from megadual.run import exits

STORE = "MEGADUAL_STORE"  # names the file through which ranks meet
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ALL_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)
GRACE_S = 20.0  # for the others to end by themselves, and to write down what they did, once a rank has failed
PR_SET_PDEATHSIG = 1
prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def hold_stop_signals() -> None:
    """Before training can answer signals (megadual/run/signals.py): STOP_SIGNALS wait, and Ctrl-C ends at once.

    torchrun's end, by a signal that it does not hand on, is a SIGTERM for its ranks.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if prctl and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def handled() -> list[signal.Signals]:
    """ALL_SIGNALS but for those that are ignored on purpose: by nohup, and by a shell for what is in its background."""
    at_will = (signal.SIGHUP, signal.SIGINT)
    return [number for number in ALL_SIGNALS if number not in at_will or signal.getsignal(number) != signal.SIG_IGN]


def become_ranks(count: int, script: str, arguments: list[str]) -> NoReturn:
    """Go on as the process that starts `count` ranks of `script` and ends as they do."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)  # until all ranks are there
    os.execv(sys.executable, [sys.executable, "-m", __name__, str(count), script, *arguments])


def run_ranks(count: int, command: list[str]) -> int:
    """Run `command` as so many ranks; returns the exit code of the first one that fails, else 0.

    ALL_SIGNALS are handed on to all, each time they come; a second Ctrl-C kills them. Once a rank has failed the others
    have GRACE_S seconds to end, then they are killed; they are too when this process dies.
    """
    ranks: list[subprocess.Popen] = []
    forwarded, interrupted = handled(), False

    def forward(number: int, _) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            sys.exit(exits.INTERRUPTED)
        interrupted |= number == signal.SIGINT
        for rank in ranks:
            rank.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="megadual-") as folder:
        # What comes from here on waits until all ranks are there, and in a rank until it can answer.
        signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
        for number in forwarded:
            signal.signal(number, forward)
        try:
            ranks += (_start(command, rank, count, Path(folder) / "store") for rank in range(count))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
            return _wait(ranks)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
            for rank in ranks:
                rank.kill()
                rank.wait()


def _start(command: list[str], rank: int, count: int, store: Path) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        STORE: str(store), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",  # which DeepSpeed asks for, and does not use
    }  # fmt: skip
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if "lo" in (name for _, name in socket.if_nameindex()):  # what they say to each other stays on this machine
        for library in ("GLOO", "NCCL"):
            environment.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    # A group of its own: a terminal's Ctrl-C comes to this process, which hands it on.
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_in_the_rank(os.getpid())
    )


def _in_the_rank(parent: int):
    """What a rank does before its command runs. Safe: this process has one thread."""

    def prepare() -> None:
        if prctl:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it has died before that was said
                os._exit(1)

    return prepare


def _wait(ranks: list[subprocess.Popen]) -> int:
    """The exit code of all: that of the rank that failed first, its own code before that of a signal."""
    deadline = None
    failed = 0
    while None in [rank.poll() for rank in ranks]:
        failed = failed or _failure(ranks)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline and time.monotonic() > deadline:
            return failed
        time.sleep(0.05)
    return failed or _failure(ranks)


def _failure(ranks: list[subprocess.Popen]) -> int:
    codes = [rank.returncode for rank in ranks if rank.returncode]
    return next((code for code in codes if code > 0), 128 - codes[0] if codes else 0)


if __name__ == "__main__":
    sys.exit(run_ranks(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]))
