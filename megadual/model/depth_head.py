"""A visual head: from the hidden state of one position to the D residual codes of the next (paper, output heads).

hidden -> 2-layer GELU projector -> causal transformer over the D codes of one position -> norm -> one
classifier per depth. The transformer's first input is the projected hidden state; input d is the sum of the
embedded codes before d. Plain torch, no tensor parallelism: the trainer and the exported model share it.

Shape suffixes: P positions, D code depth, K codebook size, C code width, H the LLM's width, W the head's width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class DepthLayer(nn.Module):
    """Pre-norm causal self-attention and SwiGLU over the depths of one position."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x_PDW: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x_PDW)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_PDW = x_PDW + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ffn_norm(x_PDW)).chunk(2, dim=-1)
        return x_PDW + self.down(F.silu(gate) * up)


class DepthHead(nn.Module):
    """One stream's head. The codebook is the tokenizer's and is passed in; it is not a parameter."""

    def __init__(
        self, hidden: int, width: int, layers: int, heads: int, ffn: int, depth: int, codebook_size: int, code_dim: int
    ):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width))
        self.code_projector = nn.Linear(code_dim, width)
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

    def forward(
        self, hidden_PH: torch.Tensor, codes_PD: torch.Tensor, codebook_KC: torch.Tensor, chunk: int = 4096
    ) -> torch.Tensor:
        """(D,) summed cross-entropy per depth, in fp32, over all positions.

        Logits are made and dropped `chunk` positions at a time, one depth at a time; P x K is never held.
        """
        states = self.states(hidden_PH, codes_PD[:, :-1], codebook_KC)
        per_depth = []
        for d in range(codes_PD.size(1)):
            parts = zip(states[:, d].split(chunk), codes_PD[:, d].split(chunk))
            sums = [
                checkpoint(_summed_cross_entropy, part, self.classifiers[d], target, use_reentrant=False)
                for part, target in parts
            ]
            per_depth.append(torch.stack(sums).sum())
        return torch.stack(per_depth)


def _summed_cross_entropy(x_PW: torch.Tensor, weight_KW: torch.Tensor, target_P: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x_PW, weight_KW).float(), target_P, reduction="sum")
