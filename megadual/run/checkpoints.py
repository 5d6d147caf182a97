"""Checkpoints as files: there whole or not at all, checked when they are read, the newest named by a pointer.

RUN/checkpoints/00000100/ is the state after 100 steps, with the checksums of its files; RUN/checkpoints/latest names
the newest complete one and moves only once that is whole.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from megadual.errors import UserError
from megadual.run.ranks import Ranks

LATEST = "latest"
CHECKSUMS = "checksums.json"
EDITABLE = "run.yaml"  # beside weights to start from: a run's keys, which its user may change
PARTIAL = ".partial-"
# What a disk says that may be well again when training starts anew, which jobs do by themselves.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR}


class CheckpointFolder:
    """RUN/checkpoints. All ranks call its methods, `clean` and `latest` excepted."""

    def __init__(self, run: Path, keep: int):
        """`keep`: how many of the newest complete ones stay."""
        self.folder, self.keep = Path(run) / "checkpoints", keep

    def final(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def partial(self, step: int) -> Path:
        """Where a checkpoint lies until it is whole."""
        return self.folder / f"{PARTIAL}{step:08d}"

    def write(self, step: int, write: Callable[[Path], object]) -> None:
        """Rank 0 writes a whole checkpoint by `write(folder)`. Errors as `on_first_rank` has them."""
        self.begin(step)
        self.on_first_rank(step, lambda: write(self.partial(step)))
        self.complete(step, {})

    def begin(self, step: int) -> None:
        """Make the partial folder, and remove what cut-short saves have left."""

        def make() -> None:
            self.clean()
            self.partial(step).mkdir(parents=True)

        self.on_first_rank(step, make)

    def complete(
        self, step: int, checksums: dict[str, str], describe: Callable[[Path], object] = lambda folder: None
    ) -> None:
        """Make the partial checkpoint the latest one, with the files that `describe` adds, and prune the oldest.

        `checksums` are known already; those of other files are computed here.
        """

        def publish() -> None:
            partial, final = self.partial(step), self.final(step)
            describe(partial)
            seal(partial, checksums)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            pointer = self.folder / f".{LATEST}"
            pointer.write_text(final.name)
            os.replace(pointer, self.folder / LATEST)
            complete = sorted(path for path in self.folder.iterdir() if path.name.isdigit())
            for old in complete[: -self.keep]:
                if old != final:
                    shutil.rmtree(old)

        self.on_first_rank(step, publish)

    def on_first_rank(self, step: int, action: Callable[[], object]) -> None:
        """Do something to the files on rank 0; every rank hears whether it worked.

        UserError where it did not, RuntimeError where that may pass (PASSING); `latest` is then as it was.
        """
        told = None
        if Ranks.current().main:
            try:
                action()
            except (OSError, RuntimeError) as error:
                if not isinstance(_cause(error), OSError):
                    raise
                told = what_failed(error)
        if told := Ranks.current().gather(told)[0]:
            raise self.unwritable(step, *told)

    def unwritable(self, step: int, error: str, number: int | None) -> Exception:
        latest = self.latest()
        kept = f"the last good one is '{latest}'" if latest else "the run has none yet"
        told = f"checkpoint '{self.final(step)}' could not be written ({error}); {kept}"
        if number in PASSING:
            return RuntimeError(told)
        return UserError(f"{told}; make room there, or give another run.dir, and start again")

    def clean(self) -> None:
        """Remove what a save that was cut short has left behind (rank 0)."""
        for partial in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None where the run has none; UserError where its pointer is broken."""
        return pointed(self.folder) if os.path.lexists(self.folder / LATEST) else None

    def to_resume(self) -> Path | None:
        """The latest one as rank 0 sees it: shared disks answer late (collective)."""
        latest: Path | UserError | None = None
        if Ranks.current().main:
            try:
                latest = self.latest()
            except UserError as error:
                latest = error
        if isinstance(latest := Ranks.current().gather(latest)[0], UserError):
            raise latest
        return latest


def pointed(folder: Path) -> Path:
    """The checkpoint of a run's checkpoints `folder` that its pointer names; UserError where that is none."""
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    if not name.isdigit() or not (folder / name).is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
        fix = f"write the name of one to it: {', '.join(there[-3:])}" if there else "there is none beside it: remove it"
        raise UserError(f"'{folder / LATEST}' names no checkpoint ({name[:40]!r}); {fix}")
    return folder / name


def seal(folder: Path, checksums: dict[str, str]) -> None:
    """Write the checksums of all files in `folder`; `checksums` are those that are known already."""
    checksums = checksums | {name: checksum(folder / name) for name in _files(folder) - checksums.keys()}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1, sort_keys=True))


def verify(checkpoint: Path, needed: tuple[str, ...]) -> None:
    """UserError if a file is not what was written, or there is one more; ranks share the files out (collective).

    `needed`: files without which it is no checkpoint.
    """
    ranks = Ranks.current()
    try:
        written = _checksums(checkpoint)
    except (OSError, ValueError) as error:
        damage = [f"{CHECKSUMS} ({'missing' if isinstance(error, FileNotFoundError) else error})"]
    else:
        there = _files(checkpoint)
        damage = [f"{name} (missing)" for name in (written.keys() | {*needed}) - there]
        damage += [f"{name} (not in {CHECKSUMS})" for name in there - written.keys()]
        mine = sorted(there & written.keys())[ranks.rank :: ranks.size]
        damage += [name for name in mine if checksum(checkpoint / name) != written[name]]
    if damaged := sorted({name for part in ranks.gather(damage) for name in part}):
        more = f" and {len(damaged) - 4} more" if len(damaged) > 4 else ""
        pointer = checkpoint.parent / LATEST
        fix = f"write the name of an older one to '{pointer}'" if pointer.is_file() else "make or copy it anew"
        raise UserError(f"checkpoint '{checkpoint}' is damaged: {', '.join(damaged[:4])}{more}; remove it, and {fix}")


def _files(folder: Path) -> set[str]:
    """The files that have checksums, by their paths in `folder`."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return files - {CHECKSUMS, EDITABLE}


def _checksums(checkpoint: Path) -> dict[str, str]:
    """ValueError where the file holds something else."""
    try:
        written = json.loads((checkpoint / CHECKSUMS).read_text())
    except ValueError as error:
        raise ValueError("not JSON") from error
    if not isinstance(written, dict) or not written or not all(isinstance(each, str) for each in written.values()):
        raise ValueError("no checksums")
    return written


def checksum(path: str | Path) -> str:
    """xxh3 of a file, in hexadecimal."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))  # one that stays in a core's cache
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def what_failed(error: BaseException) -> tuple[str, int | None]:
    """In words, and the disk's number for it."""
    cause = _cause(error)
    return str(cause), getattr(cause, "errno", None)


def _cause(error: BaseException) -> BaseException:
    """What the disk said, where an error of torch's archive writer hides it."""
    while error.__context__ and not isinstance(error, OSError):
        error = error.__context__
    return error
