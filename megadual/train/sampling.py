"""What the model draws as it learns: pictures from checkpoints, made beside the training."""

from pathlib import Path
from typing import Any

from megadual.train.beside import Beside
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog


class Sampling(Beside):
    """Draws `run.samples` from a checkpoint at every `run.samples_every` steps, into RUN/samples/STEP.png."""

    def __init__(self, run: PretrainConfig, log: MetricsLog):
        super().__init__(run.run.samples_every, Path(run.run.dir) / "samples", log)
        self.prompts = run.run.samples

    def arguments(self, checkpoint: Path) -> list:
        return ["megadual.hf.draw_samples", checkpoint, *self.prompts, "--output", self._picture(checkpoint)]

    def show(self, checkpoint: Path, entry: dict[str, Any] | None) -> None:
        picture = str(self._picture(checkpoint))
        self.log.picture(self.step, "samples", picture, caption=f"step {int(checkpoint.name)}")

    def _picture(self, checkpoint: Path) -> Path:
        return self.folder / f"{checkpoint.name}.png"
