"""Matrix products for a handful of rows, as decoding has them: their time is that of reading the weights once.

`linear` is F.linear with what follows it in a decoder layer (bias, residual); `gated` is SwiGLU's first half. Both
use Triton on a GPU for up to ROWS rows, where PyTorch's products leave bandwidth unused, and PyTorch elsewhere.

Shape suffixes: R rows, N outputs, K inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for the CPU comes without it
    triton = None

ROWS = 16  # the least that a tensor core multiplies
BLOCKS = (16, 256, 4, 4)  # outputs and inputs of a block, warps, loads ahead: the best of several on an H100

if triton is not None:

    @triton.jit
    def _product(
        x_ptr, weight_ptr, up_ptr, bias_ptr, residual_ptr, out_ptr, R, N, K,
        GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        r, n = tl.arange(0, BLOCK_R), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        product = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + r[:, None] * K + k[None, :], (r[:, None] < R) & (k[None, :] < K), 0.0)
            at, inside = n[None, :] * K + k[:, None], (n[None, :] < N) & (k[:, None] < K)
            product = tl.dot(x, tl.load(weight_ptr + at, inside, 0.0, eviction_policy="evict_first"), product)
            if GATED:
                up = tl.dot(x, tl.load(up_ptr + at, inside, 0.0, eviction_policy="evict_first"), up)
        if BIAS:
            product += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)[None, :]
        if GATED:
            product = product * tl.sigmoid(product) * up
        at, inside = r[:, None] * N + n[None, :], (r[:, None] < R) & (n[None, :] < N)
        if RESIDUAL:
            product += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), inside)


def _fused(x_RK: Tensor, weight_NK: Tensor) -> bool:
    half = weight_NK.dtype in (torch.bfloat16, torch.float16)
    return triton is not None and x_RK.is_cuda and len(x_RK) <= ROWS and half


def _launch(x_RK, weight_NK, up_NK=None, bias_N=None, residual_RN=None) -> Tensor:
    x_RK = x_RK.contiguous()
    (R, K), N = x_RK.shape, len(weight_NK)
    out_RN = x_RK.new_empty(R, N)
    block_n, block_k, warps, stages = BLOCKS
    _product[(triton.cdiv(N, block_n),)](
        x_RK, weight_NK, up_NK, bias_N, residual_RN, out_RN, R, N, K,
        GATED=up_NK is not None, BIAS=bias_N is not None, RESIDUAL=residual_RN is not None,
        BLOCK_R=ROWS, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out_RN


def linear(x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, residual_RN: Tensor | None = None) -> Tensor:
    """x weight^T (+ bias) (+ residual), (R, N). No gradients."""
    if _fused(x_RK, weight_NK):
        return _launch(x_RK, weight_NK, bias_N=bias_N, residual_RN=residual_RN)
    product_RN = F.linear(x_RK, weight_NK, bias_N)
    return product_RN if residual_RN is None else product_RN.add_(residual_RN)


def gated(x_RK: Tensor, gate_NK: Tensor, up_NK: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T), (R, N). No gradients."""
    if _fused(x_RK, gate_NK):
        return _launch(x_RK, gate_NK, up_NK)
    return F.silu(F.linear(x_RK, gate_NK)).mul_(F.linear(x_RK, up_NK))
