"""What an engine is to the loop, to checkpoints and to tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megadual.data.dataset import MicroBatch
from megadual.engine.sharded import ShardedWrite
from megadual.engine.step import StepResult
from megadual.model.dual_lm import DualLM


class Engine(Protocol):
    """The model, its optimizer and its schedule over the ranks of a layout. Every rank calls its methods together."""

    # This rank's part of the model, first to last; after a step, some weights may be older until the next needs them.
    chunks: list[DualLM]
    data_rank: int  # which part of each step's rows this rank reads

    def train_step(self, batches: list[MicroBatch], approve: Callable[[StepResult], bool] | None = None) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Where `approve` says no to the step's losses and gradient norm, weights and optimizer stay as they were; the
        schedule goes on. An engine that can't do that takes None alone.
        """

    def evaluate(self, batches: list[MicroBatch]) -> dict[str, float]:
        """The mean losses of the text and of each stream, by name, over all ranks' micro-batches, without training.

        Equal on every rank, whatever the layout. All ranks have equally many micro-batches.
        """

    @property
    def updates(self) -> int:
        """Optimizer steps taken, equal on every rank (collective); steps that were skipped don't count."""

    def prepare_to_save(self) -> None:
        """Set host memory aside for `save`, in the background; else the first one does it."""

    def save(self, folder: Path) -> ShardedWrite:
        """The state on its way to `folder`, as it is now, while training may go on.

        What the last one gave must have been written.
        """

    def load(self, folder: Path, step: int, updates: int) -> None:
        """Fill from what any engine's `save` wrote under any layout, after `step` steps and `updates` made."""

    def shutdown(self) -> None:
        """Give up the process groups; the default one stays."""
