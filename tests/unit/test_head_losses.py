"""A visual head on more positions than it keeps the activations of."""

import pytest
import torch

from megadual.model.depth_head import DepthHead
from megadual.model.dual_lm import head_losses

P, D, K, C, HIDDEN = 50, 3, 96, 8, 64


def made() -> tuple[DepthHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = DepthHead(HIDDEN, 32, 2, 2, 48, D, K, C)
    return head, torch.randn(P, HIDDEN, requires_grad=True), torch.randint(K, (P, D)), torch.randn(K, C)


def kept_bytes(call) -> tuple[torch.Tensor, int]:
    """What `call` returns, and how much it keeps for backward, parameters aside."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    return result, sum(kept.values())


@pytest.mark.parametrize("at_once", [1, 16, 49, 50, 80])
def test_losses_and_gradients_do_not_change(at_once):
    def run(bound: int | None) -> list[torch.Tensor]:
        head, hidden_PH, codes_PD, codebook_KC = made()
        losses_D = head_losses(head, hidden_PH, codes_PD, codebook_KC, bound)
        (losses_D * torch.tensor([0.5, 1.0, 2.0])).sum().backward()
        assert hidden_PH.grad is not None
        return [losses_D.detach(), hidden_PH.grad, *(p.grad for p in head.parameters() if p.grad is not None)]

    for got, expected in zip(run(at_once), run(None), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_more_positions_keep_no_more():
    head, hidden_PH, codes_PD, codebook_KC = made()
    _, all_of_them = kept_bytes(lambda: head_losses(head, hidden_PH, codes_PD, codebook_KC, None))
    _, ten = kept_bytes(lambda: head_losses(head, hidden_PH[:10], codes_PD[:10], codebook_KC, None))
    _, bounded = kept_bytes(lambda: head_losses(head, hidden_PH, codes_PD, codebook_KC, 10))
    assert bounded <= ten + hidden_PH.nbytes + codes_PD.nbytes < all_of_them / 2


def test_nothing_is_made_again_without_gradients():
    head, hidden_PH, codes_PD, codebook_KC = made()
    called = []
    head.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        head_losses(head, hidden_PH, codes_PD, codebook_KC, 10)
    assert len(called) == 1
