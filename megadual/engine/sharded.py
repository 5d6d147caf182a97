"""Sharded state on disk, the same for both engines and every layout: torch_dist files, written by megatron-core.

Entries have the names of the whole model: `decoder.layers.3.mlp.linear_fc2.weight` is a weight, and with
`optimizer.state.` and `param`, `exp_avg` or `exp_avg_sq` before it, its fp32 copy or one of AdamW's moments; a matrix
that Muon trains has `momentum` in their place.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megadual.engine import megatron_internals
from megadual.engine.staging import same_device
from megadual.errors import UserError
from megadual.run.checkpoints import checksum
from megadual.run.ranks import Ranks
from megadual.run.tensor_files import TensorFiles

METADATA = {"non_homogeneous_layers": True}
STATE = "optimizer.state.{}."  # of an optimizer state's entries
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
MOMENTUM = ("momentum",)  # Muon's
READERS = 4  # threads


class ShardedWrite:
    """One checkpoint's files on their way to disk, in three steps.

    Making it plans the files and brings this rank's tensors to the host (collective); `write` writes them, in any
    thread, while training goes on; `finish` completes the checkpoint once all ranks have written (collective).
    """

    def __init__(self, state: dict, folder: Path):
        """Tensors of `state` that are on the host already are not copied and must not change until `write` has run."""
        self._save = megatron_internals.Save(state, folder)
        self.files = self._save.files
        self.checksums: dict[str, str] = {}

    def write(self) -> None:
        """Write this rank's files and note their checksums. OSError where the disk refuses."""
        for i, (path, *_) in enumerate(self.files):
            self._save.write(i)
            self.checksums[Path(path).name] = checksum(path)

    def finish(self) -> None:
        """Write the index of all ranks' files (collective)."""
        self._save.finish()


def read(state: dict, files: TensorFiles) -> dict:
    """`state` with its sharded tensors filled from `files`, by each rank for itself."""
    with ThreadPoolExecutor(READERS, initializer=same_device()) as pool:
        return dict(zip(state, pool.map(lambda entry: _filled(entry, files), state.values()), strict=True))


def _filled(entry, files: TensorFiles):
    if isinstance(entry, dict):
        return {name: _filled(part, files) for name, part in entry.items()}
    if isinstance(entry, ShardedTensorFactory):
        for part in nested_values(entry.build()):  # of its tensor, of which they are views
            _read_into(part, files)
        return entry.data
    _read_into(entry, files)
    return entry.data


def _read_into(entry: ShardedTensor, files: TensorFiles) -> None:
    assert not entry.prepend_axis_num and entry.flattened_range is None, entry.key
    files.read(entry.key, entry.global_offset, entry.data)


def check_fits(entries: list, buffers: list, files: TensorFiles) -> None:
    """UserError names tensors that the checkpoint has and the model has not, the other way round, or in another size.

    `entries` are what this rank reads, `buffers` what is of the model but not read (collective).
    """
    read: dict[str, tuple[int, ...]] = {}
    model: dict[str, tuple[int, ...]] = {}
    for of_rank, held in Ranks.current().gather((_sizes(entries), _sizes(buffers))):
        read |= of_rank
        model |= of_rank | held
    stored = files.sizes
    faults = [
        f"{name} is {stored.get(name, 'missing')}, the run's is {model.get(name, 'missing')}"
        for name in sorted(read.keys() | files.weights)
        if stored.get(name) != model.get(name)
    ]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"checkpoint '{files.folder}' does not fit the run's model: {'; '.join(faults[:4])}{more}")


def _sizes(entries: list) -> dict[str, tuple[int, ...]]:
    """Of the whole tensors that entries are parts of."""
    parts = [nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry] for entry in entries]
    return {part.key: tuple(part.global_shape) for each in parts for part in each}


@torch.no_grad()
def load_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    """Fill the parameters of this rank's model chunks from a checkpoint of any layout and precision (collective).

    UserError as `check_fits` has it.
    """
    files, named = TensorFiles(folder), [named_entries(chunk) for chunk in chunks]
    wanted = [entry for entries, _ in named for entry in entries.values()]
    check_fits(wanted, [entry for _, buffers in named for entry in buffers.values()], files)
    for chunk, (entries, _) in zip(chunks, named, strict=True):
        parameters = dict(chunk.named_parameters())
        for name, tensor in read(entries, files).items():
            parameters[name].copy_(tensor)


def named_entries(chunk: torch.nn.Module) -> tuple[dict, dict]:
    """The entries of the chunk's parameters, and of its buffers by all of their names, by local name."""
    state = chunk.sharded_state_dict(metadata=dict(METADATA))
    buffers = {name: state[name] for name, _ in chunk.named_buffers(remove_duplicate=False) if name in state}
    return {name: state[name] for name, _ in chunk.named_parameters()}, buffers


def hold_moments(
    optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], names: tuple[str, ...] = MOMENTS
) -> None:
    """Give the optimizer the state that AdamW makes at its first step, so that it can be saved and loaded before.

    Parameters that have one keep it.
    """
    for parameter in parameters:
        if parameter.numel() and not optimizer.state[parameter]:
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
            if is_torchs(optimizer):
                optimizer.state[parameter]["step"] = _step(optimizer, parameter, 0)


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set how many updates the optimizer has made."""
    if not is_torchs(optimizer):
        for group in optimizer.param_groups:
            group["step"] = updates
        return
    for parameter, state in optimizer.state.items():
        state["step"] = _step(optimizer, parameter, updates)


def updates(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the optimizer has made."""
    counted = next(iter(optimizer.state.values())) if is_torchs(optimizer) else optimizer.param_groups[0]
    return int(counted.get("step", 0))


def is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's AdamW, which counts updates by parameter; Apex's counts by group of parameters."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)


def _step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, updates: int) -> torch.Tensor:
    """torch's AdamW's count, where its kernel reads it."""
    fused = optimizer.param_groups[0].get("fused")
    return torch.tensor(float(updates), device=parameter.device if fused else "cpu")
