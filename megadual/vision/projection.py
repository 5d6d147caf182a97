"""AttnProjection: the attention blocks before and after a quantiser (paper section A1).

Shape suffixes: B batch, N positions, I input width, O output width, H heads, E head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionAttention(nn.Module):
    """Self-attention that changes the width: narrowing averages the heads, widening concatenates them."""

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, causal: bool):
        super().__init__()
        inner = max(in_dim, out_dim)
        self.num_heads, self.causal, self.narrows = num_heads, causal, in_dim > out_dim
        self.qkv = nn.Linear(in_dim, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        # A key bias shifts all scores of a query alike, so it stays zero.
        self.register_buffer("zero_k_bias", torch.zeros(inner))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x_BNI: Tensor) -> Tensor:
        B, N, _ = x_BNI.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x_BNI, self.qkv.weight, bias).view(B, N, 3, self.num_heads, -1)
        q_BHNE, k_BHNE, v_BHNE = qkv.permute(2, 0, 3, 1, 4)
        x_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, is_causal=self.causal)
        x_BNO = x_BHNE.mean(dim=1) if self.narrows else x_BHNE.transpose(1, 2).reshape(B, N, -1)
        return self.proj(x_BNO)


class GeGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.w0 = nn.Linear(dim, hidden)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class AttnProjection(nn.Module):
    """(B, N, in_dim) -> (B, N, out_dim): linear plus attention, then a GeGLU; heads are as wide as the narrow side."""

    def __init__(self, in_dim: int, out_dim: int, causal: bool = False, mlp_ratio: int = 2):
        super().__init__()
        num_heads = max(in_dim, out_dim) // min(in_dim, out_dim)
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = ProjectionAttention(in_dim, out_dim, num_heads, causal)
        self.proj = nn.Linear(in_dim, out_dim)
        self.norm3 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = GeGLU(out_dim, out_dim * mlp_ratio)

    def forward(self, x_BNI: Tensor) -> Tensor:
        x_BNO = self.proj(self.norm3(x_BNI)) + self.attn(self.norm1(x_BNI))
        return x_BNO + self.mlp(self.norm2(x_BNO))
