"""What both engines do alike to save and load: one parameter after another, with its optimizer state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megadual.engine import sharded
from megadual.model.dual_lm import DualLM
from megadual.run.tensor_files import TensorFiles

# Prefix of a checkpoint's entry -> what it is of a parameter's optimizer state: its fp32 copy, or a moment.
ADAMW_STATE, MUON_STATE = (
    {sharded.STATE.format(key): key for key in ("param", *moments)} for moments in (sharded.MOMENTS, sharded.MOMENTUM)
)
LOADED_AT_ONCE = 1 << 28  # parameters whose state is on the host at a time


class SavedState(ABC):
    """An engine's part that saves and loads.

    Data-parallel ranks hold a parameter's optimizer state together, and under ZeRO-3 the parameter too. Each
    parameter is made whole on one of them, which writes it: so a rank has 1 / ranks of the checkpoint on its host,
    and all of them write. The same one reads it for all, a part of the parameters at a time.
    """

    chunks: list[DualLM]
    scheduler: OptimizerParamScheduler

    @abstractmethod
    def _whole(self, parameter: torch.nn.Parameter, owner: int) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(entry's prefix, copy on the host) of a parameter and of its `_state`.

        None on other data-parallel ranks than `owner` (collective over them).
        """

    @abstractmethod
    def _fill(self, parameter: torch.nn.Parameter, prefix: str, tensor: torch.Tensor) -> None:
        """Put back one that `_whole` gave; every rank has it (collective over the data-parallel ranks)."""

    @abstractmethod
    def _inner_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer inside, None on a rank where nothing is trained."""

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, str]:
        """What is saved of a parameter's optimizer state, as in ADAMW_STATE; nothing where it is not trained."""
        return ADAMW_STATE if parameter.requires_grad else {}

    def _describe(self) -> None:
        """Note the parameters and where they lie in the whole model, while they are whole (ZeRO-3 splits them)."""
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.entries, self.shapes, self.buffers = {}, {}, {}
        self.constants: list = []  # the buffers' entries, under each name that another layout may give them
        for i, chunk in enumerate(self.chunks):
            entries, buffers = sharded.named_entries(chunk)
            for name, parameter in chunk.named_parameters():
                key = f"{i}.{name}"
                self.parameters[key], self.entries[key] = parameter, entries[name]
                self.shapes[key] = parameter.shape
            self.buffers |= {f"{i}.{name}": buffers[name] for name, _ in chunk.named_buffers() if name in buffers}
            self.constants += buffers.values()

    @property
    def updates(self) -> int:
        made = sharded.updates(self._inner_optimizer()) if self._inner_optimizer() else 0
        updates = torch.tensor([made], device=torch.cuda.current_device())
        dist.all_reduce(updates, op=dist.ReduceOp.MAX)  # a stage without trained parts has made none
        return int(updates.item())

    def save(self, folder: Path) -> sharded.ShardedWrite:
        """Weights, fp32 weights and moments on their way to `folder`; every rank calls it.

        They are copied, so training can go on; buffers are constant.
        """
        rank, state = dist.get_rank(data_parallel_group()), {"buffers": self.buffers}
        for name, owner in self._owners().items():
            whole = list(self._whole(self.parameters[name], owner))
            if owner == rank:
                state[name] = [self._entry(name, prefix, tensor) for prefix, tensor in whole]
        return sharded.ShardedWrite(state, folder)

    def load(self, folder: Path, step: int, updates: int) -> None:
        """Fill from what either engine's `save` wrote under any layout after `step` steps.

        UserError where that is of another model.
        """
        files = TensorFiles(folder)
        entries = [
            self._entry(name, prefix, tensor.to("meta"))
            for name in self.parameters
            for prefix, tensor in self._empty(name)
        ]
        sharded.check_fits(entries, self.constants, files)
        total = sum(math.prod(shape) for shape in self.shapes.values())
        parts = torch.tensor([total // LOADED_AT_ONCE + 1], device=torch.cuda.current_device())
        dist.all_reduce(parts, op=dist.ReduceOp.MAX)
        group, owners = data_parallel_group(), self._owners()
        for part in range(parts.item()):
            names = list(self.parameters)[part :: parts.item()]
            mine = [name for name in names if owners[name] == dist.get_rank(group)]
            entries = {
                name: {prefix: self._entry(name, prefix, tensor) for prefix, tensor in self._empty(name)}
                for name in mine
            }
            loaded = sharded.read(entries, files)
            for name in names:
                parameter, read = self.parameters[name], loaded.get(name)
                for prefix, empty in self._empty(name):
                    tensor = read.pop(prefix) if read else torch.empty_like(empty, device=parameter.device)
                    if group.size() > 1:
                        tensor = tensor.to(parameter.device)
                        dist.broadcast(tensor, dist.get_global_rank(group, owners[name]), group=group)
                    with torch.no_grad():
                        self._fill(parameter, prefix, tensor)
        if self._inner_optimizer():
            sharded.set_updates(self._inner_optimizer(), updates)
        self.scheduler.step(increment=step)

    def _owners(self) -> dict[str, int]:
        """The data-parallel rank that writes each parameter, so that all have about as much."""
        loads, owners = [0] * data_parallel_group().size(), {}
        for name in sorted(self.shapes, key=lambda name: -math.prod(self.shapes[name])):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += math.prod(self.shapes[name])
        return owners

    def _entry(self, name: str, prefix: str, tensor: torch.Tensor):
        """A sharded state's entry for all of a parameter or its optimizer state, which this data-parallel rank has."""
        entry = self.entries[name]
        values = {"key": prefix + entry.key, "data": tensor, "replica_id": (*entry.replica_id[:-1], 0)}
        if hasattr(entry, "dtype"):
            values["dtype"] = tensor.dtype
        return replace(entry, **values)

    def _empty(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What `_whole` gives of a parameter, not filled."""
        shape, parameter = self.shapes[name], self.parameters[name]
        yield "", torch.empty(shape, dtype=parameter.dtype)
        for prefix in self._state(parameter):
            yield prefix, torch.empty(shape)


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks with the same parameters."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
