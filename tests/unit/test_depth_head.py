"""The visual head: causal over depths, its loss that of its logits, empty batches allowed."""

import pytest
import torch
import torch.nn.functional as F

from megadual.model.depth_head import DepthHead, causal_attention, tiled_causal_attention

P, D, K, C, H = 7, 4, 32, 6, 24


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = DepthHead(hidden=H, width=16, layers=2, heads=2, ffn=32, depth=D, codebook_size=K, code_dim=C).double()
    torch.nn.init.normal_(head.depth_embedding)
    return head


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(P, H, generator=generator, dtype=torch.float64)
    codes = torch.randint(K, (P, D), generator=generator)
    return hidden, codes, torch.randn(K, C, generator=generator, dtype=torch.float64)


def test_loss_is_that_of_the_logits(head, inputs):
    hidden, codes, codebook = inputs
    logits = head.logits(hidden, codes[:, :-1], codebook)
    expected = [F.cross_entropy(logits[:, d], codes[:, d], reduction="sum").item() for d in range(D)]
    assert head(hidden, codes, codebook).tolist() == pytest.approx(expected, rel=1e-5)  # in fp32, as in training


@pytest.mark.parametrize("n", [1, 3, 8])
def test_attention_of_many_positions_at_once(n):
    """Positions share a tile and see nothing of each other."""
    q, k, v = torch.randn(3, 2 * (128 // n), 2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled_causal_attention(q, k, v), causal_attention(q, k, v))


def test_depth_d_sees_only_the_codes_before_it(head, inputs):
    hidden, codes, codebook = inputs
    logits = head.logits(hidden, codes[:, :-1], codebook)
    for d in range(D - 1):
        changed = codes.clone()
        changed[:, d] = (changed[:, d] + 1) % K
        other = head.logits(hidden, changed[:, :-1], codebook)
        assert torch.equal(other[:, : d + 1], logits[:, : d + 1])
        assert not torch.allclose(other[:, d + 1], logits[:, d + 1])


def test_input_is_the_sum_of_the_codes_before(head, inputs):
    """Codes 0 and 1 exchanged give the same input at depth 2, paper's I_d."""
    hidden, codes, codebook = inputs
    head.layers = torch.nn.ModuleList()  # leaves only the inputs
    swapped = codes[:, [1, 0, 2, 3]]
    a, b = (head.states(hidden, c[:, :-1], codebook) for c in (codes, swapped))
    assert torch.allclose(a[:, 2], b[:, 2])
    assert not torch.allclose(a[:, 1], b[:, 1])


def test_no_position_to_draw(head, inputs):
    hidden, codes, codebook = inputs
    loss = head(hidden[:0].requires_grad_(), codes[:0], codebook)
    assert loss.tolist() == [0.0] * D
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
