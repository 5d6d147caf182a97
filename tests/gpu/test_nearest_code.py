"""The fused search against fp64 distances and against the search in PyTorch's operations."""

import pytest
import torch

from megadual.kernels import nearest_code as kernel
from megadual.vision.quantizer import nearest_code, plain_nearest_code, residual_codes


def draw(rows: int, size: int, width: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)
    lengths = torch.rand(size, 1, device="cuda", generator=generator)
    return normal(rows, width) * scale, normal(size, width) * lengths * scale


def assert_nearest(x_MC, codebook_KC, codes_M):
    """No code is nearer in fp64 by more than fp32's rounding of the products."""
    distances_MK = torch.cdist(x_MC.double(), codebook_KC.double()).square()
    chosen_M = distances_MK.gather(1, codes_M[:, None])[:, 0]
    size_M = x_MC.double().square().sum(1) + codebook_KC[codes_M].double().square().sum(1)
    assert ((chosen_M - distances_MK.amin(1)) <= 1e-6 * size_M).all()


# Rows and codes that fill no block, the released size, widths that are no power of two, tiny and huge values.
@pytest.mark.parametrize(
    "rows, size, width, scale",
    [(1, 1, 8, 1.0), (1000, 300, 32, 1.0), (4096, 16384, 32, 1e-4), (513, 1000, 20, 1e4), (300, 500, 64, 1.0)],
)
def test_every_depth_takes_the_nearest_code(rows, size, width, scale):
    x_MC, codebook_KC = draw(rows, size, width, scale)
    for codes_M in residual_codes(x_MC, codebook_KC, depth=3).T:
        assert_nearest(x_MC, codebook_KC, codes_M)
        x_MC = x_MC - codebook_KC[codes_M]


def test_it_is_the_plain_search_but_for_ties():
    x_MC, codebook_KC = draw(20000, 16384, 32, 1.0)
    assert (nearest_code(x_MC, codebook_KC) == plain_nearest_code(x_MC, codebook_KC)).float().mean() > 0.9999


def test_one_large_code_does_not_cost_the_others_their_precision():
    x_MC, codebook_KC = draw(2000, 1000, 32, 1.0)
    codebook_KC[7] = 3000.0
    assert_nearest(x_MC, codebook_KC, nearest_code(x_MC, codebook_KC))


def test_rows_of_zeros_take_the_shortest_code():
    _, codebook_KC = draw(1, 500, 32, 1.0)
    codes_M = nearest_code(torch.zeros(5, 32, device="cuda"), codebook_KC)
    assert (codes_M == codebook_KC.norm(dim=1).argmin()).all()


def test_the_distances_are_never_written():
    x_MC, codebook_KC = draw(8192, 16384, 32, 1.0)
    residual_codes(x_MC, codebook_KC, depth=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    residual_codes(x_MC, codebook_KC, depth=8)
    assert torch.cuda.max_memory_allocated() - before < 8192 * 16384  # a quarter of the distances of one depth


def test_wide_codes_and_other_dtypes_are_left_to_pytorch():
    x_MC, codebook_KC = draw(100, 50, 128, 1.0)
    assert not kernel.supports(x_MC, codebook_KC)
    assert not kernel.supports(x_MC[:, :32].double(), codebook_KC[:, :32].double())
    assert_nearest(x_MC, codebook_KC, nearest_code(x_MC, codebook_KC))
