"""Checkpoints of a pretraining run: sharded, atomic, loadable under another layout and by the other engine.

RUN/checkpoints/00000100/ (megadual/run/checkpoints.py) holds torch_dist shards (megadual/engine/sharded.py) and the
run's config.yaml.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from megadual.config import load_config, to_yaml
from megadual.data.packing import is_position
from megadual.engine.protocol import Engine
from megadual.engine.sharded import ShardedWrite
from megadual.errors import UserError
from megadual.model.config import HeadConfig
from megadual.run.checkpoints import LATEST, CheckpointFolder, pointed, seal, verify, what_failed
from megadual.run.ranks import Ranks
from megadual.run.tensor_files import INDEX
from megadual.train.config import PretrainConfig

CONFIG = "config.yaml"
PROGRESS = "progress.json"
NEEDED = (INDEX, CONFIG, PROGRESS)
# Keys of the model that shapes, and what tensors of a shape mean, depend on.
SHAPE = ("layers", "hidden", "ffn", "heads", "kv_heads", "tie_embeddings")
SHAPE += tuple(f"head.{field.name}" for field in dataclasses.fields(HeadConfig))


class _Saving(threading.Thread):
    """One checkpoint on its way to disk."""

    def __init__(self, write: ShardedWrite, step: int, progress: dict):
        super().__init__(name="checkpoint", daemon=True)
        self.write, self.step, self.progress = write, step, progress
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.write.write()
        except Exception as error:  # whatever it is, every rank has to hear of it
            self.error = error


class Checkpointer(CheckpointFolder):
    """Writes and reads a run's checkpoints. Every rank calls its methods, `clean` and `latest` excepted."""

    def __init__(self, run: PretrainConfig, completed: Callable[[Path], None] = lambda checkpoint: None):
        """`completed` is called with each checkpoint that is whole, on rank 0."""
        super().__init__(Path(run.run.dir), run.checkpoint.keep)
        self.run, self.completed = run, completed
        self.saving: _Saving | None = None

    def save(self, engine: Engine, step: int, data: dict | None = None) -> None:
        """Write the state after `step` steps, with `checkpoint.background` while training goes on.

        `data` is the data's position then, of rank 0.

        `poll` and `finish` complete it and prune the oldest ones. UserError on every rank where it can't be written,
        RuntimeError where that may pass (PASSING); `latest` is then as it was.
        """
        self.finish()
        self.begin(step)
        try:
            write = engine.save(self.partial(step))
        except OSError as error:
            raise self.unwritable(step, *what_failed(error)) from error
        self.saving = _Saving(write, step, {"step": step, "updates": engine.updates, "data": data})
        if self.run.checkpoint.background:
            self.saving.start()
        else:
            self.saving.run()
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their part."""
        if self.saving:
            busy = torch.tensor([float(self.saving.is_alive())], device=torch.cuda.current_device())
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
            if not busy.item():
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and complete it."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        if saving.is_alive():
            saving.join()
        ranks = Ranks.current()
        for rank, error in enumerate(ranks.gather(what_failed(saving.error) if saving.error else None)):
            if error:
                raise self.unwritable(saving.step, f"rank {rank}: {error[0]}", error[1])
        try:
            saving.write.finish()
        except (OSError, CheckpointException) as error:
            raise self.unwritable(saving.step, *what_failed(error)) from error
        checksums = {name: value for part in ranks.gather(saving.write.checksums) for name, value in part.items()}
        self.complete(saving.step, checksums, lambda folder: _describe(folder, self.run, saving.progress))
        if ranks.main:
            self.completed(self.final(saving.step))

    def to_resume(self) -> Path | None:
        """The checkpoint that the run goes on from (collective)."""
        return super().to_resume() if self.run.checkpoint.resume else None

    def load(self, engine: Engine, checkpoint: Path) -> dict:
        """Fill the engine from a checkpoint of any layout; returns the `step` it was made after and `data`.

        UserError names the files that are not what was written, and what does not fit the run's model or optimizer.
        """
        check(checkpoint)
        check_model(self.run, checkpoint)
        check_optimizer(self.run, checkpoint)
        progress = read_progress(checkpoint)
        engine.load(checkpoint, progress["step"], progress["updates"])
        return progress


def _describe(folder: Path, run: PretrainConfig, progress: dict) -> None:
    (folder / CONFIG).write_text(to_yaml(run))
    (folder / PROGRESS).write_text(json.dumps(progress))


def seal_weights(folder: Path, run: PretrainConfig) -> None:
    """Make a checkpoint for `checkpoint.start` of a folder with torch.distributed.checkpoint's files of the weights.

    Their entries have the names that `hf.tensors.CheckpointTensors` gives. All that is in the folder then belongs to
    it. For tools: needs no process group.
    """
    _describe(folder, run, {"step": 0, "updates": 0})
    seal(folder, {})


def starting_weights(run: PretrainConfig) -> Path | None:
    """The checkpoint whose weights the run starts from; None to start from its own latest, or from its seed.

    Verified, and of the run's model (collective).
    """
    if not run.checkpoint.start or Checkpointer(run).to_resume():
        return None
    checkpoint = resolve_checkpoint(run.checkpoint.start)
    check(checkpoint)
    check_model(run, checkpoint)
    return checkpoint


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from itself, a run's folder, or its `checkpoints` folder (the latest one there)."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if os.path.lexists(folder / LATEST):
            return pointed(folder)
    if not any((path / name).exists() for name in NEEDED):
        raise UserError(f"'{path}' is not a checkpoint: expected RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    return path


def check(checkpoint: Path) -> None:
    """UserError where a file of the checkpoint is not what was written, or it does not say its step (collective)."""
    verify(checkpoint, NEEDED)
    read_progress(checkpoint)


def load_run_config(checkpoint: Path) -> PretrainConfig:
    """The resolved config that the checkpoint was written with, once all of its files have been checked."""
    check(checkpoint)
    try:
        return load_config(PretrainConfig, checkpoint / CONFIG)
    except UserError as error:
        raise UserError(f"checkpoint '{checkpoint}': {CONFIG}: {error}") from error


def read_progress(checkpoint: Path) -> dict:
    """`step`, `updates` of the optimizer, and `data`, the data's position, where there is one."""
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text())
        if not all(type(progress[name]) is int and progress[name] >= 0 for name in ("step", "updates")):
            raise ValueError("step and updates must be counts")
        if progress["updates"] > progress["step"]:
            raise ValueError(f"{progress['updates']} updates in {progress['step']} steps")
        # Its folder's name, or 0 where it holds weights to start from.
        if checkpoint.name.isdecimal() and progress["step"] not in (int(checkpoint.name), 0):
            raise ValueError(f"step is {progress['step']}, its folder's another")
        if progress.get("data") is not None and not is_position(progress["data"]):
            raise ValueError("data is no position in rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{checkpoint / PROGRESS}' does not say how far training was: {error}") from error
    return progress


