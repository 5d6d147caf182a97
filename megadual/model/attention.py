"""Causal attention over packed documents, as megatron-core's core attention.

Shape suffixes: T positions of all packed documents, B batch (always 1), N query heads, G KV heads, E head width.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


class PackedAttention(MegatronModule):
    """Each position attends to the positions before it in its own document.

    Takes query (T, 1, N, E), key and value (T, 1, G, E), and the documents' boundaries `cu_seqlens` (n + 1,)
    int32 in the place of megatron's attention mask: it reaches every layer untouched, through recompute and
    pipeline alike. Returns (T, 1, N * E). Uses flash-attn where it is installed, else torch's SDPA.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, **_):
        cu_seqlens = attention_mask
        q_TNE, k_TGE, v_TGE = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if q_TNE.is_cuda and flash_attn_varlen_func is not None:
            longest = q_TNE.size(0)  # an upper bound: the exact one would wait for the GPU
            out = flash_attn_varlen_func(
                q_TNE, k_TGE, v_TGE, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=self.scale, causal=True
            )
        else:
            out = self._attend_each(q_TNE, k_TGE, v_TGE, cu_seqlens.tolist())
        return out.flatten(1).unsqueeze(1)

    def _attend_each(self, q_TNE, k_TGE, v_TGE, bounds: list[int]) -> torch.Tensor:
        documents = []
        for start, end in zip(bounds[:-1], bounds[1:]):
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_TNE, k_TGE, v_TGE))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
            )
            documents.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(documents)


def rotary_angles(positions: torch.Tensor, head_dim: int, base: float) -> torch.Tensor:
    """(T, 1, 1, E) angles of rotary embeddings (half-split) for `positions` (T,), which restart at each document."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * base**-exponents
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
