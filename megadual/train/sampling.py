"""What the model draws as it learns: pictures from checkpoints, made beside the training."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megadual.run.hooks import Hook
from megadual.run.local import STORE
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog

LAST_S = 300  # how long each picture is waited for at the end


class Sampling(Hook):
    """Draws `run.samples` from a checkpoint at every `run.samples_every` steps, into RUN/samples/STEP.png.

    A process of its own does it, on the CPU at the lowest priority: so any layout of any engine can be drawn from,
    and no GPU memory is needed. Of the checkpoints that come while one is being drawn from, the newest waits.
    """

    def __init__(self, run: PretrainConfig, log: MetricsLog):
        """For rank 0, whose `log` is told of each picture."""
        self.prompts, self.every, self.log = run.run.samples, run.run.samples_every, log
        self.folder = Path(run.run.dir) / "samples"
        self.process: subprocess.Popen | None = None
        self.step = 0  # the last one done
        self.waiting: Path | None = None  # the newest checkpoint behind the one that is drawn from

    def after_checkpoint(self, checkpoint: Path) -> None:
        if self.every and int(checkpoint.name) % self.every == 0:
            self.waiting = checkpoint
            self._go_on()

    def after_step(self, step: int, entry: dict[str, Any]) -> None:
        self.step = step
        if self.process and self.process.poll() is not None:
            self._show()
            self._go_on()

    def at_end(self, finished: bool) -> None:
        """Where all steps are done, wait for what is drawn and what is still to be; else give it up."""
        while self.process:
            if finished:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(LAST_S)
            self.process.kill()
            self.process.wait()
            if not finished:
                return
            self._show()
            self._go_on()

    def _show(self) -> None:
        """Tell of what was drawn; anything but a picture tells why it was not."""
        failed, self.process = self.process.returncode, None
        if failed:
            self.log.message(f"warning: no samples were drawn: see {self.picture.with_suffix('.log')}")
        else:
            self.log.picture(self.step, "samples", str(self.picture), caption=f"step {int(self.picture.stem)}")

    def _go_on(self) -> None:
        """Begin with the checkpoint that waits, if nothing is being drawn."""
        checkpoint = self.waiting
        if self.process or checkpoint is None:
            return
        self.waiting = None
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".export-*"):  # by one that was killed
            shutil.rmtree(left)
        self.picture = self.folder / f"{checkpoint.name}.png"
        command = [
            sys.executable,
            "-m",
            "megadual.hf.draw_samples",
            checkpoint,
            *self.prompts,
            "--output",
            self.picture,
        ]
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", STORE)
        mine = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
        with open(self.picture.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                ["nice", "-n", "19", *map(str, command)],
                env=mine | {"CUDA_VISIBLE_DEVICES": ""}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
