"""A process beside training that makes something of checkpoints."""

import contextlib
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megadual.run.hooks import Hook
from megadual.run.local import STORE
from megadual.train.metrics import MetricsLog


class Beside(Hook, ABC):
    """Runs a module on a checkpoint at every so many steps; a subclass says which, and what is told of its product.

    It runs on the CPU at the lowest priority: so any layout of any engine will do, and no GPU memory is needed. Of the
    checkpoints that come while one is worked on, the newest waits.
    """

    last_s = 300  # how long each product is waited for at the end

    def __init__(self, every: int | None, folder: Path, log: MetricsLog):
        """For rank 0, whose `log` is told of each product in `folder`."""
        self.every, self.folder, self.log = every, folder, log
        self.process: subprocess.Popen | None = None
        self.step = 0  # the last one done
        self.waiting: Path | None = None  # the newest checkpoint behind the one that is worked on

    @abstractmethod
    def arguments(self, checkpoint: Path) -> list:
        """The module and its arguments."""

    @abstractmethod
    def show(self, checkpoint: Path, entry: dict[str, Any] | None) -> None:
        """Tell of what was made of a checkpoint; `entry` is a step's line in metrics.jsonl, None at the end."""

    def after_checkpoint(self, checkpoint: Path) -> None:
        if self.every and int(checkpoint.name) % self.every == 0:
            self.waiting = checkpoint
            self._go_on()

    def after_step(self, step: int, entry: dict[str, Any]) -> None:
        self.step = step
        if self.process and self.process.poll() is not None:
            self._ended(entry)
            self._go_on()

    def at_end(self, finished: bool) -> None:
        """Where all steps are done, wait for what is made and what is still to be; else give it up."""
        while self.process:
            if finished:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(self.last_s)
            self.process.kill()
            self.process.wait()
            if not finished:
                return
            self._ended(None)
            self._go_on()

    def _ended(self, entry: dict[str, Any] | None) -> None:
        """A process that failed has told why in its log."""
        assert self.process is not None
        failed, self.process = self.process.returncode, None
        if failed:
            self.log.message(f"warning: nothing was made of {self.checkpoint}: see {self._log_of(self.checkpoint)}")
        else:
            self.show(self.checkpoint, entry)

    def _log_of(self, checkpoint: Path) -> Path:
        return self.folder / f"{checkpoint.name}.log"

    def _go_on(self) -> None:
        """Begin with the checkpoint that waits, if none is worked on."""
        if self.process or self.waiting is None:
            return
        self.checkpoint, self.waiting = self.waiting, None
        try:
            self._begin()
        except OSError as error:
            self.log.message(f"warning: nothing is made of {self.checkpoint}: {error}")

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".export-*"):  # by one that was killed
            shutil.rmtree(left)
        command = [sys.executable, "-m", *self.arguments(self.checkpoint)]
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", STORE)
        mine = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
        with open(self._log_of(self.checkpoint), "w") as log:
            self.process = subprocess.Popen(
                ["nice", "-n", "19", *map(str, command)],
                env=mine | {"CUDA_VISIBLE_DEVICES": ""}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is for the training alone
            )  # fmt: skip
