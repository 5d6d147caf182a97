"""Stages that run ahead compute what megatron-core's schedule does, bitwise where scales are powers of two."""

import pytest

from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE, differences

_PP, _AHEAD = "parallel.pipeline=2", "parallel.run_ahead=1"
OURS = {
    "PP2": (2, [_PP]),
    "PP2, tied": (2, [_PP, "model.tie_embeddings=true"]),
    "PP2, bf16": (2, [_PP, "train.precision=bf16"]),
    "PP2, one part": (2, [_PP, "train.parts=[heads]"]),
    "PP4, heads alone": LAYOUTS["PP4, heads alone"],
    "TP2xPP2+SP": LAYOUTS["TP2xPP2+SP"],
    "PP2xDP2": (4, [_PP]),
    "PP2xCP2+recompute": LAYOUTS["PP2xCP2+recompute"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_tiny_set(tmp_path_factory.mktemp("ahead") / "set", conversations=100)


@pytest.mark.parametrize("layout", OURS)
def test_equals_megatrons_schedule(tmp_path, shards, layout):
    processes, overrides = OURS[layout]
    runs = [tiny.tiny_run(tmp_path, shards, "train.steps=3", *overrides, *more) for more in ([], [_AHEAD])]
    for plain, ahead in run_distributed(tiny.losses_of, processes, runs):
        assert ahead == plain


def test_fewer_micro_batches_than_stages(tmp_path, shards):
    plain = ["train.steps=2", "parallel.pipeline=4", "train.global_batch_tokens=128"]
    runs = [tiny.tiny_run(tmp_path, shards, *plain, *more) for more in ([], [_AHEAD])]
    for got, ahead in run_distributed(tiny.losses_of, 4, runs):
        assert ahead == got


def test_micro_batches_that_are_no_power_of_two(tmp_path, shards):
    run = [tiny.tiny_run(tmp_path, shards, "train.global_batch_tokens=448", *more) for more in ([], [_PP, _AHEAD])]
    (expected,) = run_distributed(tiny.losses, 1, run[0])
    assert max(differences(run_distributed(tiny.losses, 2, run[1])[0], expected)) < TOLERANCE["fp32"]
