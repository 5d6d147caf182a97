"""Causal attention among the few codes of one position, for many positions: read from the joined queries, keys and
values and written to their joined gradient, with nothing copied or padded in between.

Several positions share a tile, apart under a mask: matrix units take no fewer queries, and a tile's work is far below
the time its rows take to be read.

Shape suffixes: R rows, one for each code of each position; H heads, E their width, W = H * E.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # queries of a program


@triton.jit
def _tile(R, n: tl.constexpr, H: tl.constexpr, E: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr):
    """A program's places in (R, W), those in (R, 3W), which of them there are, and which queries see which keys."""
    place, column = tl.arange(0, TILE), tl.arange(0, E)
    rows = tl.program_id(0).to(tl.int64) * SIDE + place
    of_head = tl.program_id(1) * E + column[None, :]
    inside = ((place < SIDE) & (rows < R))[:, None]
    seen = (place[:, None] >= place[None, :]) & (place[:, None] // n == place[None, :] // n)
    return rows[:, None] * (H * E) + of_head, rows[:, None] * (3 * H * E) + of_head, inside, seen


@triton.jit
def _softmax(q, k, seen, scale):
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def _forward(
    qkv_ptr, out_ptr, R, scale, n: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at, q_at, inside, seen = _tile(R, n, H, E, SIDE, TILE)
    q = tl.load(qkv_ptr + q_at, mask=inside, other=0.0)
    k = tl.load(qkv_ptr + q_at + H * E, mask=inside, other=0.0)
    v = tl.load(qkv_ptr + q_at + 2 * H * E, mask=inside, other=0.0)
    out = tl.dot(_softmax(q, k, seen, scale).to(v.dtype), v)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    qkv_ptr, upstream_ptr, gradient_ptr, R, scale, n: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at, q_at, inside, seen = _tile(R, n, H, E, SIDE, TILE)
    q = tl.load(qkv_ptr + q_at, mask=inside, other=0.0)
    k = tl.load(qkv_ptr + q_at + H * E, mask=inside, other=0.0)
    v = tl.load(qkv_ptr + q_at + 2 * H * E, mask=inside, other=0.0)
    upstream = tl.load(upstream_ptr + at, mask=inside, other=0.0)
    weights = _softmax(q, k, seen, scale)
    by_weight = tl.dot(upstream, tl.trans(v))
    by_score = weights * (by_weight - tl.sum(weights * by_weight, axis=1)[:, None]) * scale
    weights, by_score = weights.to(q.dtype), by_score.to(q.dtype)
    kind = gradient_ptr.dtype.element_ty
    tl.store(gradient_ptr + q_at, tl.dot(by_score, k).to(kind), mask=inside)
    tl.store(gradient_ptr + q_at + H * E, tl.dot(tl.trans(by_score), q).to(kind), mask=inside)
    tl.store(gradient_ptr + q_at + 2 * H * E, tl.dot(tl.trans(weights), upstream).to(kind), mask=inside)


def _launch(kernel, tensors: tuple[Tensor, ...], heads: int, n: int) -> None:
    R, E = len(tensors[0]), tensors[0].size(1) // (3 * heads)
    side = TILE // n * n
    grid = (triton.cdiv(R, side), heads)
    kernel[grid](*tensors, R, E**-0.5, n=n, H=heads, E=E, SIDE=side, TILE=TILE, num_warps=4)


class _DepthAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_R3W, heads, n):
        out_RW = qkv_R3W.new_empty(len(qkv_R3W), qkv_R3W.size(1) // 3)
        _launch(_forward, (qkv_R3W, out_RW), heads, n)
        ctx.save_for_backward(qkv_R3W)
        ctx.heads, ctx.n = heads, n
        return out_RW

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_RW):
        (qkv_R3W,) = ctx.saved_tensors
        gradient_R3W = torch.empty_like(qkv_R3W)
        _launch(_backward, (qkv_R3W, upstream_RW.contiguous(), gradient_R3W), ctx.heads, ctx.n)
        return gradient_R3W, None, None


def takes(qkv: Tensor, heads: int, n: int) -> bool:
    """Whether the kernel is made for these: on a GPU in half precision, heads of a width that its units take."""
    E = qkv.size(-1) // (3 * heads)
    half = qkv.dtype in (torch.bfloat16, torch.float16)
    return qkv.is_cuda and half and n <= TILE and 16 <= E <= 128 and E & (E - 1) == 0


def depth_attention(qkv_R3W: Tensor, heads: int, n: int) -> Tensor:
    """(R, W): each row attends to the rows up to it among its n; sums in fp32. See `takes`."""
    return _DepthAttention.apply(qkv_R3W.contiguous(), heads, n)
