"""The steps of this package's trainings: from the latest checkpoint to the last step, logged, saved and stopped."""

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from megadual.errors import UserError
from megadual.run import exits
from megadual.run.bad_loss import LossWatch, Numbers, StepResult
from megadual.run.checkpoints import CheckpointFolder, verify
from megadual.run.config import CheckpointConfig, RunConfig, TrainConfig
from megadual.run.hooks import Hook
from megadual.run.log import RunLog
from megadual.run.profiler import Profiler
from megadual.run.ranks import Ranks
from megadual.run.session import Session

from .data import Batch, DataConfig, TrainingImages, training_batches

STATE = "state.pt"


class Config(Protocol):
    """The sections that a training of this package has; the model has an image_size."""

    model: Any
    data: DataConfig
    train: TrainConfig
    run: RunConfig
    checkpoint: CheckpointConfig


class Trainer(ABC):
    """What `fit` trains. A checkpoint holds all of its state, so a resumed run goes on as if it had not stopped."""

    parts: dict[str, Any]  # with state_dict and load_state_dict: modules, which may be in DDP, and optimizers

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.steps_done = 0
        self.data_state: dict[str, Any] = {"batches": 0, "positions": {}}  # of TrainingImages
        self.keys: list[str] = []  # of the samples of the last step on this rank

    def open_data(self) -> None:
        """Begin reading where `data_state` stands."""
        config, ranks = self.config, self.ranks
        size, seed = config.model.image_size, config.train.seed
        self.batches = training_batches(
            TrainingImages(config.data, size, seed, ranks.rank, ranks.size, self.data_state)
        )

    def next_batch(self) -> Batch:
        batch = next(self.batches)
        self.keys += batch.keys
        self.data_state["batches"] += 1
        self.data_state["positions"][str(batch.stream)] = batch.position
        return batch

    @abstractmethod
    def step(self, approve: Callable[[StepResult], bool] | None = None) -> dict[str, float]:
        """One optimizer step; returns its metrics, "loss" and "grad_norm" among them, equal on all ranks.

        A step that `approve` refuses changes no weight.
        """

    def is_finite(self) -> bool:
        """Whether weights and codebooks are numbers: the last update may have left none."""
        modules = (part for part in self.parts.values() if isinstance(part, nn.Module))
        return all(bool(x.isfinite().all()) for module in modules for x in module.state_dict().values())

    def save(self, files: CheckpointFolder) -> None:
        """Write the state after `steps_done` steps (collective)."""
        ranks = self.ranks.gather({**self.data_state, "rng": torch.get_rng_state()})
        state = {"step": self.steps_done, "ranks": ranks}

        def write(folder: Path) -> None:
            with open(folder / STATE, "wb") as file:
                torch.save(state | {name: part.state_dict() for name, part in self.parts.items()}, file)
                file.flush()
                os.fsync(file.fileno())

        files.write(self.steps_done, write)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint (collective); UserError where it is damaged or does not fit this run."""
        verify(checkpoint, (STATE,))
        try:
            state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            ranks, step = state["ranks"], state["step"]
        except Exception as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # of torch's, the second says what
            raise UserError(
                f"checkpoint '{checkpoint}' does not fit this run ({reason}); give another run.dir"
            ) from error
        if len(ranks) != self.ranks.size:
            raise UserError(f"checkpoint '{checkpoint}' is of {len(ranks)} ranks, this run has {self.ranks.size}")
        mine = ranks[self.ranks.rank]
        torch.set_rng_state(mine["rng"])
        self.data_state = {"batches": mine["batches"], "positions": mine["positions"]}
        self.steps_done = step


def judged(metrics: dict[str, float]) -> StepResult:
    """What says whether a step was right; a metric that is not finite is as bad as such a gradient."""
    finite = all(map(math.isfinite, metrics.values()))
    return Numbers(metrics["loss"], metrics["grad_norm"] if finite else math.nan)


def fit(
    config: Config, trainer: Trainer, session: Session, at_checkpoint: Callable[[RunLog], None] = lambda log: None
) -> dict[str, float]:
    """Train to `train.steps`; returns the last step's metrics, none where all steps were done before.

    `at_checkpoint` is called on rank 0 after each; a disk that fails it ends nothing. Exits with exits.STOPPED after a
    signal (StopSignal), once a checkpoint is written, and with exits.BAD_LOSS where a step's loss is not finite or
    spikes and is not to be skipped, or too many were.
    """
    files = CheckpointFolder(session.folder, config.checkpoint.keep)
    latest = files.to_resume() if config.checkpoint.resume else None
    if latest:
        trainer.load(latest)
    trainer.open_data()
    session.beat()
    steps, metrics, watch = config.train.steps, {}, LossWatch(config.train)
    log = RunLog(config.run, config, steps, trainer.steps_done) if session.ranks.main else None
    hooks: list[Hook] = []
    if log and config.run.profile:
        hooks.append(Profiler(session.folder / "profile", *config.run.profile))
    if log and latest:
        log.message(f"resumed from {latest}", sys.stdout)

    def end(code: int | None = None) -> None:
        for hook in hooks:
            hook.at_end(finished=code is None)
        if log:
            log.close()
        if code is not None:
            sys.exit(code)

    while trainer.steps_done < steps:
        for hook in hooks:
            hook.before_step(trainer.steps_done + 1)
        metrics = trainer.step(watch.approve if watch.skips else None)
        step = trainer.steps_done
        session.beat()
        entry = {"step": step} | {name: float(f"{value:.6g}") for name, value in metrics.items()}
        for hook in hooks:
            hook.after_step(step, entry)
        if log:
            log.step(entry)
        if not watch.skips:
            watch.approve(judged(metrics))
        if watch.complaint:
            watch.report(session.folder, step, trainer.keys, log)
            if watch.stops:
                end(exits.BAD_LOSS)
        stopping = session.stop.agreed()
        if stopping or config.checkpoint.due(step, steps):
            if not trainer.is_finite():  # alike on all ranks
                if log:
                    log.message(f"error: step {step} has left weights that are no numbers; no checkpoint is made of it")
                end(exits.BAD_LOSS)
            trainer.save(files)
            session.beat()
            if log:
                try:
                    at_checkpoint(log)
                except OSError as error:
                    log.message(f"warning: checkpoint {step} has no picture: {error}")
        if stopping and step < steps:
            if log:
                log.message(f"stopped by a signal after step {step}; start again to go on", sys.stdout)
            end(exits.STOPPED)
    end()
    return metrics
