"""What the model draws as it learns: pictures from checkpoints, made beside the training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from megadual.run.local import STORE
from megadual.train.config import PretrainConfig

LAST_S = 300  # how long the last picture is waited for


class Sampling:
    """Draws `run.samples` from a checkpoint at every `run.samples_every` steps, into RUN/samples/STEP.png (rank 0).

    A process of its own does it, on the CPU at the lowest priority: so any layout of any engine can be drawn from,
    and no GPU memory is needed. A checkpoint that comes while the one before is still drawn from is passed over.
    """

    def __init__(self, run: PretrainConfig):
        self.prompts, self.every = run.run.samples, run.run.samples_every
        self.folder = Path(run.run.dir) / "samples"
        self.process: subprocess.Popen | None = None

    def start(self, checkpoint: Path) -> None:
        """Begin with a checkpoint that is complete."""
        step = int(checkpoint.name)
        if not self.every or step % self.every or self.process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".export-*"):  # by one that was killed
            shutil.rmtree(left)
        self.picture = self.folder / f"{step:08d}.png"
        command = [
            sys.executable,
            "-m",
            "checkpoints_tools.draw_samples",
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

    def poll(self) -> Path | None:
        """The picture that was finished since the last call, if one was; its log where there is no picture."""
        if self.process is None or self.process.poll() is None:
            return None
        failed, self.process = self.process.returncode, None
        return self.picture.with_suffix(".log") if failed else self.picture

    def finish(self) -> Path | None:
        """`poll` for the last time."""
        if self.process:
            try:
                self.process.wait(LAST_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.poll()

    def stop(self) -> None:
        """Give up what is being drawn."""
        if self.process:
            self.process.kill()