def check_model(run: PretrainConfig, checkpoint: Path) -> None:
    """UserError names the keys of the model's shape that the checkpoint's model has otherwise."""
    stored = _stored_section(checkpoint, "model")
    stored |= {f"head.{name}": value for name, value in stored["head"].items()}
    model = vars(run.model) | {f"head.{name}": value for name, value in vars(run.model.head).items()}
    if wrong := [name for name in SHAPE if name in stored and stored[name] != model[name]]:
        differ = "; ".join(f"model.{name} is {stored[name]}, the run's is {model[name]}" for name in wrong)
        raise UserError(f"checkpoint '{checkpoint}' does not fit the run's model: {differ}")


def check_optimizer(run: PretrainConfig, checkpoint: Path) -> None:
    """UserError where the checkpoint has the state of another optimizer than the run's."""
    stored = _stored_section(checkpoint, "train").get("optimizer", "adamw")  # the only one that there was
    if stored != run.train.optimizer:
        raise UserError(
            f"train.optimizer={run.train.optimizer} can't go on from checkpoint '{checkpoint}', which has the state of "
            f"{stored}: give train.optimizer={stored}, or a new run.dir and checkpoint.start={checkpoint}"
        )


def _stored_section(checkpoint: Path, section: str) -> dict:
    """A section of the config that the checkpoint was written with."""
    try:
        return dict(OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG))[section])
    except Exception as error:  # of YAML's reader, or of what lies in it
        raise UserError(f"'{checkpoint / CONFIG}' is not a run's config: {' '.join(str(error).split())}") from error
