"""What a run's folder and wandb are told of every step; every training has one, in one process."""

import contextlib
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from megadual.run.wandb_file import mend_wandb_files, steps_in_wandb_files

INIT_S, FINISH_S = 30, 60  # how long wandb is waited for, unless WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say


class StepLog:
    """Appends one JSON object per step to FOLDER/metrics.jsonl and sends it to wandb.

    A resumed run first drops the lines of steps that the checkpoint does not contain, so that no step appears
    twice. wandb has one run for all starts and takes nothing back: it gets each step once, since a repeated one has
    the same numbers, and what a kill, a power cut or a server that was away kept from it is sent again from
    metrics.jsonl by the next start. No failure of wandb ends training.
    """

    def __init__(self, folder: Path, start_step: int, mode: str, project: str, name: str, config: dict):
        """`mode`: online, offline or disabled; `start_step`: the last step that the checkpoint contains."""
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
        partial = path.with_name(".metrics.jsonl")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self.file = open(path, "a")
        self.wandb, self.sent = None, 0
        if mode != "disabled":
            with self._wandb_may_fail():
                self.wandb, self.sent = _open_wandb(folder, mode, project, name, config)
            for line in kept:
                self._to_wandb(json.loads(line))

    def write(self, entry: dict) -> None:
        """One step's numbers, its own under "step"."""
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self._to_wandb(entry)

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
            message = "warning: training goes on without wandb, the next start sends the missing steps: "
            tqdm.write(message + " ".join(str(error).split()), sys.stderr)


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
