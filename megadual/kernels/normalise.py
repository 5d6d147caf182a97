"""LayerNorm without its affine part, of a residual stream whose biases are still to be added; one read, one write.

Shape suffixes: R rows, E width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 8, 4  # two rows a warp: their sums never leave it


@triton.jit
def _normalise(x_ptr, shift_ptr, out_ptr, R, eps, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (columns < E)[None, :]
    places, mask = rows[:, None] * E + columns[None, :], (rows < R)[:, None] & inside
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(shift_ptr + columns, mask=columns < E, other=0.0)[None, :]
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / E)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / E + eps)
    tl.store(out_ptr + places, (centred * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def normalise(x_RE: Tensor, shift_E: Tensor, eps: float) -> Tensor:
    """x + shift brought to mean 0 and variance 1 per row; fp32 inside, the dtype of x outside."""
    R, E = x_RE.shape
    out = torch.empty_like(x_RE)
    _normalise[(triton.cdiv(R, ROWS),)](
        x_RE, shift_E, out, R, eps, E=E, WIDTH=triton.next_power_of_2(E), ROWS=ROWS, num_warps=WARPS
    )
    return out
