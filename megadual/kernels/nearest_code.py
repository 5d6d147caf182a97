"""Residual quantisation's nearest-code search in one Triton kernel that never writes a distance.

A program keeps its rows in registers through all depths: per depth it sweeps the codebook with a running maximum of
x.c - |c|^2 / 2, takes the winner's vector off the rows and goes on. Products of fp32 accuracy come from tensor cores:
each operand is scaled by a power of two and split into two fp16 numbers (22 bits), and three of the four products are
summed in fp32. The maximum is kept per slot, a column of the tile, over groups of tiles, because comparing and not
multiplying is what limits the sweep; the few codes of the winning group are then compared by their fp32 distances.

Shape suffixes: M rows, C code width, D depth, K codebook size, P codebook size padded to whole groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST_CODE = 64  # rows and both halves of a tile stay in registers and shared memory up to this width
BLOCK_M, BLOCK_N, GROUP = 128, 32, 4  # rows of a program; codes of a tile; tiles that share a running maximum
WARPS, STAGES = 4, 2
TOP = 12  # scaled numbers reach 2^13: far from fp16's overflow, and the lower half keeps clear of its underflow


@triton.jit
def _power_of_two_scale(largest, TOP: tl.constexpr):
    """2^TOP over the power of two in `largest`, by exponent bits; what is below 2^-60 counts as 2^-60."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 127 - 60)
    return ((TOP + 254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _residual_codes(
    x_ptr,
    codebook_ptr,
    halves_ptr,
    half_norms_ptr,
    scale_ptr,
    codes_ptr,
    M,
    K,
    groups,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    TOP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
    slots = tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * C + columns[None, :], mask=inside, other=0.0)
    codebook_scale = tl.load(scale_ptr)
    for depth in range(DEPTH):
        scale = _power_of_two_scale(tl.max(tl.abs(x), axis=1), TOP)
        scaled = x * scale[:, None]
        upper = scaled.to(tl.float16)
        lower = (scaled - upper.to(tl.float32)).to(tl.float16)
        norm_scale = -(scale * codebook_scale)[:, None]
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        best_group = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for group in tl.range(0, groups, num_stages=STAGES):
            for tile in tl.static_range(GROUP):
                code = (group * GROUP + tile) * BLOCK_N + slots
                c_upper = tl.load(halves_ptr + code[None, :] * (2 * WIDTH) + columns[:, None])
                c_lower = tl.load(halves_ptr + code[None, :] * (2 * WIDTH) + WIDTH + columns[:, None])
                score = norm_scale * tl.load(half_norms_ptr + code)[None, :]
                score = tl.dot(lower, c_upper, score)
                score = tl.dot(upper, c_lower, score)
                score = tl.dot(upper, c_upper, score)
                highest = score if tile == 0 else tl.maximum(highest, score)  # noqa: F821
            better = highest > best
            best = tl.where(better, highest, best)
            best_group = tl.where(better, group, best_group)
        slot = tl.argmax(best, axis=1)
        group_of_row = tl.sum(tl.where(slots[None, :] == slot[:, None], best_group, 0), axis=1)
        nearest = tl.full([BLOCK_M], float("inf"), tl.float32)
        nearest_code = group_of_row * (GROUP * BLOCK_N) + slot
        residual = x
        for tile in tl.static_range(GROUP):
            code = (group_of_row * GROUP + tile) * BLOCK_N + slot
            vector = tl.load(
                codebook_ptr + code[:, None] * C + columns[None, :],
                mask=(code < K)[:, None] & (columns < C)[None, :],
                other=0.0,
            )
            difference = x - vector
            distance = tl.where(code < K, tl.sum(difference * difference, axis=1), float("inf"))
            closer = distance < nearest
            nearest = tl.where(closer, distance, nearest)
            nearest_code = tl.where(closer, code, nearest_code)
            residual = tl.where(closer[:, None], difference, residual)
        x = residual
        tl.store(codes_ptr + rows * DEPTH + depth, nearest_code, mask=rows < M)


def supports(x_MC: Tensor, codebook_KC: Tensor) -> bool:
    """Whether `residual_codes` takes these: fp32 on a GPU, codes of at most 64 numbers."""
    return x_MC.is_cuda and x_MC.dtype == codebook_KC.dtype == torch.float32 and codebook_KC.shape[1] <= WIDEST_CODE


def residual_codes(x_MC: Tensor, codebook_KC: Tensor, depth: int) -> Tensor:
    """Codes (M, D) int64 of residual quantisation: at each depth the nearest (L2) code to what the depths before left.

    x and codebook are fp32; equal to searching with fp32 distances except at ties within fp32 rounding.
    """
    x_MC = x_MC.contiguous()
    codebook_KC = codebook_KC.contiguous()
    M, C = x_MC.shape
    K = len(codebook_KC)
    width = max(16, triton.next_power_of_2(C))  # tensor cores take 16 at least
    groups = triton.cdiv(K, BLOCK_N * GROUP)
    # An unused place has an infinite norm, so it never wins.
    half_norms_P = x_MC.new_full((groups * BLOCK_N * GROUP,), float("inf"))
    half_norms_P[:K] = codebook_KC.square().sum(dim=1) / 2
    exponent = torch.frexp(codebook_KC.abs().amax()).exponent.clamp(min=-40)
    scale = torch.ldexp(torch.ones_like(half_norms_P[0]), TOP + 1 - exponent)
    scaled_KC = codebook_KC * scale
    halves = x_MC.new_zeros((len(half_norms_P), 2, width), dtype=torch.float16)
    halves[:K, 0, :C] = scaled_KC
    halves[:K, 1, :C] = scaled_KC - halves[:K, 0, :C]
    codes_MD = torch.empty(M, depth, dtype=torch.int64, device=x_MC.device)
    _residual_codes[(triton.cdiv(M, BLOCK_M),)](
        x_MC,
        codebook_KC,
        halves,
        half_norms_P,
        scale,
        codes_MD,
        M,
        K,
        groups,
        C=C,
        WIDTH=width,
        DEPTH=depth,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        GROUP=GROUP,
        STAGES=STAGES,
        TOP=TOP,
        num_warps=WARPS,
    )
    return codes_MD
