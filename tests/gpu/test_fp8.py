"""FP8 on a GPU: the kernel casts as PyTorch does, and a layer is near the exact one."""

import pytest
import torch

from megadual.model import fp8


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.GRADIENT])
@pytest.mark.parametrize("rows, columns", [(64, 128), (4096, 3584), (100, 72)])
def test_casts_as_pytorch_does(rows, columns, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, columns, device="cuda", generator=generator).bfloat16()
    scale = fp8.scale_of(fp8.largest_of(x), dtype)
    along, across = fp8.cast(x, scale, dtype)
    expected, expected_across = fp8.cast(x.cpu(), scale.cpu(), dtype)
    as_bytes = [each.cpu().view(torch.uint8) for each in (along, across, expected, expected_across)]
    assert torch.equal(as_bytes[0], as_bytes[2]) and torch.equal(as_bytes[1], as_bytes[3])


def test_what_is_not_finite_stays_so():
    x = torch.ones(64, 128, device="cuda", dtype=torch.bfloat16)
    x[3, 5] = float("nan")
    along, across = fp8.cast(x, torch.ones((), device="cuda"), fp8.FORWARD)
    assert along.float()[3, 5].isnan() and across.float()[5, 3].isnan()


def test_near_the_exact_layer():
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(512, 256, device="cuda", generator=generator) * 0.02).bfloat16())
    x = torch.randn(1024, 1, 256, device="cuda", generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(1024, 1, 512, device="cuda", generator=generator).bfloat16()
    held = fp8.Weight(weight)
    with torch.no_grad():
        held.scale = fp8.scale_of(fp8.largest_of(weight), fp8.FORWARD)
        held.along_OI, held.across_IO = fp8.cast(weight, held.scale, fp8.FORWARD)
    y = held.multiply(x, None)
    y.backward(upstream)
    exact = [each.detach().double().requires_grad_() for each in (weight, x)]
    expected = exact[1] @ exact[0].T
    expected.backward(upstream.double())
    for got, wanted in ((y, expected), (x.grad, exact[1].grad), (weight.grad, exact[0].grad)):
        assert 1e-3 < ((got.double() - wanted).norm() / wanted.norm()).item() < 0.08
