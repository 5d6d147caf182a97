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
from megadual.engine.staging import Staging, size_of
from megadual.model.dual_lm import DualLM
from megadual.run.tensor_files import TensorFiles

# Prefix of a checkpoint's entry -> what it is of a parameter's optimizer state: its fp32 copy, or a moment.
ADAMW_STATE, MUON_STATE = (
    {sharded.STATE.format(key): key for key in ("param", *moments)} for moments in (sharded.MOMENTS, sharded.MOMENTUM)
)
LOADED_AT_ONCE = 1 << 26  # parameters whose state is on the host at a time


class SavedState(ABC):
    """An engine's part that saves and loads.

    Data-parallel ranks hold a parameter's optimizer state together, and under ZeRO-3 the parameter too. Each
    parameter is made whole on one of them, which writes it: so a rank has 1 / ranks of the checkpoint on its host,
    and all of them write. The same one reads it for all, a part of the parameters at a time.
    """

    chunks: list[DualLM]
    scheduler: OptimizerParamScheduler
    _staging: Staging | None = None

    @abstractmethod
    def _whole(self, parameter: torch.nn.Parameter, owner: int) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(entry's prefix, tensor) of a parameter and of its `_state`, each as it is until the next is asked for.

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

    def prepare_to_save(self) -> None:
        """Begin to make the host memory that `save` copies to, which takes a while and runs beside everything else."""
        if self._staging is None:
            rank = dist.get_rank(data_parallel_group())
            mine = [name for name, owner in self._owners().items() if owner == rank]
            self._staging = Staging(self._size(mine))

    def save(self, folder: Path) -> sharded.ShardedWrite:
        """Weights, fp32 weights and moments on their way to `folder`; every rank calls it.

        They are copied, so training can go on, but the last `save` must have been written; buffers are constant.
        """
        self.prepare_to_save()
        self._staging.reset()
        state = {"buffers": self.buffers}
        for name, owner in self._owners().items():
            for prefix, tensor in self._whole(self.parameters[name], owner):
                if tensor is not None:
                    state.setdefault(name, []).append(self._entry(name, prefix, self._staging.copy(tensor)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return sharded.ShardedWrite(state, folder)

    def load(self, folder: Path, step: int, updates: int) -> None:
        """Fill from what either engine's `save` wrote under any layout after `step` steps.

        UserError where that is of another model.
        """
        files = TensorFiles(folder)
        entries = [self._entry(name, prefix, like) for name in self.parameters for prefix, like in self._like(name)]
        sharded.check_fits(entries, self.constants, files)
        total = sum(math.prod(shape) for shape in self.shapes.values())
        count = torch.tensor([total // LOADED_AT_ONCE + 1], device=torch.cuda.current_device())
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        group, owners = data_parallel_group(), self._owners()
        rank, names = dist.get_rank(group), list(self.parameters)
        parts = [names[part :: count.item()] for part in range(count.item())]
        mine = [[name for name in part if owners[name] == rank] for part in parts]
        staging = Staging(max(map(self._size, mine)))
        for part, own in zip(parts, mine, strict=True):
            staging.reset()
            entries = {
                name: {
                    prefix: self._entry(name, prefix, staging.empty(like.shape, like.dtype))
                    for prefix, like in self._like(name)
                }
                for name in own
            }
            loaded = sharded.read(entries, files)
            for name in part:
                parameter, read = self.parameters[name], loaded.get(name)
                for prefix, like in self._like(name):
                    tensor = read.pop(prefix) if read else torch.empty_like(like, device=parameter.device)
                    if group.size() > 1:
                        tensor = tensor.to(parameter.device)
                        dist.broadcast(tensor, dist.get_global_rank(group, owners[name]), group=group)
                    with torch.no_grad():
                        self._fill(parameter, prefix, tensor)
        staging.close()
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

    def _like(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """What `_whole` gives of a parameter, without its numbers."""
        shape, parameter = self.shapes[name], self.parameters[name]
        yield "", torch.empty(shape, dtype=parameter.dtype, device="meta")
        for prefix in self._state(parameter):
            yield prefix, torch.empty(shape, device="meta")

    def _size(self, names: list[str]) -> int:
        """Bytes of host memory that parameters take with their state."""
        return sum(size_of(like.shape, like.dtype) for name in names for _, like in self._like(name))


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks with the same parameters."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
