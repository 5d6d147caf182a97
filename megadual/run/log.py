"""What one start says of its steps: metrics.jsonl, wandb, TensorBoard and a progress bar, all from rank 0."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megadual.run.config import RunConfig
from megadual.run.record import read_starts
from megadual.run.step_log import StepLog
from megadual.run.tensorboard import TensorBoard


class RunLog:
    """The run's StepLog, and a progress bar."""

    def __init__(self, run: RunConfig, config, steps: int, start_step: int):
        """`config` is the whole one, for wandb; `start_step` the last of the `steps` that the checkpoint contains."""
        folder = Path(run.dir)
        starts = {f"start_{number}": start for number, start in enumerate(read_starts(folder), 1)}
        whole = dataclasses.asdict(config) | starts
        self.steps = StepLog(folder, start_step, run.wandb, run.wandb_project, run.name, whole)
        self.tensorboard = TensorBoard(folder / "tensorboard", start_step) if run.tensorboard else None
        self.bar = tqdm(
            total=steps,
            initial=start_step,
            desc=run.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def step(self, entry: dict[str, Any], shown: tuple[str, ...] = ("loss",)) -> None:
        """One step's numbers, its own under "step"; the bar shows those that are named."""
        entry = {name: finite(value) for name, value in entry.items()}
        self.steps.write(entry)
        if self.tensorboard:
            self.tensorboard.write(entry)
        self.bar.set_postfix({name: short(entry[name]) for name in shown}, refresh=False)
        self.bar.update()

    def message(self, line: str, to=None) -> None:
        """A line for people, beside the bar; to stderr unless said otherwise."""
        self.bar.write(line, to or sys.stderr)

    def picture(self, step: int, name: str, image, caption: str | None = None) -> None:
        """A PIL image or a file's path, for wandb and TensorBoard."""
        self.steps.picture(step, name, image, caption)
        if self.tensorboard:
            self.tensorboard.picture(step, name, image)

    def numbers(self, step: int, numbers: dict[str, Any]) -> None:
        """More numbers of a step that was written, for wandb and TensorBoard."""
        self.steps.numbers(step, numbers)
        if self.tensorboard:
            self.tensorboard.write(numbers | {"step": step})

    def close(self) -> None:
        self.bar.close()
        self.steps.close()
        if self.tensorboard:
            self.tensorboard.close()


def finite(value):
    """null stands for what is not finite, which JSON has no word for."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def short(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"
