"""Checkpoints of a pretraining run: sharded, atomic, loadable under another layout.

RUN/checkpoints/00000100/ holds megatron-core's torch_dist shards and the run's config.yaml; RUN/checkpoints/latest
names the newest complete one and moves only after every rank has written.
"""

import os
import queue
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megadual.config import PretrainConfig, load_config, to_yaml
from megadual.engine.megatron import MegatronEngine
from megadual.errors import UserError

LATEST = "latest"
CONFIG = "config.yaml"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}


def _keep_step_out_of_sharded_state() -> None:
    """Let DistributedOptimizer load into torch's AdamW, which keeps `step` as a tensor in its state.

    megatron-core expects only the sharded tensors there and fails on `step`; it is common to all parameters
    and set from the common state.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "_keeps_step_out", False):
        return

    def without_step(self, parameter, tensors):
        group, index = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        step = state.pop("step", None)
        original(self, parameter, tensors)
        if step is not None:
            state["step"] = step

    without_step._keeps_step_out = True
    DistributedOptimizer._set_main_param_and_optimizer_states = without_step


def _uses_torch_optimizer() -> bool:
    return distrib_optimizer.Adam.__module__.startswith("torch.")


def _sharded_state(engine: MegatronEngine, is_loading: bool) -> dict:
    names = ["model"] if len(engine.chunks) == 1 else [f"model{i}" for i in range(len(engine.chunks))]
    model = {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in zip(names, engine.chunks)}
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA))
    return {**model, "optimizer": optimizer}


class Checkpointer:
    """Writes and reads a run's checkpoints."""

    def __init__(self, run: PretrainConfig):
        self.run = run
        self.folder = Path(run.run.dir) / "checkpoints"

    def save(self, engine: MegatronEngine, step: int) -> Path:
        """Write the state after `step` optimizer steps; every rank calls it. Prunes the oldest checkpoints."""
        # megatron-core otherwise starts a manager process on every rank only to hold this queue.
        filesystem_async._results_queue = queue.Queue()
        final = self.folder / f"{step:08d}"
        partial = self.folder / f".partial-{step:08d}"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = _sharded_state(engine, is_loading=False)
        state |= {"scheduler": engine.scheduler.state_dict(), "progress": {"step": step}}
        dist_checkpointing.save(state, str(partial), sharded_strategy=("torch_dist", 1))
        dist.barrier()
        if dist.get_rank() == 0:
            (partial / CONFIG).write_text(to_yaml(self.run))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            pointer = self.folder / f".{LATEST}"
            pointer.write_text(final.name)
            os.replace(pointer, self.folder / LATEST)
            self._prune(final)
        dist.barrier()
        return final

    def _prune(self, newest: Path) -> None:
        complete = sorted(p for p in self.folder.iterdir() if p.name.isdigit())
        for old in complete[: -self.run.checkpoint.keep]:
            if old != newest:
                shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None where the run has none."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def load(self, engine: MegatronEngine, checkpoint: Path) -> int:
        """Fill the engine from a checkpoint of any layout; returns the number of steps it had done."""
        if _uses_torch_optimizer():
            _keep_step_out_of_sharded_state()
            for optimizer in engine.optimizer.chained_optimizers:
                optimizer._init_optimizer_states_with_dummy_values()
        state = _sharded_state(engine, is_loading=True)
        state = dist_checkpointing.load(state | {"scheduler": None, "progress": None}, str(checkpoint))
        for index, chunk in enumerate(engine.chunks):
            chunk.load_state_dict(state["model" if len(engine.chunks) == 1 else f"model{index}"])
        with torch.no_grad():
            engine.optimizer.load_state_dict(state["optimizer"])
        for optimizer in engine.optimizer.chained_optimizers:
            for moments in optimizer.optimizer.state.values():
                if torch.is_tensor(moments.get("step")):
                    # The loaded state shares one step tensor, which AdamW would advance once per parameter.
                    moments["step"] = moments["step"].clone()
        engine.scheduler.load_state_dict(state["scheduler"])
        return state["progress"]["step"]


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


def load_full_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's full, unsharded tensors by their global names, read in one process without a GPU."""
    metadata = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(str(checkpoint)), no_dist=True)
    return state
