"""A visual head: from the hidden state of one position to the D residual codes of the next (paper, output heads).

hidden -> 2-layer GELU projector -> causal transformer over the D codes of one position -> norm -> one
classifier per depth. The transformer's first input is the projected hidden state; input d is the sum of the
embedded codes before d. Plain torch, no tensor parallelism: the trainer and the exported model share it.

Shape suffixes: P positions, D code depth, K codebook size, C code width, H the LLM's width, W the head's width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megadual.model.fused import linear_cross_entropy, swiglu
from megadual.model.main_grad import Linear

try:
    from megadual.kernels import depth_attention as kernel
except ImportError:  # no Triton here, or an exported folder by itself
    kernel = None

TILE = 128  # queries that attention kernels for GPUs take at a time


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """(P, n, W) of joined queries, keys and values (P, n, 3W): each depth attends to those up to it."""
    P, n, _ = qkv.shape
    if kernel and kernel.takes(qkv, heads, n):
        return kernel.depth_attention(qkv.flatten(0, 1), heads, n).unflatten(0, (P, n))
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attend = tiled_causal_attention if qkv.is_cuda else causal_attention
    return attend(q, k, v).transpose(1, 2).flatten(2)


def causal_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tiled_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`causal_attention` of (P, heads, n, width), TILE // n positions at a time under a mask that keeps them apart.

    PyTorch's kernels compute whole tiles of queries, which the few depths of one position would leave nearly empty.
    """
    P, heads, n, width = q.shape
    side = TILE // n * n

    def fold(x):
        filled = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, 0, 0, -P % (TILE // n)))
        return filled.reshape(-1, side, heads, width).transpose(1, 2)

    place = torch.arange(side, device=q.device)
    mask = (place[:, None] >= place) & (place[:, None] // n == place // n)
    out = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), attn_mask=mask)
    return out.transpose(1, 2).reshape(-1, n, heads, width)[:P].transpose(1, 2)


class DepthLayer(nn.Module):
    """Pre-norm causal self-attention and SwiGLU over the depths of one position."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = Linear(width, 2 * ffn, bias=False)
        self.down = Linear(ffn, width, bias=False)

    def forward(self, x_PDW: torch.Tensor) -> torch.Tensor:
        x_PDW = x_PDW + self.out(attention(self.qkv(self.attention_norm(x_PDW)), self.heads))
        gate_up = self.gate_up(self.ffn_norm(x_PDW))
        return x_PDW + self.down(swiglu(gate_up.flatten(0, 1)).unflatten(0, gate_up.shape[:2]))


class DepthHead(nn.Module):
    """One stream's head. The codebook is the tokenizer's and is passed in; it is not a parameter."""

    def __init__(
        self, hidden: int, width: int, layers: int, heads: int, ffn: int, depth: int, codebook_size: int, code_dim: int
    ):
        super().__init__()
        self.projector = nn.Sequential(Linear(hidden, width), nn.GELU(), Linear(width, width))
        self.code_projector = Linear(code_dim, width)
        self.depth_embedding = nn.Parameter(torch.zeros(depth, width))
        self.layers = nn.ModuleList(DepthLayer(width, heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.classifiers = nn.Parameter(torch.empty(depth, codebook_size, width))
        nn.init.normal_(self.classifiers, std=0.02)

    def states(self, hidden_PH: torch.Tensor, codes_PD: torch.Tensor, codebook_KC: torch.Tensor) -> torch.Tensor:
        """(P, 1 + n, W) normed states given the hidden state and the first n codes of each position.

        State d predicts code d, so teacher forcing passes the first D - 1 codes.
        """
        start = self.projector(hidden_PH).unsqueeze(1)
        before = self.code_projector(F.embedding(codes_PD, codebook_KC).cumsum(1).to(start.dtype))
        x_PDW = torch.cat([start, before], dim=1)
        x_PDW = x_PDW + self.depth_embedding[: x_PDW.size(1)]
        for layer in self.layers:
            x_PDW = layer(x_PDW)
        return self.norm(x_PDW)

    def logits(self, hidden_PH: torch.Tensor, codes_PD: torch.Tensor, codebook_KC: torch.Tensor) -> torch.Tensor:
        """(P, 1 + n, K) logits, n the number of codes given."""
        states = self.states(hidden_PH, codes_PD, codebook_KC)
        return torch.einsum("pdw,dkw->pdk", states, self.classifiers[: states.size(1)])

    def forward(self, hidden_PH: torch.Tensor, codes_PD: torch.Tensor, codebook_KC: torch.Tensor) -> torch.Tensor:
        """(D,) summed cross-entropy per depth, in fp32, over all positions; P x D x K logits are never held."""
        states = self.states(hidden_PH, codes_PD[:, :-1], codebook_KC)
        return linear_cross_entropy(states.transpose(0, 1), self.classifiers, codes_PD.T)
