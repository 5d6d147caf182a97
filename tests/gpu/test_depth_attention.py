"""Attention among the depths of a position, forward and backward, against fp64."""

import pytest
import torch

from megadual.kernels import depth_attention as kernel
from megadual.model.depth_head import attention, causal_attention


@pytest.mark.parametrize(
    "positions, n, heads, width", [(1100, 8, 16, 128), (1, 4, 2, 64), (37, 5, 3, 32), (9, 1, 2, 16)]
)
def test_like_plain_attention(positions, n, heads, width):
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(positions, n, 3 * heads * width, device="cuda", dtype=torch.bfloat16, generator=generator)
    qkv.requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    assert kernel.takes(qkv, heads, n)
    got = attention(qkv, heads)
    q, k, v = exact.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    expected = causal_attention(q, k, v).transpose(1, 2).flatten(2)
    upstream = torch.randn(got.shape, device="cuda", generator=generator).bfloat16()
    got.backward(upstream)
    expected.backward(upstream.double())
    for a, b in ((got, expected), (qkv.grad, exact.grad)):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2


def test_fp32_takes_another_way():
    assert not kernel.takes(torch.randn(2, 4, 3 * 64, device="cuda"), 2, 4)
