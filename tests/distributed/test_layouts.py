"""Every layout trains as one process does, also with Muon: losses of all streams and gradient norm over 5 steps."""

import functools

import pytest

from megadual.data.mds_reader import ShardSet
from megadual.model import matrices
from megadual.streams import Stream
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE, differences
from megadual.train.metrics import LOSS, numbers_of

# benchmarks/layouts.py runs all of testing.layouts, in both precisions, with either optimizer.
TESTED = (
    "PP2", "TP2", "TP2+SP", "DP2", "PP2xVPP2", "PP4, heads alone", "TP2xPP2+SP", "TP2xDP2, micro-batch 2",
    "TP2xPP2xDP2+SP+recompute", "CP2", "TP2xCP2+SP", "PP2xCP2+recompute", "DeepSpeed ZeRO-1 DP2",
    "DeepSpeed ZeRO-2 DP2", "DeepSpeed ZeRO-3 TP2xDP2+SP", "DeepSpeed TP2xPP2xDP2+SP",
)  # fmt: skip
BOTH = ("adamw", "muon")
BY_MUON = (
    "PP2", "TP2+SP", "DP2", "PP2xVPP2", "TP2xPP2+SP", "TP2xPP2xDP2+SP+recompute", "CP2", "TP2xCP2+SP",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents with no, one and two images, questions, edits and pairs of several captions."""
    return tiny.write_tiny_set(tmp_path_factory.mktemp("layouts") / "set", conversations=100)


@pytest.fixture(scope="module")
def train(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")

    @functools.cache
    def run(processes: int, *overrides: str) -> list[list[dict]]:
        return run_distributed(tiny.losses, processes, tiny.tiny_run(folder, shards, *overrides))

    return run


@pytest.fixture(scope="module")
def train_with(shards, tmp_path_factory):
    """By rank, the results with each optimizer."""
    folder = tmp_path_factory.mktemp("optimizers")

    @functools.cache
    def run(optimizers: tuple[str, ...], processes: int, *overrides: str) -> list[list[list[dict]]]:
        runs = [tiny.tiny_run(folder, shards, *overrides, f"train.optimizer={each}") for each in optimizers]
        return run_distributed(tiny.losses_of, processes, runs)

    return run


def mean_losses(step: dict) -> dict[str, float]:
    return {name.removeprefix(LOSS): value for name, value in step.items() if name.startswith(LOSS)}


def assert_equal_runs(got: list[dict], expected: list[dict], tolerance: float) -> None:
    assert max(differences(got, expected)) < tolerance


@pytest.mark.parametrize("layout", TESTED)
def test_layout_equals_one_process(train_with, layout):
    processes, overrides = LAYOUTS[layout]
    (expected,) = train_with(BOTH, 1)
    optimizers = BOTH if layout in BY_MUON else ("adamw",)
    for results in train_with(optimizers, processes, *overrides):  # every rank reports the same numbers
        for result, of_one in zip(results, expected, strict=False):
            assert_equal_runs(result, of_one, TOLERANCE["fp32"])


@pytest.mark.parametrize("layout", ["PP2", "TP2"])
def test_tied_embeddings(train, layout):
    processes, overrides = LAYOUTS[layout]
    (expected,) = train(1, "model.tie_embeddings=true")
    assert_equal_runs(train(processes, *overrides, "model.tie_embeddings=true")[0], expected, TOLERANCE["fp32"])


@pytest.mark.parametrize("layout, optimizer", [
    ("TP2xPP2+SP", "adamw"), ("TP2xPP2+SP", "muon"), ("CP2", "adamw"), ("DeepSpeed ZeRO-2 DP2", "adamw"),
    ("DeepSpeed ZeRO-1 DP2", "adamw"), ("DeepSpeed TP2xPP2xDP2+SP", "adamw"),
])  # fmt: skip
def test_bf16(train, layout, optimizer):
    processes, overrides = LAYOUTS[layout]
    of_both = ["train.precision=bf16", f"train.optimizer={optimizer}"]
    (expected,) = train(1, *of_both)
    assert_equal_runs(train(processes, *overrides, *of_both)[0], expected, TOLERANCE["bf16"])


def added_where_made(run):
    """Of each parameter, whether backward itself added its gradients to DeepSpeed's sums."""
    engine, data = tiny.build(run)
    theirs, found = engine.optimizer._update_hp_grad, {}

    def update(parameter, *rest, **named):
        found[parameter] = getattr(parameter, "grad_added_to_main_grad", False)
        theirs(parameter, *rest, **named)

    engine.optimizer._update_hp_grad = update
    engine.train_step(data.step(0))
    named = {name: found[parameter] for name, parameter in engine.chunks[0].named_parameters()}
    engine.shutdown()
    return named


def test_zero_1_adds_gradients_where_they_are_made(shards, tmp_path):
    overrides = ["engine=deepspeed", "train.precision=bf16"]
    (added,) = run_distributed(added_where_made, 1, tiny.tiny_run(tmp_path, shards, *overrides))
    small = ("bias", "norm.weight", "layernorm.weight", "depth_embedding")
    assert {name for name, by_backward in added.items() if not by_backward} == {n for n in added if n.endswith(small)}


def test_fp8_under_parallelism_is_within_its_rounding(train):
    (expected,), (in_fp32,) = train(1, "train.fp8=true"), train(1)
    processes, overrides = LAYOUTS["TP2xPP2xDP2+SP+recompute"]
    # Its rounding differs between kinds of processors, too: 0.007 to 0.024.
    assert_equal_runs(train(processes, *overrides, "train.fp8=true")[0], expected, 0.04)
    assert 1e-3 < max(differences(expected, in_fp32)) < 0.04


def test_training_learns(train):
    (results,) = train(1, "train.steps=30")
    for name, loss in mean_losses(results[0]).items():
        assert mean_losses(results[-1])[name] < loss - 0.05, name


# Unlike each other in all sizes.
THREE_STREAMS = [Stream("deep", 4, 48, 12), Stream("middle", 1, 96, 4), Stream("shallow", 2, 32, 8)]


def test_other_streams(tmp_path):
    """Three streams, and one of them alone on the same set."""
    shards = tiny.write_tiny_set(tmp_path / "set", streams=THREE_STREAMS)

    def train(processes: int, *layouts: list[str]) -> list[list[dict]]:
        runs = [
            tiny.tiny_run(tmp_path, shards, "train.steps=3", "train.loss.deep=0.5", *layout, *streams)
            for layout in layouts
            for streams in ([], ["model.streams=[deep]"])
        ]
        return run_distributed(tiny.losses_of, processes, runs, THREE_STREAMS)[0]

    three, one = expected = train(1, [])
    assert list(mean_losses(three[0])) == ["text", "deep", "middle", "shallow"]
    assert list(mean_losses(one[0])) == ["text", "deep"]
    for stream in THREE_STREAMS:
        by_depth = three[0][f"depth_{stream.name}"]
        assert len(by_depth) == stream.depth
        assert three[0][f"loss_{stream.name}"] == pytest.approx(sum(by_depth) / stream.depth)
    for results in three, one:
        for step in results:
            losses = mean_losses(step)
            assert step["loss"] == pytest.approx(sum(losses.values()) - 0.5 * losses["deep"])
    for names in ("TP2+SP", "PP2"), ("DeepSpeed ZeRO-3 DP2",):
        for got, of in zip(train(2, *(LAYOUTS[name][1] for name in names)), expected * len(names), strict=True):
            assert_equal_runs(got, of, TOLERANCE["fp32"])


def losses_with_unsummed_heads(run):
    """A broken layout: the visual heads' gradients are not summed over tensor-parallel ranks."""
    engine, data = tiny.build(run)
    for parameter in engine.chunks[-1].heads.parameters():
        parameter.sequence_parallel = False
    results = [numbers_of(engine.train_step(data.step(s))) for s in range(run.train.steps)]
    engine.shutdown()
    return results


def losses_with_gate_and_up_mixed(run):
    """A broken layout: Muon takes a matrix of two parts, split each by itself, as if it were split as a whole."""
    join, share = matrices.tensor_parallel_whole, matrices.tensor_parallel_slice
    matrices.tensor_parallel_whole = lambda name, *rest: join("", *rest)
    matrices.tensor_parallel_slice = lambda name, *rest: share("", *rest)
    return tiny.losses(run)


@pytest.mark.parametrize(
    "optimizer, losses", [("adamw", losses_with_unsummed_heads), ("muon", losses_with_gate_and_up_mixed)]
)
def test_broken_layout_is_noticed(train_with, shards, tmp_path, optimizer, losses):
    (results,) = train_with(BOTH, 1)
    expected = results[BOTH.index(optimizer)]
    run = tiny.tiny_run(tmp_path, shards, *LAYOUTS["TP2+SP"][1], f"train.optimizer={optimizer}")
    broken = run_distributed(losses, 2, run)[0]
    with pytest.raises(AssertionError):
        assert_equal_runs(broken, expected, tolerance=1e-5)


@pytest.mark.parametrize("layout", ["TP2+SP", "CP2"])
@pytest.mark.parametrize(
    "images, settings",
    [((0, 0), {}), ((1, 1), {"draw": 1, "caption_dropout": 1})],
    ids=["no image", "only images"],
)
def test_batches_of_one_kind(tmp_path, images, settings, layout):
    """Every rank runs every branch: batches of one kind neither hang nor change the normalisation."""
    shards = tiny.write_tiny_set(tmp_path / "set", images=images)
    processes, parallel = LAYOUTS[layout]
    alone, spread = (
        tiny.tiny_run(tmp_path, shards, "train.steps=2", *overrides, **settings) for overrides in ([], parallel)
    )
    (expected,) = run_distributed(tiny.losses, 1, alone)
    got = run_distributed(tiny.losses, processes, spread)[0]
    assert_equal_runs(got, expected, TOLERANCE["fp32"])
    for stream in tiny.STREAMS:
        assert (expected[0][f"loss_{stream.name}"] == 0) == (images == (0, 0))


def losses_with_empty_rows(run):
    """Train on rows of which every second is padding alone: where there are two data-parallel ranks, one gets those."""
    from megatron.core import parallel_state

    from megadual.data.dataset import collate
    from megadual.data.layout import Sequence
    from megadual.engine.topology import Topology
    from megadual.train import setup

    engine, _ = tiny.build(run)
    rows = run.train.global_batch_tokens // run.train.seq_len // 2
    depths = {stream.name: stream.depth for stream in tiny.STREAMS}
    padding = Sequence.padding(run.train.seq_len, depths, tiny.SPECIAL)
    one_rank = Topology(world=1, data=1, rows_per_step=rows, microbatches=rows)
    data = setup.dataset(run, tiny.sources(run), tiny.SPECIAL, one_rank, 0)
    empty = [collate([padding], tiny.SPECIAL, [""])] * rows
    results = []
    for step in range(run.train.steps):
        filled, ranks = data.step(step), parallel_state.get_data_parallel_world_size()
        batches = filled + empty if ranks == 1 else [filled, empty][engine.data_rank]
        results.append(numbers_of(engine.train_step(batches)))
    engine.shutdown()
    return results


@pytest.mark.parametrize("layout", ["DP2", "CP2xDP2", "DeepSpeed ZeRO-3 DP2"])
def test_a_rank_without_documents(shards, tmp_path, layout):
    overrides = ["train.steps=2"]
    (expected,) = run_distributed(losses_with_empty_rows, 1, tiny.tiny_run(tmp_path, shards, *overrides))
    processes, parallel = LAYOUTS[layout]
    run = tiny.tiny_run(tmp_path, shards, *overrides, *parallel)
    assert_equal_runs(run_distributed(losses_with_empty_rows, processes, run)[0], expected, TOLERANCE["fp32"])
    assert expected[0]["fill"] < 0.5


def test_documents_longer_than_a_row(shards, tmp_path):
    """They are left out, whatever the layout."""
    overrides = ["train.steps=2", "train.seq_len=32"]
    (expected,) = run_distributed(tiny.losses, 1, tiny.tiny_run(tmp_path, shards, *overrides))
    got = run_distributed(tiny.losses, 2, tiny.tiny_run(tmp_path, shards, *overrides, "parallel.context=2"))[0]
    assert_equal_runs(got, expected, TOLERANCE["fp32"])
    assert ShardSet(shards).lengths.sequence_length().max() > 32


def test_a_rank_without_images(tmp_path):
    """ZeRO-3 gathers weights module by module: a rank with nothing to draw has to run the same ones."""
    shards = tiny.write_tiny_set(tmp_path / "set", count=40, images=(0, 1))
    # rows of about one document, half of the documents without an image
    overrides = ["train.steps=4", "train.seq_len=32", "train.global_batch_tokens=128"]
    (expected,) = run_distributed(tiny.losses, 1, tiny.tiny_run(tmp_path, shards, *overrides))
    zero3 = tiny.tiny_run(tmp_path, shards, *overrides, "engine=deepspeed", "parallel.zero_stage=3")
    assert_equal_runs(run_distributed(tiny.losses, 2, zero3)[0], expected, tolerance=1e-5)


@pytest.mark.parametrize("part", ["projector", "heads"])
def test_training_one_part(train, part):
    """The paper's stages: what is frozen does not move, also where a pipeline stage has nothing to train."""
    frozen = (f"train.parts=[{part}]", "train.steps=3")
    (expected,) = train(1, *frozen)
    assert expected[-1]["loss"] != expected[0]["loss"]
    assert_equal_runs(train(2, "parallel.pipeline=2", *frozen)[0], expected, tolerance=1e-5)


def frozen_weights(run):
    engine, data = tiny.build(run)
    before = {name: p.detach().clone() for name, p in engine.chunks[0].named_parameters()}
    engine.train_step(data.step(0))
    moved = [name for name, p in engine.chunks[0].named_parameters() if not p.equal(before[name])]
    engine.shutdown()
    return moved


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_only_the_part_moves(shards, tmp_path, engine):
    run = tiny.tiny_run(tmp_path, shards, "train.parts=[projector]", f"engine={engine}")
    (moved,) = run_distributed(frozen_weights, 1, run)
    assert moved and all(name.startswith("embedding.projector.") for name in moved)
