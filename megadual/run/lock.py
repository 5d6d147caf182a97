"""One trainer per run folder: a lock that works on a shared disk, and that a killed holder leaves without harm.

The lock is a file that its holder touches every few seconds. Clocks of different nodes are never compared: who finds
a lock watches for some seconds whether it is still touched.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from torch.distributed import Store

from megadual.errors import UserError
from megadual.run import exits
from megadual.run.nodes import broadcast

LOCK = "lock.json"
# Of a lock that a disk has broken. One that lives touches it all the same.
UNKNOWN: dict = {"owner": "unknown", "host": None, "pid": 0, "name": "an unknown machine", "job": None}


@contextlib.contextmanager
def sole_trainer(folder: Path, store: Store, rank: int, world: int):
    """Rank 0 holds the folder's lock meanwhile; where it can't have it, all ranks raise its UserError."""
    lock, complaint = RunLock(folder), None
    if rank == 0:
        try:
            lock.acquire()
        except UserError as error:
            complaint = str(error)
        except OSError as error:
            complaint = f"run.dir '{folder}' can't be locked: {error.strerror}"
    if complaint := broadcast(store, "lock", complaint, rank, world):
        raise UserError(complaint)
    try:
        yield
    finally:
        if rank == 0:
            lock.release()


class RunLock:
    """Holds `folder/lock.json` between `acquire` and `release`. One process of a run has it.

    `key` and `value` are what messages call the folder by: the key of the config that names it.
    """

    def __init__(self, folder: Path, beat_s: float = 5.0, key: str = "run.dir", value: str | None = None):
        self.path, self.beat_s = Path(folder) / LOCK, beat_s
        self.key, self.place = key, f"{key} '{folder if value is None else value}'"
        self.me = {"owner": secrets.token_hex(8), "host": _machine(), "pid": os.getpid()}
        self.me |= {"name": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")}
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, from an earlier holder that is dead if need be; UserError where a living one has it.

        A dead holder on this machine is known at once, one on another is watched for four beats.
        """
        mine = self.path.with_name(f".lock-{self.me['owner']}")
        mine.write_text(json.dumps(self.me))
        try:
            while not _linked(mine, self.path):
                holder = _read(self.path)
                if holder is None:
                    continue
                if lives(self.path, self.beat_s):
                    job = f", Slurm job {holder['job']}" if holder["job"] else ""
                    raise UserError(
                        f"{self.place} is in use by process {holder['pid']} on {holder['name']}{job}; "
                        f"stop that one, or give another {self.key}"
                    )
                if self._replaced(self.path, holder, mine):
                    break
        finally:
            mine.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        self._released.set()
        with contextlib.suppress(OSError):  # the disk is away: the next start finds a dead holder
            if _read(self.path) == self.me:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(self.beat_s):
            with contextlib.suppress(OSError, ValueError):  # a shared disk's bad moment: the next beat tries again
                holder = _read(self.path)
                if holder not in (None, UNKNOWN, self.me):
                    where = f"{holder['name']}, process {holder['pid']}"
                    print(f"error: {self.place} was taken over by {where}", file=sys.stderr, flush=True)
                    os._exit(exits.LOST_RUN)  # it was not seen for long
                if holder is not None:
                    os.utime(self.path)

    def _replaced(self, path: Path, holder: dict, mine: Path) -> bool:
        """Put `mine` in the place of a dead holder's file. False where that has changed meanwhile: look again.

        One start at a time does so: it has `.successor-of-OWNER`, a lock too, which is replaced in the same way where
        a start was killed that had it.
        """
        successor = path.with_name(f".successor-of-{holder['owner']}")
        if not _linked(mine, successor):
            other = _read(successor)
            if other is None or lives(successor, self.beat_s) or not self._replaced(successor, other, mine):
                return False
        try:
            if _read(path) != holder:  # an earlier successor has it
                return False
            replacement = path.with_name(f".replacement-{self.me['owner']}")
            os.link(mine, replacement)
            os.replace(replacement, path)
            return True
        finally:
            successor.unlink(missing_ok=True)


def lives(path: Path, beat_s: float = 5.0) -> bool:
    """Is the holder of a lock file alive? Watches it for up to four beats."""
    holder = _read(path)
    if holder is None:
        return False
    if holder["host"] == _machine() and not Path(f"/proc/{holder['pid']}").exists():
        return False
    touched, deadline = _touched(path), time.monotonic() + 4 * beat_s
    while time.monotonic() < deadline:
        time.sleep(beat_s / 5)
        if _touched(path) != touched:
            return True
    return False


def _machine() -> str:
    """Names what a process id holds on: this boot of this machine, and the namespace of processes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")


def _linked(mine: Path, path: Path) -> bool:
    """Have `path` be a link to `mine`; False where there is such a file. Atomic, on NFS too."""
    try:
        os.link(mine, path)
        return True
    except FileExistsError:
        return False


def _read(path: Path) -> dict | None:
    """A lock's holder: UNKNOWN where the file names none, None where there is no file."""
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return UNKNOWN
    known = isinstance(holder, dict) and holder.keys() >= UNKNOWN.keys()
    return holder if known and str(holder["owner"]).isalnum() and type(holder["pid"]) is int else UNKNOWN


def _touched(path: Path) -> int | None:
    try:
        with open(path) as file:  # opening asks an NFS server again, where stat may answer from its cache
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
