"""What pretraining writes about its steps: metrics.jsonl, wandb and a progress bar, all from rank 0."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from tqdm import tqdm

from megadual.config import PretrainConfig
from megadual.run.record import read_starts
from megadual.run.step_log import StepLog

if TYPE_CHECKING:  # megadual.runs reads metrics without torch
    from megadual.engine.step import StepResult


class MetricsLog:
    """The run's StepLog, and a progress bar."""

    def __init__(self, run: PretrainConfig, start_step: int):
        folder, of_run = Path(run.run.dir), run.run
        starts = {f"start_{number}": start for number, start in enumerate(read_starts(folder), 1)}
        config = OmegaConf.to_container(OmegaConf.structured(run)) | starts
        self.steps = StepLog(folder, start_step, of_run.wandb, of_run.wandb_project, of_run.name, config)
        self.bar = tqdm(
            total=run.train.steps,
            initial=start_step,
            desc="pretrain",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def step(self, entry: dict) -> None:
        self.steps.write(entry)
        self.bar.set_postfix({name: _short(loss) for name, loss in mean_losses(entry).items()}, refresh=False)
        self.bar.update()

    def picture(self, step: int, path: Path | None) -> None:
        """Show what was drawn, if anything was; anything but a picture tells why it was not."""
        if path is None:
            return
        if path.suffix != ".png":
            self.bar.write(f"warning: no samples were drawn: see {path}", sys.stderr)
        else:
            self.steps.picture(step, "samples", str(path), caption=f"step {int(path.stem)}")

    def close(self) -> None:
        self.bar.close()
        self.steps.close()


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def entry_of(step: int, result: "StepResult", **more) -> dict:
    """One line of metrics.jsonl; null stands for what is not finite, which JSON has no word for."""
    return {name: _finite(value) for name, value in {"step": step, **numbers_of(result), **more}.items()}


def numbers_of(result: "StepResult") -> dict:
    """A step's numbers by their names in metrics: `loss_NAME` for the text and each stream, `depth_STREAM` (D,)."""
    numbers = {}
    for name, value in dataclasses.asdict(result).items():
        match name:
            case "losses":
                numbers |= {f"loss_{of}": loss for of, loss in value.items()}
            case "depth_losses":
                numbers |= {f"depth_{of}": losses for of, losses in value.items()}
            case _:
                numbers[name] = value
    return numbers


def mean_losses(entry: dict) -> dict[str, float | None]:
    """Those of the text and each stream in a line of metrics.jsonl, by name."""
    return {name.removeprefix("loss_"): value for name, value in entry.items() if name.startswith("loss_")}


def _finite(value):
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
