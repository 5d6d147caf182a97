"""The matrices between hidden states, which Muon orthogonalises, and the parts that fused ones consist of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megadual.model.config import ModelConfig
from megadual.model.init import tensor_parallel_slice, tensor_parallel_whole


@dataclass(frozen=True)
class HiddenMatrix:
    """A linear layer's weight, of which a tensor-parallel rank may have a share.

    Its rows are `blocks` equal blocks, each of `rows` of every part, one part after the other.
    """

    name: str
    parameter: torch.nn.Parameter
    blocks: int
    rows: tuple[int, ...]

    @property
    def split(self) -> bool:
        """Whether tensor-parallel ranks have shares of it; else each has all of it."""
        return getattr(self.parameter, "tensor_model_parallel", False)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the parts, whole."""
        columns = self.parameter.size(1)
        if self.split and self.parameter.partition_dim == 1:
            columns *= parallel_state.get_tensor_model_parallel_world_size()
        return [(self.blocks * rows, columns) for rows in self.rows]

    def parts(self, shares: list[torch.Tensor]) -> list[torch.Tensor]:
        """The parts, whole, of all tensor-parallel ranks' shares (of one where it is not split)."""
        blocks = tensor_parallel_whole(self.name, shares, self.parameter).unflatten(0, (self.blocks, -1))
        return [part.flatten(0, 1) for part in blocks.split(self.rows, dim=1)]

    def shares(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `parts` was made of."""
        whole = torch.cat([part.unflatten(0, (self.blocks, -1)) for part in parts], dim=1).flatten(0, 1)
        ranks = parallel_state.get_tensor_model_parallel_world_size() if self.split else 1
        return [tensor_parallel_slice(self.name, whole, self.parameter, rank) for rank in range(ranks)]


def hidden_matrices(chunk: torch.nn.Module, model: ModelConfig) -> Iterator[HiddenMatrix]:
    """Those of a model chunk that are trained: all linear layers' weights but the text's output layer.

    Tables that codes or depths are looked up in, and the visual heads' classifiers, belong to no linear layer.
    """
    for name, module in chunk.named_modules():
        linear = isinstance(module, (torch.nn.Linear, ColumnParallelLinear, RowParallelLinear))
        if not linear or name == "output_layer" or not module.weight.requires_grad:
            continue
        blocks, weights = _fused(name, model)
        rows = module.weight.size(0)
        if getattr(module.weight, "tensor_model_parallel", False) and module.weight.partition_dim == 0:
            rows *= parallel_state.get_tensor_model_parallel_world_size()
        unit = rows // (blocks * sum(weights))
        yield HiddenMatrix(f"{name}.weight", module.weight, blocks, tuple(unit * weight for weight in weights))


def _fused(name: str, model: ModelConfig) -> tuple[int, tuple[int, ...]]:
    """A linear layer's blocks of rows, and how the rows of one are shared among its parts."""
    kind = name.rpartition(".")[2]
    if kind == "linear_qkv":  # megatron-core keeps each KV head beside its query heads
        assert model.heads and model.kv_heads
        return model.kv_heads, (model.heads // model.kv_heads, 1, 1)
    parts = {"linear_fc1": 2, "qkv": 3, "gate_up": 2}.get(kind, 1)
    return 1, (1,) * parts
