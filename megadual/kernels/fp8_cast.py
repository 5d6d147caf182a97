"""A matrix in FP8 and its transpose in FP8, in one read: products of FP8 take rows of both sides along the summed axis.

Shape suffixes: R rows, C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 64, 128, 8


@triton.jit
def _cast(
    x_ptr, scale_ptr, out_ptr, across_ptr, R, C, largest,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    places = rows[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32) / tl.load(scale_ptr)
    # NaN stays NaN, so that a loss that is not finite is seen
    x = tl.clamp(x, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    if ALONG:
        tl.store(out_ptr + places, x.to(out_ptr.dtype.element_ty), mask=inside)
    if ACROSS:
        places_CR = columns[:, None] * R + rows[None, :]
        inside_CR = (columns < C)[:, None] & (rows < R)[None, :]
        tl.store(across_ptr + places_CR, tl.trans(x).to(across_ptr.dtype.element_ty), mask=inside_CR)


def cast(x_RC: Tensor, scale: Tensor, dtype: torch.dtype, along: bool, across: bool) -> tuple[Tensor | None, ...]:
    """(R, C) and (C, R) of x / scale in `dtype`, whichever of them are asked for."""
    R, C = x_RC.shape
    out_RC = torch.empty(R, C, dtype=dtype, device=x_RC.device) if along else None
    across_CR = torch.empty(C, R, dtype=dtype, device=x_RC.device) if across else None
    grid = (triton.cdiv(R, ROWS), triton.cdiv(C, COLUMNS))
    some = out_RC if along else across_CR
    _cast[grid](
        x_RC.contiguous(), scale, out_RC if along else some, across_CR if across else some, R, C,
        torch.finfo(dtype).max, ALONG=along, ACROSS=across, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return out_RC, across_CR
