"""The plan's speed: what costs time makes it slower, and what is not known is said."""

import pytest

from megadual.engine import cpu

cpu.install()

from megadual.engine.choose import fastest  # noqa: E402
from megadual.engine.estimate import GIB, estimate  # noqa: E402
from megadual.engine.predict import predict, rates_of  # noqa: E402
from megadual.engine.stages import Traffic, costs, split_layers  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.errors import UserError  # noqa: E402
from megadual.testing import tiny  # noqa: E402

TRAFFIC = Traffic(text=0.46, drawn=0.27, image=0.53, attended=1400, fill=0.95)
SEVEN_B = [
    "model.preset=7b", "model.layers=28", "model.hidden=3584", "model.ffn=18944", "model.heads=28", "model.kv_heads=4",
    "model.head.width=2048", "model.head.layers=3", "model.head.heads=16", "model.head.ffn=5504",
    "train.precision=bf16", "train.seq_len=4096", "train.global_batch_tokens=2097152",
]  # fmt: skip


def speed(tmp_path, world: int, *overrides: str):
    run = tiny.tiny_run(tmp_path, tmp_path, *SEVEN_B, *overrides)
    vocabulary = tiny.vocabulary()
    cost = costs(run, vocabulary, TRAFFIC)
    run.parallel.stage_layers = split_layers(run.model.layers, run.parallel.pipeline, cost)
    return predict(run, topology(run, world), vocabulary, TRAFFIC, rates_of("H100"))


def test_what_costs_time_is_counted(tmp_path):
    alone = speed(tmp_path, 1)
    assert 0.4 < alone.mfu < 0.6
    assert alone.step_s == pytest.approx(2097152 / alone.tokens_per_s)
    for world, overrides in (
        (8, ()),
        (2, ("parallel.pipeline=2",)),
        (2, ("parallel.tensor=2", "parallel.sequence=true")),
        (1, ("train.recompute=true",)),
        (2, ("engine=deepspeed", "parallel.zero_stage=3")),
    ):
        other = speed(tmp_path, world, *overrides)
        assert 0.4 * alone.tokens_per_s < other.tokens_per_s < alone.tokens_per_s, overrides
    assert speed(tmp_path, 64).tokens_per_s < speed(tmp_path, 8).tokens_per_s  # between hosts


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match=r"no rates of 'B17'; known: H100"):
        rates_of("B17")


def test_the_fastest_layout_fits(tmp_path):
    run = tiny.tiny_run(tmp_path, tmp_path, *SEVEN_B, "parallel.tensor=4", "parallel.pipeline=2")
    found = fastest(run, 8, tiny.vocabulary(), TRAFFIC, rates_of("H100"))
    assert found
    other, layout, best = found
    given = speed(tmp_path, 8, "parallel.tensor=4", "parallel.pipeline=2")
    assert layout.world == 8 and best.tokens_per_s >= given.tokens_per_s
    assert max(s.total for s in estimate(other, layout, tiny.vocabulary(), TRAFFIC)) < 80 * GIB
    run.parallel.gpu_memory_gib = 1.0
    assert fastest(run, 8, tiny.vocabulary(), TRAFFIC, rates_of("H100")) is None
