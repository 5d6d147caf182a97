"""The model's GPU paths against plain ones: packed attention, fused output layers, visual heads, whole steps."""

import pytest
import torch
import torch.nn.functional as F

from megadual.model import attention
from megadual.model.attention import PackedDocuments, rotary_angles
from megadual.model.depth_head import DepthHead
from megadual.model.fused import linear_cross_entropy, rotate, swiglu


def packed(lengths: list[int], key_lengths: list[int] | None = None) -> PackedDocuments:
    bounds = [torch.tensor([0, *some], device="cuda").cumsum(0).int() for some in (lengths, key_lengths or lengths)]
    longest = max(key_lengths or lengths)
    return PackedDocuments(cu_seqlens_q=bounds[0], cu_seqlens_kv=bounds[1], max_seqlen_q=longest, max_seqlen_kv=longest)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("heads, groups, width", [(28, 4, 128), (16, 16, 128), (8, 2, 64), (4, 2, 48), (4, 2, 16)])
@pytest.mark.parametrize(
    "lengths, key_lengths",
    [([700, 1, 129, 2000], None), ([4096], None), ([100, 412], [900, 412])],
    ids=["documents", "one document", "the later part of a document"],
)
def test_packed_attention(heads, groups, width, lengths, key_lengths):
    """What this machine's kernel gives, forward and backward, against SDPA of each document in fp64."""
    documents = packed(lengths, key_lengths)
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((sum(lengths), heads), (sum(key_lengths or lengths), groups), (sum(key_lengths or lengths), groups))
    inputs = [
        torch.randn(n, h, width, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for n, h in sizes
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = attention.gpu_kernel(width)(*inputs, documents, width**-0.5)
    expected = attention.attend_each(*exact, documents, width**-0.5)
    upstream = torch.randn(got.shape, device="cuda", generator=generator)
    got.backward(upstream.bfloat16())
    expected.backward(upstream.bfloat16().double())
    assert relative_error(got, expected) < 1e-2
    for x, y in zip(inputs, exact, strict=True):
        assert relative_error(x.grad, y.grad) < 1e-2


def test_a_packed_kernel_is_there():
    assert attention.gpu_kernel(64) is not attention.attend_each


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_linear_cross_entropy(dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(0)
    for positions in (1, 300, 1000):  # compiled code is used again for other numbers of rows
        x = torch.randn(2, positions, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(2, 5000, 64, device="cuda", generator=generator).mul(0.1).to(dtype).requires_grad_()
        target = torch.randint(5000, (2, positions), device="cuda", generator=generator)
        logits = torch.bmm(x.double(), weight.double().mT)
        expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(2, -1).sum(1)
        upstream = torch.tensor([0.3, 0.7], device="cuda")
        wanted = torch.autograd.grad((expected * upstream).sum(), (x, weight))
        got = linear_cross_entropy(x, weight, target, logits_at_once=2 * 5000 * 256)
        torch.testing.assert_close(got.double(), expected.detach(), rtol=tolerance, atol=0)
        for a, b in zip(torch.autograd.grad((got * upstream).sum(), (x, weight)), wanted, strict=True):
            assert relative_error(a, b.double()) < tolerance


def test_swiglu():
    for rows in (1, 7, 64):
        x = torch.randn(rows, 128, device="cuda", requires_grad=True)
        gate, up = x.chunk(2, -1)
        expected, upstream = F.silu(gate) * up, torch.randn(rows, 64, device="cuda")
        got = swiglu(x)
        torch.testing.assert_close(got, expected)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (got, expected)]
        torch.testing.assert_close(*gradients)


def test_rotate():
    """Compiled, on a strided view as megatron-core hands it over, against the same in fp64 on the CPU."""
    for rows in (1, 7, 300):
        x = torch.randn(rows, 3, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        angles, upstream = rotary_angles(torch.arange(rows, device="cuda"), 64, 1e6), torch.randn(rows, 3, 64)
        got, exact = rotate(x[:, :, 32:], angles), x.detach().double().cpu().requires_grad_()
        a, b = exact[:, :, 32:].chunk(2, -1)
        cos, sin = angles.double().cpu().cos()[:, None], angles.double().cpu().sin()[:, None]
        expected = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        got.backward(upstream.cuda().bfloat16())
        expected.backward(upstream.bfloat16().double())
        assert relative_error(got.cpu(), expected) < 1e-2
        assert relative_error(x.grad.cpu(), exact.grad) < 1e-2


@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("positions", [1, 150])
def test_visual_head_is_the_cpus(depth, positions):
    torch.manual_seed(0)
    head = DepthHead(hidden=64, width=64, layers=2, heads=2, ffn=128, depth=depth, codebook_size=512, code_dim=8)
    hidden, codes = torch.randn(positions, 64), torch.randint(512, (positions, depth))
    codebook = torch.randn(512, 8)
    expected = head(hidden, codes, codebook)
    gradients = torch.autograd.grad(expected.sum(), head.parameters())
    head.cuda()
    got = head(hidden.cuda(), codes.cuda(), codebook.cuda())
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), head.parameters()), gradients, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


def test_output_layer_never_holds_its_logits():
    """Beyond the gradients, no more is held than the logits that are made at once."""
    positions, classes, width, at_once = 4096, 65_536, 256, 1 << 25
    x = torch.randn(1, positions, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1, classes, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(classes, (1, positions), device="cuda")

    def run():
        x.grad = weight.grad = None
        linear_cross_entropy(x, weight, target, at_once).sum().backward()

    run()
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    logits = positions * classes * 2
    gradients = 2 * (x.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before < gradients + 2 * at_once * 2 < logits
