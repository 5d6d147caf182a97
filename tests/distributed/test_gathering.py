"""Weights that are gathered beside the forward pass: nothing reads them before they have come."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

from megadual.engine import megatron_internals
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE, differences
from megadual.train.metrics import numbers_of

NAMES = ["DP2", "CP2", "TP2xDP2, micro-batch 2", "PP2xDP2", "PP2xVPP2xDP2", "DP2, tied", "PP2xDP2, tied"]
LAYOUTS = LAYOUTS | {
    "PP2xDP2": (4, LAYOUTS["PP2"][1]),
    "PP2xVPP2xDP2": (4, LAYOUTS["PP2xVPP2"][1]),
    "DP2, tied": (2, ["model.tie_embeddings=true"]),
    "PP2xDP2, tied": (4, [*LAYOUTS["PP2"][1], "model.tie_embeddings=true"]),
}


class Late:
    """A gathering whose weights come when they are waited for, and are NaN until then."""

    def __init__(self, of: BucketGroup):
        self.group = of.intra_distributed_optimizer_instance_group
        self.shares = [bucket.param_data.view(self.group.size(), -1) for bucket in of.buckets]
        for share in self.shares:
            for rank, part in enumerate(share):
                if rank != self.group.rank():
                    part.fill_(torch.nan)

    @torch.no_grad()
    def wait(self) -> None:
        for share in self.shares:
            dist.all_gather_into_tensor(share.view(-1), share[self.group.rank()].clone(), group=self.group)


def start_late(of: BucketGroup, force_sync: bool = False) -> None:
    if not force_sync:
        assert of.param_gather_handle is None
        of.param_gather_handle, of.param_gather_dispatched = Late(of), True
    elif of.param_gather_handle:
        of.param_gather_handle.wait()
        of.param_gather_handle = None


def losses_with_late_weights(run, all_waited_for: bool = True):
    """Each step's numbers, and held-out losses before the last."""
    if dist.get_world_size() > 1:
        BucketGroup.start_param_sync = start_late
    if not all_waited_for:
        megatron_internals.wait_for_weights = lambda wrapped: None
    engine, data = tiny.build(run)
    results = [numbers_of(engine.train_step(data.step(step))) for step in range(3)]
    held_out = engine.evaluate(data.step(3))
    results.append(numbers_of(engine.train_step(data.step(3))))
    assert all(weight.isfinite().all() for weight in tiny.weights_of(engine).values())
    engine.shutdown()
    return results, held_out


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_tiny_set(tmp_path_factory.mktemp("gathering") / "set")


@pytest.fixture(scope="module")
def run_in(shards, tmp_path_factory):
    return lambda *overrides: tiny.tiny_run(tmp_path_factory.mktemp("run"), shards, *overrides)


@pytest.mark.parametrize("layout", NAMES)
def test_modules_wait_for_their_weights(run_in, layout):
    processes, overrides = LAYOUTS[layout]
    tied = [override for override in overrides if "tie" in override]
    ((expected, held_out),) = run_distributed(losses_with_late_weights, 1, run_in(*tied))
    for results, losses in run_distributed(losses_with_late_weights, processes, run_in(*overrides)):
        assert max(differences(results, expected)) < TOLERANCE["fp32"]
        assert losses == pytest.approx(held_out, abs=TOLERANCE["fp32"])


def test_weights_that_nothing_waits_for_are_noticed(run_in):
    with pytest.raises(RuntimeError, match="isfinite"):
        run_distributed(losses_with_late_weights, 2, run_in(), False)
