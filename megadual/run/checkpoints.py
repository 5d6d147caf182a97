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
        """Make the partial checkpoint the latest one, and prune the oldest.

        `checksums` are known already; those of other files are computed here. What `describe` adds to the folder then
        has none.
        """

        def publish() -> None:
            partial, final = self.partial(step), self.final(step)
            seal(partial, checksums)
            describe(partial)
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
        """The newest complete checkpoint, None where the run has none."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def to_resume(self) -> Path | None:
        """The latest one as rank 0 sees it: shared disks answer late."""
        return Ranks.current().gather(self.latest())[0]


def seal(folder: Path, checksums: dict[str, str]) -> None:
    """Write the checksums of all files in `folder`; `checksums` are those that are known already."""
    others = [path.name for path in folder.iterdir() if path.name not in checksums]
    checksums = checksums | {name: checksum(folder / name) for name in others}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))


def verify(checkpoint: Path) -> None:
    """UserError if a file is not what was written; ranks share the files out (collective)."""
    ranks = Ranks.current()
    written = json.loads((checkpoint / CHECKSUMS).read_text())
    names = sorted(written)[ranks.rank :: ranks.size]
    wrong = [n for n in names if not (checkpoint / n).is_file() or checksum(checkpoint / n) != written[n]]
    if damaged := sorted(name for part in ranks.gather(wrong) for name in part):
        raise UserError(
            f"checkpoint '{checkpoint}' is damaged: {', '.join(damaged)}; remove the folder and write the name of "
            f"an older one to '{checkpoint.parent / LATEST}'"
        )


def checksum(path: str | Path) -> str:
    """xxh3 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
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
