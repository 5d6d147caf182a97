"""Sharded state on disk, the same for both engines and every layout: torch_dist files by megatron-core.

Entries have the names of the whole model: `decoder.layers.3.mlp.linear_fc2.weight` is a weight, and with
`optimizer.state.` and `param`, `exp_avg` or `exp_avg_sq` before it, its fp32 copy or one of AdamW's moments.
"""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megadual.engine import megatron_internals
from megadual.errors import UserError
from megadual.run.checkpoints import checksum

METADATA = {"non_homogeneous_layers": True}
STATE = "optimizer.state.{}."  # of an AdamW state's entries
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def read(state: dict, folder: Path) -> dict:
    """`state` with its sharded tensors read from `folder` (collective)."""
    return dist_checkpointing.load(state, str(folder))


@torch.no_grad()
def load_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    """Fill the parameters of this rank's model chunks from a checkpoint of any layout and precision (collective).

    UserError names the parameters that the checkpoint does not have, or has in another size.
    """
    wanted = [_parameters(chunk) for chunk in chunks]
    metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    sizes = {name: tuple(entry.size) for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    faults = [
        f"{part.key} is {sizes.get(part.key, 'missing')}, the run's is {tuple(part.global_shape)}"
        for entries in wanted
        for entry in entries.values()
        for part in nested_values(entry.build() if isinstance(entry, ShardedTensorFactory) else [entry])
        if sizes.get(part.key) != tuple(part.global_shape)
    ]
    if faults:
        raise UserError(f"checkpoint '{folder}' does not fit the run's model: {'; '.join(faults[:4])}")
    loaded = read({str(i): entries for i, entries in enumerate(wanted)}, folder)
    for i, chunk in enumerate(chunks):
        parameters = dict(chunk.named_parameters())
        for name, tensor in loaded[str(i)].items():
            parameters[name].copy_(tensor)


def _parameters(chunk: torch.nn.Module) -> dict:
    """The chunk's parameters by local name, as entries of a sharded state."""
    state = chunk.sharded_state_dict(metadata=dict(METADATA))
    return {name: state[name] for name, _ in chunk.named_parameters()}


def hold_moments(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    """Give AdamW the state that it makes at its first step, so that it can be saved and loaded before."""
    for parameter in parameters:
        if parameter.numel() and not optimizer.state[parameter]:
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
            if is_torchs(optimizer):
                optimizer.state[parameter]["step"] = _step(optimizer, parameter, 0)


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set how many updates AdamW has made."""
    if not is_torchs(optimizer):
        for group in optimizer.param_groups:
            group["step"] = updates
        return
    for parameter, state in optimizer.state.items():
        state["step"] = _step(optimizer, parameter, updates)


def updates(optimizer: torch.optim.Optimizer) -> int:
    """How many updates AdamW has made."""
    counted = next(iter(optimizer.state.values())) if is_torchs(optimizer) else optimizer.param_groups[0]
    return int(counted.get("step", 0))


def is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's AdamW, which counts updates by parameter; Apex's counts by group of parameters."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)


def _step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, updates: int) -> torch.Tensor:
    """torch's AdamW's count, where its kernel reads it."""
    fused = optimizer.param_groups[0].get("fused")
    return torch.tensor(float(updates), device=parameter.device if fused else "cpu")
