"""The residual quantiser against brute force and slow references."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadual.testing.distributed import run_distributed
from megadual.vision import quantizer as quantizer_module
from megadual.vision.quantizer import ResidualQuantizer, nearest_code, residual_codes

K, C, D = 12, 4, 3


def build(timing: str, restart: bool = False, decay: float = 0.9) -> ResidualQuantizer:
    torch.manual_seed(1)
    return ResidualQuantizer(K, C, D, decay, restart, timing).train()


def slow_nearest(x, codes):
    return min(range(len(codes)), key=lambda k: ((x - codes[k]) ** 2).sum().item())


class SlowCodebook:
    """EMA statistics one row at a time, in double precision."""

    def __init__(self, codes, decay):
        self.codes, self.decay = codes.clone().double(), decay
        self.counts, self.sums = torch.ones(len(codes)).double(), codes.clone().double()

    def update(self, rows, indices):
        for k in range(len(self.codes)):
            mine = [row for row, index in zip(rows, indices, strict=True) if index == k]
            total = sum(mine, torch.zeros(C).double())
            self.counts[k] = self.decay * self.counts[k] + (1 - self.decay) * len(mine)
            self.sums[k] = self.decay * self.sums[k] + (1 - self.decay) * total
        for k in range(len(self.codes)):
            n = self.counts.sum()
            size = (self.counts[k] + 1e-5) / (n + len(self.codes) * 1e-5) * n
            self.codes[k] = self.sums[k] / size


def slow_forward(x, codebook, timing):
    """Codes [row][depth], quantised rows and the commitment loss; moves the codebook as the paper's A3 says."""
    residuals, quantized = [row.clone() for row in x], [torch.zeros(C).double() for _ in x]
    codes, losses, seen_rows, seen_codes = [[] for _ in x], [], [], []
    for _ in range(D):
        indices = [slow_nearest(row, codebook.codes) for row in residuals]
        vectors = [codebook.codes[k].clone() for k in indices]
        if timing == "per_depth":
            codebook.update(residuals, indices)
        seen_rows += residuals
        seen_codes += indices
        residuals = [row - vector for row, vector in zip(residuals, vectors, strict=True)]
        quantized = [q + vector for q, vector in zip(quantized, vectors, strict=True)]
        for code, k in zip(codes, indices, strict=True):
            code.append(k)
        losses.append(sum(((row - q) ** 2).mean() for row, q in zip(x, quantized, strict=True)) / len(x))
    if timing == "per_step":
        codebook.update(seen_rows, seen_codes)
    return torch.tensor(codes), torch.stack(quantized), sum(losses) / D


def test_nearest_code_is_brute_force_nearest_in_any_chunking(monkeypatch):
    torch.manual_seed(0)
    x, codes = torch.randn(101, 6), torch.randn(17, 6)
    expected = torch.cdist(x.double(), codes.double()).argmin(dim=1)
    assert torch.equal(nearest_code(x, codes), expected)
    monkeypatch.setattr(quantizer_module, "SCORES_AT_ONCE", 3 * len(codes))
    assert torch.equal(nearest_code(x, codes), expected)


@pytest.mark.parametrize("timing", ["per_depth", "per_step"])
def test_both_timings_equal_a_slow_reference_over_three_steps(timing):
    quantizer = build(timing)
    reference = SlowCodebook(quantizer.codebook.codes, 0.9)
    for step in range(3):
        x = torch.randn(2, 10, C, generator=torch.Generator().manual_seed(step))
        quantized, codes, commitment = quantizer(x)
        slow_codes, slow_quantized, slow_commitment = slow_forward(list(x.flatten(0, 1).double()), reference, timing)
        assert torch.equal(codes.flatten(0, 1), slow_codes)
        torch.testing.assert_close(quantized.flatten(0, 1), slow_quantized.float())
        torch.testing.assert_close(commitment, slow_commitment.float())
        torch.testing.assert_close(quantizer.codebook.codes, reference.codes.float())


