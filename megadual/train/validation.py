"""The losses on documents that are held out, as training goes on."""

from typing import Any

from megadual.data.dataset import PackedDataset
from megadual.engine.protocol import Engine
from megadual.engine.step import loss_weights
from megadual.model.dual_lm import Vocabulary
from megadual.run.hooks import Hook
from megadual.train.config import PretrainConfig
from megadual.train.metrics import LOSS

HELD_OUT = "val_"  # before the names of the losses
SEED = 0  # of the held-out rows and their images' directions: those of all runs


class Validation(Hook):
    """Adds the mean losses on `data`'s first step to those steps' numbers that `data.validation_every` says.

    They are `val_loss_NAME` of the text and each stream and `val_loss`, weighted as the training's. On every rank.
    """

    def __init__(self, run: PretrainConfig, engine: Engine, data: PackedDataset, vocabulary: Vocabulary):
        self.engine, self.data, self.weights = engine, data, loss_weights(run, vocabulary)
        self.every, self.last = run.data.validation_every, run.train.steps

    def after_step(self, step: int, entry: dict[str, Any]) -> None:
        if step == self.last or self.every and step % self.every == 0:
            entry |= self.losses()

    def losses(self) -> dict[str, float]:
        """The losses now, by their names in metrics (collective)."""
        losses = self.engine.evaluate(self.data.step(0))
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        return {f"{HELD_OUT}loss": total, **{f"{HELD_OUT}{LOSS}{name}": loss for name, loss in losses.items()}}
