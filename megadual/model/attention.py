"""Causal attention over packed documents with rotary embeddings, as megatron-core's core attention.

Shape suffixes: T query positions, S key positions, N query heads, G KV heads, E head width, F = E / 2.
"""

import contextlib
import functools
import importlib
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right

from megadual.model.fused import rotate

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


@dataclass
class PackedDocuments(PackedSeqParams):
    """Where the documents of a micro-batch lie; megatron-core hands it to every layer, through recompute too.

    `angles` (T, F) are the rotary embedding's; megatron-core's own would cost a dozen kernels a layer.
    Document i's queries are `cu_seqlens_q[i]` to `[i + 1]`, its keys likewise by `cu_seqlens_kv` (int32). Keys may
    begin before the queries: the last of both is the same position. `keys_at` (S,) picks the keys out of those of all
    context-parallel ranks; None where there is one rank.
    """

    qkv_format: str = "sbhd"  # "thd" would have megatron-core drop a dimension
    angles: torch.Tensor | None = None
    keys_at: torch.Tensor | None = None


class PackedAttention(MegatronModule):
    """Each position attends to the positions before it in its own document.

    Takes this context-parallel rank's query (T, 1, N, E), key and value (T, 1, G, E) and a PackedDocuments;
    returns (T, 1, N * E).
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_
    ):
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.context_group = pg_collection.cp

    def forward(self, query, key, value, attention_mask, packed_seq_params: PackedDocuments, **_):
        angles_TF = packed_seq_params.angles
        q_TNE, k_SGE, v_SGE = rotate(query.squeeze(1), angles_TF), rotate(key.squeeze(1), angles_TF), value.squeeze(1)
        if packed_seq_params.keys_at is not None:
            # The gradient of gathering is a reduce-scatter: each rank gets back what all queries ask of its keys.
            both = gather_from_sequence_parallel_region(torch.cat([k_SGE, v_SGE], dim=1), group=self.context_group)
            k_SGE, v_SGE = both.index_select(0, packed_seq_params.keys_at).chunk(2, dim=1)
        half = q_TNE.dtype in (torch.bfloat16, torch.float16)  # the kernels for packed sequences take no other
        attend = gpu_kernel(q_TNE.size(2)) if q_TNE.is_cuda and half else attend_each
        return attend(q_TNE, k_SGE, v_SGE, packed_seq_params, self.scale).flatten(1).unsqueeze(1)


def attend_each(q_TNE, k_SGE, v_SGE, documents: PackedDocuments, scale: float) -> torch.Tensor:
    """(T, N, E) by torch's SDPA, one document at a time."""
    q_ends, k_ends = documents.cu_seqlens_q.tolist(), documents.cu_seqlens_kv.tolist()
    attended = []
    for i in range(len(q_ends) - 1):
        q = q_TNE[q_ends[i] : q_ends[i + 1]].transpose(0, 1)[None]
        k, v = (x[k_ends[i] : k_ends[i + 1]].transpose(0, 1)[None] for x in (k_SGE, v_SGE))
        whole = q.size(2) == k.size(2)
        mask = None if whole else causal_lower_right(q.size(2), k.size(2))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=whole, scale=scale, enable_gqa=True)
        attended.append(out[0].transpose(0, 1))
    return torch.cat(attended)


def torch_varlen(q_TNE, k_SGE, v_SGE, documents: PackedDocuments, scale: float) -> torch.Tensor:
    """(T, N, E) by torch's own kernel for packed sequences."""
    repeats = q_TNE.size(1) // k_SGE.size(1)  # torch 2.11 wants as many KV heads as query heads
    k_SNE, v_SNE = (x.repeat_interleave(repeats, dim=1) for x in (k_SGE, v_SGE))
    bounds = (documents.cu_seqlens_q, documents.cu_seqlens_kv, documents.max_seqlen_q, documents.max_seqlen_kv)
    return varlen_attn(q_TNE, k_SNE, v_SNE, *bounds, scale=scale, window_size=(-1, 0))


def flash(kernel, q_TNE, k_SGE, v_SGE, documents: PackedDocuments, scale: float) -> torch.Tensor:
    """(T, N, E) by flash-attn's `kernel`."""
    out = kernel(
        q_TNE,
        k_SGE,
        v_SGE,
        cu_seqlens_q=documents.cu_seqlens_q,
        cu_seqlens_k=documents.cu_seqlens_kv,
        max_seqlen_q=documents.max_seqlen_q,
        max_seqlen_k=documents.max_seqlen_kv,
        softmax_scale=scale,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out  # flash-attn-4 returns the log-sum-exps too


@functools.cache
def gpu_kernel(width: int):
    """The fastest that is installed for heads of this width: flash-attn-4, flash-attn 2, torch's from 2.11 on; else
    SDPA by document.
    """
    # flash-attn-4 4.0.0b36 gives wrong gradients for several documents where the width is 8, 16, 40 or 48, unsaid.
    modules = {"flash_attn.cute": width % 32 == 0, "flash_attn": True}
    for module in (name for name, right in modules.items() if right):
        with contextlib.suppress(ImportError, AttributeError):  # flash_attn is there without it where only 4 is
            return functools.partial(flash, importlib.import_module(module).flash_attn_varlen_func)
    if varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters:
        return torch_varlen
    return attend_each


def rotary_angles(positions: torch.Tensor, head_dim: int, base: float) -> torch.Tensor:
    """(T, F) angles of rotary embeddings for `positions` (T,), which restart at each document; fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    return positions.float()[:, None] * base**-exponents
