"""Checkpoints of a pretraining run: sharded, atomic, loadable under another layout and by the other engine.

RUN/checkpoints/00000100/ (megadual/run/checkpoints.py) holds torch_dist shards (megadual/engine/sharded.py) and the
run's config.yaml.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException

from megadual.config import load_config, to_yaml
from megadual.engine.protocol import Engine
from megadual.engine.sharded import ShardedWrite
from megadual.errors import UserError
from megadual.run.checkpoints import LATEST, CheckpointFolder, seal, verify, what_failed
from megadual.run.ranks import Ranks
from megadual.train.config import PretrainConfig

CONFIG = "config.yaml"
PROGRESS = "progress.json"


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

        UserError names the files that are not what was written.
        """
        verify(checkpoint)
        progress = json.loads((checkpoint / PROGRESS).read_text())
        engine.load(checkpoint, progress["step"], progress["updates"])
        return progress


def _describe(folder: Path, run: PretrainConfig, progress: dict) -> None:
    (folder / CONFIG).write_text(to_yaml(run))
    (folder / PROGRESS).write_text(json.dumps(progress))


def seal_weights(folder: Path, run: PretrainConfig) -> None:
    """Make a checkpoint for `checkpoint.start` of a folder with torch.distributed.checkpoint's files of the weights.

    Their entries have the names that `hf.tensors.CheckpointTensors` gives. For tools: needs no process group.
    """
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    torch.save({}, folder / "common.pt")  # megatron-core before 0.17 looks for it
    seal(folder, {})
    _describe(folder, run, {"step": 0, "updates": 0})


def starting_weights(run: PretrainConfig) -> Path | None:
    """The checkpoint whose weights the run starts from; None to start from its own latest, or from its seed.

    Verified (collective).
    """
    if not run.checkpoint.start or Checkpointer(run).to_resume():
        return None
    checkpoint = resolve_checkpoint(run.checkpoint.start)
    verify(checkpoint)
    return checkpoint


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from itself, a run's folder, or its `checkpoints` folder (the latest one there)."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text().strip()
    if not (path / CONFIG).is_file() or not (path / ".metadata").is_file():
        raise UserError(f"'{path}' is not a checkpoint: expected RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    return path


def load_run_config(checkpoint: Path) -> PretrainConfig:
    """The resolved config that the checkpoint was written with."""
    return load_config(PretrainConfig, checkpoint / CONFIG)
