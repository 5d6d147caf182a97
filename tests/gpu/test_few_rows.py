"""The products of decoding against fp64, for rows and widths that fill no block."""

import pytest
import torch
from torch.nn import functional as F

from megadual.kernels import few_rows


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).bfloat16()


@pytest.mark.parametrize("rows, outputs, inputs", [(1, 16, 256), (2, 3584, 18944), (3, 1000, 520), (16, 33, 2048)])
def test_products_are_those_of_fp64_rounded_once(rows, outputs, inputs):
    x, bias, residual = draw(rows, inputs, seed=0), draw(outputs, seed=1), draw(rows, outputs, seed=2)
    weight, up = draw(outputs, inputs, seed=3) / inputs**0.5, draw(outputs, inputs, seed=4) / inputs**0.5
    plain = F.linear(x.double(), weight.double())
    wanted = [
        (few_rows.linear(x, weight), plain),
        (few_rows.linear(x, weight, bias, residual), plain + bias.double() + residual.double()),
        (few_rows.gated(x, weight, up), F.silu(plain) * F.linear(x.double(), up.double())),
    ]
    for found, expected in wanted:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)
