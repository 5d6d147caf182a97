"""The plan's speed: what costs time makes it slower, what is not known is said, the layout picked is the fastest."""

import dataclasses
import itertools
import random
import statistics

import pytest

from megadual.engine import cpu

cpu.install()

from megadual.engine.choose import SPARE, search  # noqa: E402
from megadual.engine.estimate import GIB, drawn_deviation, drawn_over, estimate  # noqa: E402
from megadual.engine.predict import expected_most, predict, rates_of  # noqa: E402
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


def speed(tmp_path, world: int, *overrides: str, depth: int = 3):
    run = tiny.tiny_run(tmp_path, tmp_path, *SEVEN_B, *overrides)
    vocabulary = tiny.vocabulary([dataclasses.replace(stream, depth=depth) for stream in tiny.STREAMS])
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
    cut = "model.layers=2", "parallel.pipeline=2"  # and deep heads, so that the last stage is slowest
    stages = [speed(tmp_path, 2, *cut, *more, depth=16) for more in ([], ["parallel.run_ahead=1"])]
    assert stages[0].tokens_per_s < stages[1].tokens_per_s and stages[0].peak_gib < stages[1].peak_gib
    assert 1.1 < speed(tmp_path, 1, "train.fp8=true").tokens_per_s / alone.tokens_per_s < 1.3


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match=r"no rates of 'B17'; known: H100"):
        rates_of("B17")


def test_the_slowest_of_many():
    """A step waits for the slowest GPU: how far that is from the average, against drawn numbers."""
    rng = random.Random(0)
    for count in (1, 2, 8, 64):
        drawn = statistics.fmean(max(rng.gauss(0, 1) for _ in range(count)) for _ in range(4000))
        assert expected_most(count) == pytest.approx(drawn, abs=0.05)


def test_parts_of_a_step(tmp_path):
    """They are the whole step; hosts' links are shared by the data-parallel ranks of one host."""
    alone, host, hosts = (speed(tmp_path, world) for world in (1, 8, 64))
    for each in alone, host, hosts:
        assert sum(each.parts.values()) == pytest.approx(each.step_s)
    assert [alone.parts[part] for part in alone.parts if part not in ("computing", "optimizer")] == [0] * 5
    wide, narrow = (
        speed(tmp_path, 64, f"parallel.tensor={tensor}", "parallel.sequence=true").parts["exchanges of gradients"]
        for tensor in (2, 4)
    )
    # Half the weights to exchange, through half the links.
    assert narrow > 0.8 * wide and host.parts["rank that draws most"] < hosts.parts["rank that draws most"]


def by_hand(run, world: int, measured) -> float:
    """The shortest predicted step of all that the rules and the memory allow, s."""
    shortest = float("inf")
    upto = range(1, 9)
    for tensor, pipeline, virtual, recompute in itertools.product(upto, upto, (1, 2, 4), (False, True)):
        each = dataclasses.replace(
            run,
            parallel=dataclasses.replace(
                run.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, sequence=tensor > 1
            ),
            train=dataclasses.replace(run.train, recompute=recompute),
        )
        try:
            layout = topology(each, world)
        except UserError:
            continue
        cost = costs(each, tiny.vocabulary(), TRAFFIC)
        each.parallel.stage_layers = split_layers(run.model.layers, pipeline * virtual, cost)
        most = max(stage.total for stage in estimate(each, layout, tiny.vocabulary(), TRAFFIC))
        if most <= (1 - SPARE) * run.parallel.gpu_memory_gib * GIB:
            expected = predict(each, layout, tiny.vocabulary(), TRAFFIC, measured)
            shortest = min(shortest, expected.step_s)
    return shortest


@pytest.mark.parametrize("world, overrides", [
    (8, ()),
    (8, ("parallel.tensor=4", "parallel.pipeline=2")),  # which count for nothing
    (64, ("train.global_batch_tokens=131072",)),  # 32 rows: fewer than GPUs
    (16, ("parallel.gpu_memory_gib=40",)),
    (8, ("parallel.context=2", "train.seq_len=32768")),
    (8, ("engine=deepspeed", "parallel.zero_stage=2")),  # no pipeline
    (4, ("model.layers=2", "train.parts=[heads]")),
])  # fmt: skip
def test_the_layout_picked_is_the_fastest_that_fits(tmp_path, world, overrides):
    run, measured = tiny.tiny_run(tmp_path, tmp_path, *SEVEN_B, *overrides), rates_of("H100")
    found = search(run, world, tiny.vocabulary(), TRAFFIC, measured)
    best = found.best()
    assert best.prediction.step_s == pytest.approx(by_hand(run, world, measured))
    assert topology(best.run, world) == best.layout  # the rules hold
    assert best.name == search(run, world, tiny.vocabulary(), TRAFFIC, measured).best().name
    assert f"  {best.name} " in found.table()


def test_what_is_drawn_beyond_a_bound():
    positions, chance = 8192, random.Random(0)
    mean, deviation = positions * TRAFFIC.drawn, drawn_deviation(positions, TRAFFIC)
    drawn = [chance.gauss(mean, deviation) for _ in range(100_000)]
    for bound in (0, mean - deviation, mean, mean + deviation):
        over = statistics.mean(max(each - bound, 0) for each in drawn)
        assert drawn_over(bound, positions, TRAFFIC) == pytest.approx(over, rel=0.03)
    all_drawn = dataclasses.replace(TRAFFIC, drawn=TRAFFIC.image)
    assert drawn_over(1000, 8192, all_drawn) == pytest.approx(8192 * TRAFFIC.image - 1000)


def test_fewer_positions_at_once_take_less_memory_and_more_time(tmp_path):
    few, usual, everything = (speed(tmp_path, 1, f"train.drawn_at_once={n}") for n in (100, 1700, 4096))
    assert few.peak_gib < usual.peak_gib < everything.peak_gib
    assert few.step_s > usual.step_s > everything.step_s
    assert speed(tmp_path, 1).step_s == pytest.approx(usual.step_s, rel=0.01)


@pytest.mark.parametrize("world, overrides, message", [
    (8, ("parallel.gpu_memory_gib=1",), r"no layout on 8 GPUs within 92% of parallel.gpu_memory_gib=1: .* takes least"),
    (3, ("train.global_batch_tokens=8192",), r"no layout that can work: .*is not a multiple of"),
    (3, ("parallel.context=2",), "context=2 does not divide 3 processes"),
])  # fmt: skip
def test_no_layout_is_told_with_the_reason(tmp_path, world, overrides, message):
    run = tiny.tiny_run(tmp_path, tmp_path, *SEVEN_B, *overrides)
    with pytest.raises(UserError, match=message):
        search(run, world, tiny.vocabulary(), TRAFFIC, rates_of("H100")).best()
