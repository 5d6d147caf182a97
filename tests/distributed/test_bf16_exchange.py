"""Gradients exchanged in bf16: what each rank gets, and how far training is from that of one process."""

import pytest
import torch
import torch.distributed as dist

from megadual.engine.bf16_exchange import ReduceScatter
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE, differences

RANKS, SHARE = 4, 5


def gradients_of(rank: int) -> torch.Tensor:
    return torch.randn(RANKS * SHARE, generator=torch.Generator().manual_seed(rank))


def reduced(buckets: int) -> list[torch.Tensor]:
    """This rank's shares of several buckets, all under way before the first is waited for."""
    reduce, held = ReduceScatter(), [gradients_of(dist.get_rank()) * (1 + i) for i in range(buckets)]
    shares = [gradients.view(RANKS, SHARE)[dist.get_rank()] for gradients in held]
    works = [
        reduce(share, gradients, dist.ReduceOp.SUM, dist.group.WORLD, async_op=True)
        for share, gradients in zip(shares, held, strict=True)
    ]
    for work in works:
        work.wait()
    return shares


def test_others_are_rounded_once_and_the_sum_is_not():
    for rank, shares in enumerate(run_distributed(reduced, RANKS, 2)):
        for i, share in enumerate(shares):
            all_ = [(gradients_of(other) * (1 + i)).view(RANKS, SHARE)[rank] for other in range(RANKS)]
            rounded = [part if other == rank else part.bfloat16().float() for other, part in enumerate(all_)]
            torch.testing.assert_close(share, torch.stack(rounded).sum(0), rtol=1e-6, atol=1e-6)


def losses_in_turn(run, other):
    """In one process, so that the one must not leave its way of exchanging to the other."""
    return tiny.losses(run), tiny.losses(other)


@pytest.mark.parametrize("layout", ["DP2", "DP4", "CP2xDP2", "PP2xVPP2xDP2"])
def test_training_is_within_the_rounding(tmp_path, layout):
    shards = tiny.write_tiny_set(tmp_path / "set")
    processes, overrides = (LAYOUTS | {"PP2xVPP2xDP2": (4, LAYOUTS["PP2xVPP2"][1])})[layout]
    in_bf16, in_fp32 = (
        tiny.tiny_run(tmp_path, shards, *overrides, f"train.grad_reduce_dtype={dtype}") for dtype in ("bf16", "fp32")
    )
    (expected,) = run_distributed(tiny.losses, 1, tiny.tiny_run(tmp_path, shards))
    for rounded, exact in run_distributed(losses_in_turn, processes, in_bf16, in_fp32):
        assert 1e-6 < max(differences(rounded, expected)) < TOLERANCE["bf16"]
        assert max(differences(exact, expected)) < TOLERANCE["fp32"]
