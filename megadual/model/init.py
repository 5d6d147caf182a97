"""Initial weights that do not depend on the layout: every full tensor is drawn from its own name's seed."""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core import parallel_state

NORM = re.compile(r"norm\d*\.weight$|layernorm\.weight$")
MOST_AT_ONCE = 8  # tensors that are whole and in fp32 on the host while they are filled
# What reads code vectors: of all streams, or of the one that is named.
OF_CODES = re.compile(r"^embedding\.projector\.0\.weight$|^heads\.(\w+)\.code_projector\.weight$")
RESIDUAL_OUT = re.compile(r"(linear_proj|linear_fc2|\.out|\.down)\.weight$")


def global_name(name: str, module: torch.nn.Module) -> str:
    """A parameter's name in the whole model: its layer counted from the first stage's first layer."""
    match = re.match(r"(decoder\.layers\.)(\d+)(\..+)", name)
    if match is None:
        return name
    layer = module.decoder.layers[int(match[2])].layer_number - 1
    return f"{match[1]}{layer}{match[3]}"


def tensor_parallel_slice(
    name: str, full: torch.Tensor, parameter: torch.Tensor, rank: int | None = None
) -> torch.Tensor:
    """A tensor-parallel rank's share of the full tensor; None: this one's."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    rank = parallel_state.get_tensor_model_parallel_rank() if rank is None else rank
    size = parallel_state.get_tensor_model_parallel_world_size()
    if name.endswith("linear_fc1.weight"):  # gate and up are split each by themselves
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=parameter.partition_dim)[rank]


def tensor_parallel_whole(name: str, shares: list[torch.Tensor], parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor of all tensor-parallel ranks' shares, in their order."""
    if not getattr(parameter, "tensor_model_parallel", False) or len(shares) == 1:
        return shares[0]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([share.chunk(2)[half] for half in range(2) for share in shares])
    return torch.cat(shares, dim=parameter.partition_dim)


def initial(
    name: str, shape: list[int], seed: int, hidden: int, layers: int, codebooks: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The full tensor that a parameter starts as, fp32.

    Matrices are normal with standard deviation sqrt(2 / (5 * hidden)), those that write to the residual
    stream divided by sqrt(2 * layers); norms are ones, biases zeros. Those that read code vectors, a dozen numbers of
    whatever size the tokenizer has come to, make of each stream's `codebooks` (K, C) numbers of size one.
    """
    if NORM.search(name):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    # Heads were attributes `STREAM_head` at first: their tensors are drawn by those names, so that numbers stay equal.
    drawn_by = re.sub(r"^heads\.(\w+)\.", r"\1_head.", name)
    digest = hashlib.blake2b(f"{seed}:{drawn_by}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    reads = OF_CODES.search(name)
    deviation = shape[-1] ** -0.5 if reads else math.sqrt(2 / (5 * hidden))
    full = torch.empty(shape).normal_(0.0, deviation, generator=generator)
    if reads:
        read = [codebooks[reads[1]]] if reads[1] else codebooks.values()
        full /= torch.cat([_sizes(codebook_KC) for codebook_KC in read])
    if RESIDUAL_OUT.search(name):
        full /= math.sqrt(2 * layers)
    return full


def _sizes(codebook_KC: torch.Tensor) -> torch.Tensor:
    """(C,) the root mean square of a codebook's numbers."""
    mean_square = codebook_KC.double().cpu().square().mean()
    return mean_square.sqrt().clamp(min=1e-6).float().expand(codebook_KC.size(1))


def initialize(chunks: list[torch.nn.Module], seed: int) -> None:
    """Fill the parameters of this rank's model chunks.

    One core draws 50 million numbers a second, and a generator draws one after the other: tensors are filled side by
    side, the largest first, as many as this rank has cores.
    """
    named = [(name, parameter, module) for module in chunks for name, parameter in module.named_parameters()]
    named.sort(key=lambda entry: -entry[1].numel())
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(min(max(cores, 1), MOST_AT_ONCE)) as pool:
        list(pool.map(lambda entry: _fill(*entry, seed), named))


@torch.no_grad()
def _fill(local_name: str, parameter: torch.nn.Parameter, module: torch.nn.Module, seed: int) -> None:
    config, name = module.config, global_name(local_name, module)
    if name == "output_layer.weight" and module.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    holder = module.embedding.codebooks if module.pre_process else getattr(module, "head_codebooks", None)
    codebooks = dict(holder.named_buffers()) if holder else {}
    full = initial(name, shape, seed, config.hidden_size, config.num_layers, codebooks)
    parameter.copy_(tensor_parallel_slice(name, full, parameter))
