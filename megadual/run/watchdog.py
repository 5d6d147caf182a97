"""Ends a rank that makes no progress, with the stacks of all its threads in the run folder."""

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from megadual.run import exits

GRACE_S = 10.0  # for the other ranks of the node, and for a thread that never gets Python's lock


class Watchdog:
    """Exits with exits.HANG when `beat` was not called for `timeout_s` seconds (null: never).

    All ranks wait in a collective while one hangs, so each of them notices by itself and writes its stacks to
    `folder/hang-rankN.txt`. A rank that was stopped (SIGSTOP) is first woken, by those on its node, whose process
    ids are `peers`, or through Slurm, and then notices too.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float | None, peers: list[int]):
        self.rank, self.timeout_s, self.peers = rank, timeout_s, peers
        self.path = Path(folder) / f"hang-rank{rank}.txt"
        self.closed, self.fired = threading.Event(), threading.Event()
        if timeout_s is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w")  # opened early: a hanging disk must not keep the rank
            self.beat()
            threading.Thread(target=self._watch, args=(timeout_s,), daemon=True).start()

    def beat(self) -> None:
        """There is progress. Does not return where this comes too late."""
        if self.fired.is_set():
            threading.Event().wait()
        if self.timeout_s is not None:
            self.last = time.monotonic()
            # Runs without Python's lock, which a hanging call may hold; the thread below has a code of its own.
            faulthandler.dump_traceback_later(self.timeout_s + 2 * GRACE_S, exit=True, file=self.file)

    def close(self) -> None:
        self.closed.set()
        if self.timeout_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            self.path.unlink()

    def _watch(self, timeout_s: float) -> None:
        while not self.closed.wait(min(1.0, timeout_s / 10)):
            silent = time.monotonic() - self.last
            if silent > timeout_s:
                break
        else:
            return
        self.fired.set()
        try:
            self._tell(silent)
            time.sleep(GRACE_S)  # its end would end the others before they have written theirs
        finally:
            os._exit(exits.HANG)

    def _tell(self, silent: float) -> None:
        """Write the stacks, and wake stopped ranks."""
        where = f"rank {self.rank} on {socket.gethostname()}"
        with contextlib.suppress(OSError):  # stderr may be closed
            told = f"error: {where} made no progress for {silent:.0f} s; stacks: {self.path}"
            print(told, file=sys.stderr, flush=True)
        self.file.write(f"{where}, process {os.getpid()}: no progress for {silent:.0f} s\n")
        self.file.flush()
        faulthandler.dump_traceback(self.file, all_threads=True)
        for pid in self.peers:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        if self.rank < 2 and (job := os.environ.get("SLURM_JOB_ID")):  # one of the two is not stopped itself
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # a container may have no scancel
                subprocess.run(["scancel", "--quiet", "--signal=CONT", job], timeout=GRACE_S)


def collective_timeout_s(hang_timeout: float | None) -> float:
    """Seconds until a backend gives a collective up: after the watchdog, which shows stacks."""
    return (hang_timeout or 1e6) + 120
