"""Pipeline stages cut by cost, and the plan's numbers against a model that was built."""

import pytest

from megadual.data.dataset import PackedDataset
from megadual.data.mds_reader import ShardSet
from megadual.data.source import Source
from megadual.engine.estimate import estimate, table
from megadual.engine.stages import Costs, Traffic, split_layers
from megadual.engine.topology import topology
from megadual.model.matrices import hidden_matrices
from megadual.streams import Stream
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.shards import SPECIAL, random_documents, write_shard_set
from megadual.train.config import SetConfig


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


def test_frozen_layers_of_the_first_chunk_cost_less():
    assert split_layers(12, 2, Costs(layer=2.0, embedding=0.0, heads=0.0, first=0.5)) == [8, 4]


def test_traffic_is_that_of_the_rows_read(tmp_path):
    """Sets count by their share of the rows; a document that no row holds counts nothing."""
    texts = random_documents(20, images=(0, 0), caption=(9, 9)) + random_documents(1, images=(0, 0), caption=(300, 300))
    pairs = random_documents(20, images=(1, 1), caption=(9, 9), grid=(3, 3))
    roots = [write_shard_set(tmp_path / name, each) for name, each in (("texts", texts), ("pairs", pairs))]
    for weights, share in ([20, 21], 20 / 41), ([1, 3], 1 / 4):
        sources = [
            Source(ShardSet(root), SetConfig(str(root), weight, caption_dropout=0.0))
            for root, weight in zip(roots, weights, strict=True)
        ]
        traffic = Traffic.of(PackedDataset(sources, SPECIAL, 210, 1, 1, 0))  # rows of 21 or 10 documents
        assert traffic.image == pytest.approx((1 - share) * 9 / 21, rel=0.02)
        assert traffic.drawn == pytest.approx(traffic.image / 2, rel=0.1)
        assert traffic.text == pytest.approx(share * 9 / 10 + (1 - share) * 11 / 21, rel=0.02)
        assert traffic.attended == pytest.approx(share * 10 + (1 - share) * 21, rel=0.02)


def planned(run, world: int, streams=tiny.STREAMS):
    inputs = tiny.inputs_of(run, streams)
    return estimate(run, topology(run, world), inputs.vocabulary, inputs.traffic)


def built_parameters(run, trained: bool = False, streams=tiny.STREAMS) -> int:
    engine, _ = tiny.build(run, streams)
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trained)


def numbers_of_matrices(run) -> int:
    """Of those that Muon trains."""
    engine, _ = tiny.build(run)
    return sum(matrix.parameter.numel() for matrix in hidden_matrices(engine.chunks[0], run.model))


def test_planned_parameters_are_those_built(tmp_path):
    streams = [Stream("a", 3, 64, 8), Stream("b", 2, 48, 6)]
    shards = tiny.write_tiny_set(tmp_path / "set", count=20, streams=streams)
    run = tiny.tiny_run(tmp_path, shards, "parallel.pipeline=2")
    stages = planned(run, 2, streams)
    assert [stage.parameters for stage in stages] == run_distributed(built_parameters, 2, run, False, streams)
    assert sum(stage.flops_share for stage in stages) == pytest.approx(1)


def test_planned_memory(tmp_path):
    """Context-parallel ranks share activations and the optimizer; what doesn't fit is said."""
    shards = tiny.write_tiny_set(tmp_path / "set", count=20)
    (one,), (shared,) = (
        planned(tiny.tiny_run(tmp_path, shards, f"parallel.context={ranks}"), ranks) for ranks in (1, 2)
    )
    assert shared.activations == one.activations / 2 and shared.optimizer == one.optimizer / 2
    assert shared.weights == one.weights == 4 * one.parameters
    (muon,) = planned(tiny.tiny_run(tmp_path, shards, "train.optimizer=muon"), 1)
    matrices = run_distributed(numbers_of_matrices, 1, tiny.tiny_run(tmp_path, shards))[0]
    assert one.optimizer - muon.optimizer == 4 * matrices  # one moment of two
    assert "will not fit" in table([one], gpu_memory_gib=1e-6)
    assert "will not fit" not in table([one], gpu_memory_gib=1)


@pytest.mark.parametrize("part", ["projector", "llm", "heads"])
def test_what_is_frozen_needs_its_weights_only(tmp_path, part):
    shards = tiny.write_tiny_set(tmp_path / "set", count=20)
    layout = "parallel.pipeline=2", "parallel.stage_layers=[2,2]"
    run = tiny.tiny_run(tmp_path, shards, *layout, f"train.parts=[{part}]")
    every, stages = planned(tiny.tiny_run(tmp_path, shards, *layout), 2), planned(run, 2)
    assert [stage.weights for stage in stages] == [stage.weights for stage in every]
    trained = run_distributed(built_parameters, 2, run, True)
    assert [stage.gradients / 4 for stage in stages] == [stage.optimizer / 8 for stage in stages] == trained
    # Backward ends above the first stage where nothing is trained there, and goes through the other.
    kept = [stage.activations / other.activations for stage, other in zip(stages, every, strict=True)]
    assert kept[0] == (0 if part == "heads" else kept[1]) and 0.5 < kept[1] <= 1
    assert (kept[1] == 1) == (part == "llm")
    assert stages[1].logits < every[1].logits


def test_frozen_layers_are_cut_by_their_cost(tmp_path):
    shards = tiny.write_tiny_set(tmp_path / "set", count=20)
    every, heads = (
        tiny.tiny_run(tmp_path, shards, "parallel.pipeline=2", "model.layers=40", f"train.parts={parts}")
        for parts in ("[projector,llm,heads]", "[heads]")
    )
    for run in every, heads:
        shares = [stage.flops_share for stage in planned(run, 2)]
        assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    assert heads.parallel.stage_layers[0] > every.parallel.stage_layers[0]


@pytest.mark.parametrize("rows, expected", [(8, [2.5, 1.5]), (2, [2, 1.5])])
def test_virtual_pipeline_keeps_more(tmp_path, rows, expected):
    """5 and 3 passes through half a stage wait for their backward, as far as there are micro-batches."""
    shards = tiny.write_tiny_set(tmp_path / "set", count=20)
    layout = "parallel.pipeline=2", f"train.global_batch_tokens={64 * rows}"
    plain, virtual = (
        planned(tiny.tiny_run(tmp_path, shards, *layout, f"parallel.virtual_pipeline={chunks}", split), 2)
        for chunks, split in ((1, "parallel.stage_layers=[2,2]"), (2, "parallel.stage_layers=[1,1,1,1]"))
    )
    one = plain[1].activations  # the last stage's single micro-batch
    assert plain[0].activations == 2 * one
    assert [stage.activations / one for stage in virtual] == expected
