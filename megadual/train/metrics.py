"""What pretraining writes about its steps."""

import dataclasses
import sys
from pathlib import Path

from megadual.run.log import RunLog
from megadual.train.config import PretrainConfig


class MetricsLog(RunLog):
    def __init__(self, run: PretrainConfig, start_step: int):
        super().__init__(run.run, run, run.train.steps, start_step)

    def step(self, entry: dict) -> None:
        super().step(entry, ("loss_text", "loss_semantic", "loss_pixel"))

    def samples(self, step: int, path: Path | None) -> None:
        """Show what was drawn, if anything was; anything but a picture tells why it was not."""
        if path is None:
            return
        if path.suffix != ".png":
            self.bar.write(f"warning: no samples were drawn: see {path}", sys.stderr)
        else:
            self.picture(step, "samples", str(path), caption=f"step {int(path.stem)}")


def entry_of(step: int, result, **more) -> dict:
    """One line of metrics.jsonl."""
    return {"step": step, **dataclasses.asdict(result), **more}