def test_the_timings_differ():
    x = torch.randn(2, 10, C, generator=torch.Generator().manual_seed(0))
    per_depth, per_step = build("per_depth"), build("per_step")
    per_depth(x), per_step(x)
    assert not torch.allclose(per_depth.codebook.codes, per_step.codebook.codes)


def _train_on_share(timing, x):
    import torch.distributed as dist

    quantizer = build(timing)
    for part in x:
        quantizer(part.chunk(dist.get_world_size())[dist.get_rank()])
    return quantizer.codebook.codes.clone(), quantizer.codebook.cluster_size_ema


@pytest.mark.parametrize("timing", ["per_depth", "per_step"])
def test_two_processes_equal_one_on_the_joined_batch(timing):
    x = torch.randn(3, 8, 5, C, generator=torch.Generator().manual_seed(0))
    single = build(timing)
    for part in x:
        single(part)
    for codes, counts in run_distributed(_train_on_share, 2, timing, x):
        torch.testing.assert_close(codes, single.codebook.codes)
        torch.testing.assert_close(counts, single.codebook.cluster_size_ema)


def _restart_on_share(x):
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    quantizer = ResidualQuantizer(K, C, D, 0.9, True, "per_step").train()
    quantizer.codebook.weight.data.fill_(0.5)  # all rows choose code 0, the others die
    quantizer(x[dist.get_rank()])
    return quantizer.codebook.codes.clone()


def test_restarted_codes_come_from_rank_0_on_all_ranks():
    x = torch.randn(2, 8, 5, C, generator=torch.Generator().manual_seed(0))
    first, second = run_distributed(_restart_on_share, 2, x)
    assert torch.equal(first[1:], second[1:])
    rows = torch.cdist(first[1:], torch.cat([x[0].flatten(0, 1), x[0].flatten(0, 1) - 0.5]))
    assert (rows.min(dim=1).values < 2).all()


def test_dead_codes_restart_until_most_are_used():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(64, C, D, 0.9, True, "per_step").train()
    quantizer.codebook.weight.data[1:] += 100.0  # out of reach of the data
    quantizer.codebook.embed_ema.copy_(quantizer.codebook.codes)
    data = torch.randn(32, 16, C)
    assert quantizer.eval()(data)[1].unique().numel() <= 2
    quantizer.train()
    for _ in range(20):
        quantizer(data)
    assert quantizer.codebook.restarted > 0
    assert quantizer.eval()(data)[1].unique().numel() >= 0.8 * 64


def test_gradient_goes_straight_through_and_the_value_is_the_code_sum():
    quantizer = build("per_step").eval()
    x = torch.randn(2, 5, C, requires_grad=True)
    quantized, codes, _ = quantizer(x)
    assert torch.equal(quantized, quantizer.embed(codes))
    wanted = torch.randn_like(quantized)
    (quantized * wanted).sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    assert quantizer.codebook.weight.grad is None


def test_evaluation_leaves_the_codebook_alone_and_bf16_autocast_does_not_change_codes():
    quantizer = build("per_depth").eval()
    before = quantizer.codebook.codes.clone()
    x = torch.randn(4, 50, C)
    codes = quantizer(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x)[1], codes)
    assert torch.equal(quantizer.codebook.codes, before)


def test_residual_codes_are_those_of_the_quantiser():
    quantizer = build("per_step").eval()
    x = torch.randn(2, 50, C)
    codes = residual_codes(x.flatten(0, 1), quantizer.codebook.codes, D)
    assert torch.equal(codes, quantizer(x)[1].flatten(0, 1))


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation inside gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("timing", ["per_depth", "per_step"])
def test_training_never_holds_a_positions_by_codes_matrix(timing):
    """Scaled down from 384/rvq8: there 23,328 positions by 16,384 codes would be 1.5 GB for each depth."""
    quantizer = ResidualQuantizer(16384, 4, 2, 0.9, restart_unused_codes=True, timing=timing).train()
    x = torch.randn(3, 1024, 4, requires_grad=True)
    with LargestTensor() as largest:
        quantizer(x)[0].sum().backward()
    assert largest.numbers <= quantizer_module.SCORES_AT_ONCE < 3 * 1024 * 16384
