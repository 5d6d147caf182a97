"""What a run's folder and wandb are told of every step; every training has one, in one process."""

import contextlib
import json
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from megadual.errors import UserError
from megadual.run.files import write_whole
from megadual.run.wandb_file import mend_wandb_files, steps_in_wandb_files

METRICS = "metrics.jsonl"
INIT_S, FINISH_S = 30, 60  # how long wandb is waited for, unless WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say


def read_metrics(path: Path, last: int | None = None) -> tuple[list[dict], int]:
    """(what is said of each step, how many lines are broken), of the whole file or its `last` lines.

    A crash leaves NULs, or lines that are no steps. A part of a line at the end is just being written, or was when its
    writer was killed: it is left out.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    if lines and _entry(lines[-1]) is None:
        del lines[-1]
    entries = [_entry(line) for line in (lines if last is None else lines[-last:])]
    whole = [entry for entry in entries if entry is not None]
    return whole, len(entries) - len(whole)


def _entry(line: bytes) -> dict | None:
    try:
        entry = json.loads(line.strip(b"\0"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    return None if any(isinstance(value, str | dict) for value in entry.values()) else entry  # a step has numbers alone


class StepLog:
    """Appends one JSON object per step to FOLDER/metrics.jsonl and sends it to wandb.

    A resumed run first drops the lines of steps that the checkpoint does not contain, so that no step appears
    twice. Lines that a full disk does not take wait in memory for room. wandb has one run for all starts and takes
    nothing back: it gets each step once, since a repeated one has the same numbers, and what a kill, a power cut or a
    server that was away kept from it is sent again from metrics.jsonl by the next start. No failure of wandb ends
    training.
    """

    def __init__(self, folder: Path, start_step: int, mode: str, project: str, name: str, config: dict):
        """`mode`: online, offline or disabled; `start_step`: the last step that the checkpoint contains."""
        path = folder / METRICS
        entries, broken = read_metrics(path)
        kept = [entry for entry in entries if entry["step"] <= start_step]
        try:
            if broken:
                aside = path.with_name(f"{METRICS}.broken")
                shutil.copyfile(path, aside)
                _warn(f"{broken} lines of '{path}' can't be read, as after a crash, and are left out; see '{aside}'")
            write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
            self.file = open(path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"'{path}' can't be written: {error.strerror}; make room there") from error
        self.end, self.waiting, self.full = path.stat().st_size, b"", False
        self.wandb, self.sent = None, 0
        if mode != "disabled":
            with self._wandb_may_fail():
                self.wandb, self.sent = _open_wandb(folder, mode, project, name, config)
            for entry in kept:
                self._to_wandb(entry)

    def write(self, entry: dict) -> None:
        """One step's numbers, its own under "step"."""
        self.waiting += json.dumps(entry).encode() + b"\n"
        self._append()
        self._to_wandb(entry)

    def _append(self) -> None:
        """Write the lines that wait: all of them or none, so that the file never ends in a part of one."""
        written = 0
        try:
            while written < len(self.waiting):
                written += self.file.write(self.waiting[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), self.end)
            if not self.full:
                _warn(f"{METRICS} can't be written ({error.strerror}); its lines wait in memory: make room in run.dir")
            self.full = True
            return
        if self.full:
            _warn(f"{METRICS} is written again; no line was lost")
        self.end, self.waiting, self.full = self.end + written, b"", False

    def numbers(self, step: int, numbers: dict) -> None:
        """More of a step that was written, for wandb alone."""
        if self.wandb and step > self.sent:
            with self._wandb_may_fail():
                self.wandb.log(numbers, step=step)

    def picture(self, step: int, name: str, image, caption: str | None = None) -> None:
        """A PIL image or a file's path, for wandb alone."""
        if self.wandb and step > self.sent:
            import wandb

            with self._wandb_may_fail():
                self.wandb.log({name: wandb.Image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._append()
        if lost := self.waiting.count(b"\n"):
            _warn(f"{METRICS} lacks the last {lost} steps")
        self.file.close()
        if self.wandb:
            with self._wandb_may_fail():
                self.wandb.finish()

    def _to_wandb(self, entry: dict) -> None:
        if self.wandb and entry["step"] > self.sent:
            with self._wandb_may_fail():
                self.wandb.log(entry, step=entry["step"])

    @contextlib.contextmanager
    def _wandb_may_fail(self):
        """Go on without wandb where its server does not answer, or the process that sends is dead."""
        try:
            yield
        except Exception as error:  # not all that wandb raises are wandb's errors
            self.wandb = None
            told = "training goes on without wandb, the next start sends the missing steps: "
            _warn(told + " ".join(str(error).split()))


def _warn(line: str) -> None:
    tqdm.write(f"warning: {line}", sys.stderr)


def _open_wandb(folder: Path, mode: str, project: str, name: str, config: dict):
    """The folder's one wandb run, and the last step that it has."""
    import wandb  # large, and not installed on every machine that trains

    id_file = folder / "wandb_id"
    run_id = id_file.read_text() if id_file.is_file() else ""
    if not run_id:
        run_id = secrets.token_hex(4)
        id_file.write_text(run_id)
    online = mode == "online"
    if not online:
        mend_wandb_files(folder)
    opened = wandb.init(
        project=project,
        name=name,
        group=name,
        id=run_id,
        resume="allow" if online else None,
        dir=str(folder),
        mode=cast(Any, mode),  # RunConfig.wandb is one of wandb's own words
        config=config,
        settings=wandb.Settings(
            silent=True,
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_S)),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_S)),  # without one it tries for days
            finish_timeout_raises=True,
        ),
    )
    # Online the server says what it has.
    return opened, opened.starting_step - 1 if online else max(steps_in_wandb_files(folder), default=0)
