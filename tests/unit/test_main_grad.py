"""What goes to `main_grad` is the gradient that autograd would give, added to what is there."""

import pytest
import torch

from megadual.model.fused import linear_cross_entropy
from megadual.model.main_grad import Linear, lookup


def as_data_parallelism_does(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Give it a `main_grad`, which already holds ones."""
    parameter.main_grad = torch.ones_like(parameter, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    return parameter.main_grad


def linear():
    torch.manual_seed(0)
    module = Linear(5, 3).double()
    return module.weight, lambda: module(torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).double())


def table():
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    ids, counts = torch.tensor([1, 5, 1, 5, 2]), torch.tensor([True, True, True, False, True])
    return weight, lambda: lookup(weight, ids, counts)[counts]


def output_layers():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2, 7, 4, generator=generator))
    x, target = torch.randn(2, 5, 4, generator=generator), torch.randint(7, (2, 5), generator=generator)
    return weight, lambda: linear_cross_entropy(x, weight, target, logits_at_once=28) * torch.tensor([0.5, 2.0])


@pytest.mark.parametrize("make", [linear, table, output_layers])
def test_the_gradient_is_added(make):
    parameter, run = make()
    run().square().sum().backward()
    expected, parameter.grad = parameter.grad.clone(), None
    main_grad = as_data_parallelism_does(parameter)
    for times in (1, 2):
        run().square().sum().backward()
        torch.testing.assert_close(main_grad, 1 + times * expected.float())
        assert parameter.grad_added_to_main_grad and parameter.grad is not None  # hooks are run
        parameter.grad = None
