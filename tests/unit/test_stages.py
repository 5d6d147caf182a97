"""Pipeline stages cut by cost, and the plan's numbers against a model that was built."""

import pytest

from megadual.data.mds_reader import ShardSet
from megadual.engine.estimate import estimate, table
from megadual.engine.stages import Costs, Traffic, split_layers
from megadual.engine.topology import topology
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.train import setup


@pytest.mark.parametrize("layers, chunks, heads, expected", [
    (4, 2, 0.0, [2, 2]),
    (28, 4, 0.0, [7, 7, 7, 7]),
    (28, 4, 6.0, [9, 8, 8, 3]),  # 34 units: at most 9 in a chunk
    (28, 4, 20.0, [10, 9, 9, 0]),  # heads larger than a stage stand alone
    (4, 1, 3.0, [4]),
    (4, 4, 9.0, [2, 1, 1, 0]),
])  # fmt: skip
def test_most_expensive_chunk_is_cheapest(layers, chunks, heads, expected):
    split = split_layers(layers, chunks, Costs(layer=1.0, embedding=0.0, heads=heads))
    assert sum(split) == layers and len(split) == chunks
    assert sorted(split[:-1]) == sorted(expected[:-1]) and split[-1] == expected[-1]


def test_embedding_counts_too():
    assert split_layers(8, 2, Costs(layer=1.0, embedding=2.0, heads=0.0)) == [3, 5]


def planned(run, world: int):
    inputs = setup.Inputs([ShardSet(root) for root in run.data.sets], tiny.SPECIAL, tiny.vocabulary())
    setup.resolve_stages(run, inputs)
    traffic = Traffic.of(inputs.sets, run.data.draw_probability)
    return estimate(run, topology(run, world), inputs.vocabulary, traffic)


def built_parameters(run) -> int:
    engine, _ = tiny.build(run)
    return sum(parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters())


def test_planned_parameters_are_those_built(tmp_path):
    run = tiny.tiny_run(tmp_path, tiny.write_tiny_set(tmp_path / "set", count=20), "parallel.pipeline=2")
    stages = planned(run, 2)
    assert [stage.parameters for stage in stages] == run_distributed(built_parameters, 2, run)
    assert sum(stage.flops_share for stage in stages) == pytest.approx(1)


def test_planned_memory(tmp_path):
    """Context-parallel ranks share activations and the optimizer; what doesn't fit is said."""
    shards = tiny.write_tiny_set(tmp_path / "set", count=20)
    (one,), (shared,) = (
        planned(tiny.tiny_run(tmp_path, shards, f"parallel.context={ranks}"), ranks) for ranks in (1, 2)
    )
    assert shared.activations == one.activations / 2 and shared.optimizer == one.optimizer / 2
    assert shared.weights == one.weights == 4 * one.parameters
    assert "will not fit" in table([one], gpu_memory_gib=1e-6)
    assert "will not fit" not in table([one], gpu_memory_gib=1)
