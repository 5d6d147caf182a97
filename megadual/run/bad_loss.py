"""A loss that can't be right: how it is noticed, and what is kept of its step."""

import contextlib
import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol

import torch.distributed as dist

from megadual.run.config import TrainConfig
from megadual.run.log import RunLog


class StepResult(Protocol):
    """What is looked at of a step: numbers that every rank has alike."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...


class Numbers(NamedTuple):
    """A StepResult of nothing else."""

    loss: float
    grad_norm: float


class LossWatch:
    """Says whether a step's loss can be right: finite, and no spike over the median of the steps before.

    The same on every rank, since a step's result is. The median starts anew with the process.
    """

    def __init__(self, train: TrainConfig):
        self.factor, self.skips, self.max_skipped = train.spike_factor, train.bad_loss == "skip", train.max_skipped
        self.losses: deque[float] = deque(maxlen=train.spike_window)
        self.complaint: str | None = None  # about the last step
        self.in_a_row = 0  # bad steps

    def approve(self, result: StepResult) -> bool:
        """Whether the step is right; `complaint` says what is not."""
        self.complaint = self._complaint(result)
        self.in_a_row = self.in_a_row + 1 if self.complaint else 0
        if not self.complaint:
            self.losses.append(result.loss)
        return not self.complaint

    @property
    def stops(self) -> bool:
        """Whether training ends at the last step, which is a bad one."""
        return not self.skips or self.in_a_row >= self.max_skipped

    def report(self, folder: Path, step: int, keys: list[str], log: RunLog | None) -> None:
        """Note the bad step and its documents, of which this rank had `keys`, in bad_steps.jsonl (collective)."""
        keys = _all_keys(keys)
        if log:
            line = {"step": step, "complaint": self.complaint, "skipped": self.skips, "documents": keys}
            with contextlib.suppress(OSError), open(folder / "bad_steps.jsonl", "a") as file:  # a full disk: it is told
                file.write(json.dumps(line) + "\n")
            level = "error" if self.stops else "warning: skipped"
            log.message(f"{level}: step {step}: {self.complaint}; its documents: {', '.join(keys)}")

    def _complaint(self, result: StepResult) -> str | None:
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            return f"loss {result.loss}, gradient norm {result.grad_norm}"
        if self.factor and len(self.losses) == self.losses.maxlen:
            usual = statistics.median(self.losses)
            if result.loss > self.factor * usual:
                return f"loss {result.loss:.4g} is over {self.factor} x {usual:.4g}, the median before it"
        return None


def _all_keys(keys: list[str]) -> list[str]:
    """The documents of a step on all ranks, each once (collective)."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, keys)
    return sorted({key for some in gathered for key in some})
