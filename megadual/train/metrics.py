"""What pretraining writes about its steps."""

import dataclasses
from typing import TYPE_CHECKING

from megadual.run.log import RunLog
from megadual.train.config import PretrainConfig

if TYPE_CHECKING:  # metrics are read without torch
    from megadual.engine.step import StepResult

LOSS = "loss_"  # of the text or a stream: this and its name


class MetricsLog(RunLog):
    def __init__(self, run: PretrainConfig, start_step: int):
        super().__init__(run.run, run, run.train.steps, start_step)

    def step(self, entry: dict) -> None:
        super().step(entry, tuple(name for name in entry if name.startswith(LOSS)))


def entry_of(step: int, result: "StepResult", **more) -> dict:
    """One line of metrics.jsonl."""
    return {"step": step, **numbers_of(result), **more}


def numbers_of(result: "StepResult") -> dict:
    """A step's numbers by their names in metrics: `loss_NAME` for the text and each stream, `depth_STREAM` (D,)."""
    numbers = {}
    for name, value in dataclasses.asdict(result).items():
        match name:
            case "losses":
                numbers |= {f"{LOSS}{of}": loss for of, loss in value.items()}
            case "depth_losses":
                numbers |= {f"depth_{of}": losses for of, losses in value.items()}
            case _:
                numbers[name] = value
    return numbers
