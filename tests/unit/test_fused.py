"""The fused operations against their plain form, and their memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from megadual.engine import cpu

cpu.install()

from megadual.model.attention import rotary_angles  # noqa: E402
from megadual.model.fused import linear_cross_entropy, rotate, swiglu  # noqa: E402
from megadual.testing.distributed import run_distributed  # noqa: E402


def inputs(B: int, P: int, K: int, W: int):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(B, n, W, generator=generator, requires_grad=True) for n in (P, K))
    return x, weight, torch.randint(K, (B, P), generator=generator), torch.rand(B, generator=generator)


def plain(x, weight, target):
    layers = zip(x, weight, target, strict=True)
    return torch.stack([F.cross_entropy(a @ b.T, t, reduction="sum") for a, b, t in layers])


@pytest.mark.parametrize("at_once", [7, 1 << 20], ids=["one position a time", "all at once"])
@pytest.mark.parametrize("B, P, K, W", [(1, 300, 50, 16), (3, 20, 33, 8), (2, 0, 9, 4)])
def test_linear_cross_entropy(B, P, K, W, at_once):
    x, weight, target, upstream = inputs(B, P, K, W)
    expected, got = plain(x, weight, target), linear_cross_entropy(x, weight, target, at_once)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss @ upstream, (x, weight)) for loss in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_weights_alone_have_a_gradient():
    x, weight, target, _ = inputs(1, 20, 33, 8)
    linear_cross_entropy(x.detach(), weight, target).sum().backward()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(plain(x, weight, target).sum(), weight)[0])


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_more_logits_than_at_once():
    """Forward and backward; a plain cross-entropy makes all of them."""
    x, weight, target, _ = inputs(1, 600, 1000, 8)
    for loss_of, most in ((linear_cross_entropy, 200 * 1000), (plain, 600 * 1000)):
        with LargestTensor() as largest:
            more = (200 * 1000,) if loss_of is linear_cross_entropy else ()
            loss_of(x, weight, target, *more).sum().backward()
        assert largest.elements == most


def split_classes():
    """(loss, gradient of x summed over ranks, this rank's gradient of its classes)"""
    import torch.distributed as dist

    x, weight, target, _ = inputs(1, 20, 32, 8)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = weight.detach().chunk(size, dim=1)[rank].clone().requires_grad_()
    loss = linear_cross_entropy(x, own, target, 64, dist.group.WORLD)
    loss.sum().backward()
    dist.all_reduce(x.grad)
    return loss.detach(), x.grad, own.grad


def test_classes_split_over_ranks():
    x, weight, target, _ = inputs(1, 20, 32, 8)
    expected = plain(x, weight, target)
    expected.sum().backward()
    results = run_distributed(split_classes, 2)
    for loss, x_gradient, _ in results:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(x_gradient, x.grad)
    torch.testing.assert_close(torch.cat([part for *_, part in results], dim=1), weight.grad)


def test_swiglu():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotate_is_transformers(dtype, tolerance):
    """Values and gradients of Qwen2's own rotary embedding, at positions that restart."""
    positions = torch.cat([torch.arange(30), torch.arange(11)])
    x = torch.randn(len(positions), 4, 16).to(dtype).requires_grad_()
    qwen = Qwen2RotaryEmbedding(Qwen2Config(hidden_size=64, num_attention_heads=4, rope_theta=1e4))
    cos, sin = qwen(x.float(), positions[None])
    expected = apply_rotary_pos_emb(x.float().transpose(0, 1)[None], x.float().transpose(0, 1)[None], cos, sin)[0]
    expected = expected[0].transpose(0, 1)
    got = rotate(x, rotary_angles(positions, 16, 1e4))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape)
    gradients = [torch.autograd.grad(y, x, upstream.to(y.dtype))[0].float() for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=5 * tolerance)
