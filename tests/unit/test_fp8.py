"""Linear layers in FP8: near the exact products, both ways; and how they take part in a step."""

import pytest
import torch
import torch.distributed as dist

from megadual.model import fp8
from megadual.testing.distributed import run_distributed

ROWS, IN, OUT = 96, 64, 48


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def layer(bias: bool = True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(OUT, IN, generator=generator) * 0.02)
    x = torch.randn(2, ROWS // 2, IN, generator=generator, requires_grad=True)
    bias_O = torch.nn.Parameter(torch.randn(OUT, generator=generator)) if bias else None
    return weight, x, bias_O, torch.randn(2, ROWS // 2, OUT, generator=generator) * 1e-4


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def run(weight, x, bias_O, upstream, group):
    held = fp8.Weight(weight)
    fp8.update([held], group)
    y = held.multiply(x, bias_O)
    y.backward(upstream)
    return y


def test_near_the_exact_product_and_gradients(alone):
    weight, x, bias_O, upstream = layer()
    y = run(weight, x, bias_O, upstream, alone)
    exact = [each.detach().double().requires_grad_() for each in (weight, x, bias_O)]
    expected = torch.nn.functional.linear(exact[1], exact[0], exact[2])
    expected.backward(upstream.double())
    assert error(y, expected) < 0.04
    assert error(x.grad, exact[1].grad) < 0.08  # upstream has two bits of mantissa
    assert error(weight.grad, exact[0].grad) < 0.08
    assert error(bias_O.grad, exact[2].grad) < 1e-6
    assert error(y, expected) > 1e-3  # it is FP8


def test_a_weights_gradient_is_added(alone):
    weight, x, _, upstream = layer(bias=False)
    run(weight, x, None, upstream, alone)
    expected, weight.grad = weight.grad.clone(), None
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(OUT, IN), False
    run(weight, x, None, upstream, alone)
    torch.testing.assert_close(weight.main_grad, 1 + expected)
    assert weight.grad_added_to_main_grad and weight.grad is not None


def test_what_is_frozen_keeps_no_input(alone):
    weight, x, _, upstream = layer(bias=False)
    weight.requires_grad_(False)
    held = fp8.Weight(weight)
    fp8.update([held], alone)
    y = held.multiply(x, None)
    assert y.grad_fn.saved_tensors[0] is None
    y.backward(upstream)
    assert x.grad is not None and weight.grad is None


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(alone):
    weight, x, _, upstream = layer(bias=False)
    held = fp8.Weight(weight)
    fp8.update([held], alone)
    assert not held.multiply(torch.zeros_like(x), None).any()
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            x[0, 3, 5] = bad
        assert not held.multiply(x, None)[0, 3].isfinite().all()


def gathered_and_split() -> list[torch.Tensor]:
    """Positions dealt to ranks and gathered, the weight's outputs dealt to them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weight, x, _, upstream = layer(bias=False)
    x, upstream = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    own_x = x.chunk(ranks)[rank].clone().requires_grad_()
    held = fp8.Weight(torch.nn.Parameter(weight.detach().chunk(ranks)[rank]))
    group = dist.group.WORLD
    fp8.update([held], group)
    y = held.multiply(own_x, None, gather=ranks > 1, group=group)
    y.backward(upstream.chunk(ranks, dim=1)[rank].contiguous())
    return [held.scale, y.detach(), own_x.grad, held.parameter.grad]


def test_ranks_that_share_rows_and_weight_do_what_one_does():
    ((scale, y, x_gradient, weight_gradient),) = run_distributed(gathered_and_split, 1)
    of_ranks = run_distributed(gathered_and_split, 2)
    assert all(torch.equal(each[0], scale) for each in of_ranks)
    torch.testing.assert_close(torch.cat([each[1] for each in of_ranks], dim=1), y)
    # Upstream has a scale on each rank: equal but for its rounding.
    assert error(torch.cat([each[2] for each in of_ranks]), x_gradient.double()) < 0.06
    assert error(torch.cat([each[3] for each in of_ranks]), weight_gradient.double()) < 0.06
