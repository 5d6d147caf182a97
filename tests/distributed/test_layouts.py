"""Every layout trains as one process does: losses of all streams and gradient norm over 5 steps."""

import functools

import pytest

from megadual.testing import tiny
from megadual.testing.distributed import run_distributed

COMPARED = ("loss", "loss_text", "loss_semantic", "loss_pixel", "grad_norm")

LAYOUTS = {
    "PP2": (2, ["parallel.pipeline=2"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "DP2": (2, []),
    "PP2xVPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "PP4": (4, ["parallel.pipeline=4"]),
    "PP4, heads alone": (4, ["parallel.pipeline=4", "parallel.stage_layers=[2,1,1,0]"]),
    "TP2xPP2+SP": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "TP2xDP2, micro-batch 2": (4, ["parallel.tensor=2", "train.micro_batch_size=2"]),
    "CP2": (2, ["parallel.context=2"]),
    "TP2xCP2+SP": (4, ["parallel.tensor=2", "parallel.context=2", "parallel.sequence=true"]),
    "PP2xCP2+recompute": (4, ["parallel.pipeline=2", "parallel.context=2", "train.recompute=true"]),
    "TP2xPP2xDP2+SP+recompute": (
        8, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "train.recompute=true"],
    ),
    "DeepSpeed ZeRO-1 DP2": (2, ["engine=deepspeed"]),
    "DeepSpeed ZeRO-2 DP2": (2, ["engine=deepspeed", "parallel.zero_stage=2"]),
    "DeepSpeed ZeRO-3 TP2xDP2+SP": (
        4, ["engine=deepspeed", "parallel.zero_stage=3", "parallel.tensor=2", "parallel.sequence=true"],
    ),
    "DeepSpeed TP2xPP2xDP2+SP": (
        8, ["engine=deepspeed", "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents with no, one and two images."""
    return tiny.write_tiny_set(tmp_path_factory.mktemp("layouts") / "set")


@pytest.fixture(scope="module")
def train(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")

    @functools.cache
    def run(processes: int, *overrides: str) -> list[list[dict]]:
        return run_distributed(tiny.losses, processes, tiny.tiny_run(folder, shards, *overrides))

    return run


def assert_equal_runs(got: list[dict], expected: list[dict], tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], abs=tolerance), f"{name} of step {step}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(train, layout):
    processes, overrides = LAYOUTS[layout]
    (expected,) = train(1)
    for result in train(processes, *overrides):  # every rank reports the same numbers
        assert_equal_runs(result, expected, tolerance=1e-5)


@pytest.mark.parametrize("layout", ["PP2", "TP2"])
def test_tied_embeddings(train, layout):
    processes, overrides = LAYOUTS[layout]
    (expected,) = train(1, "model.tie_embeddings=true")
    assert_equal_runs(train(processes, *overrides, "model.tie_embeddings=true")[0], expected, tolerance=1e-5)


@pytest.mark.parametrize("layout", ["TP2xPP2+SP", "DeepSpeed ZeRO-2 DP2"])
def test_bf16(train, layout):
    processes, overrides = LAYOUTS[layout]
    (expected,) = train(1, "train.precision=bf16")
    got = train(processes, *overrides, "train.precision=bf16")[0]
    for a, b in zip(got, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=3e-3)


def test_training_learns(train):
    (results,) = train(1, "train.steps=30")
    for name in ("loss_text", "loss_semantic", "loss_pixel"):
        assert results[-1][name] < results[0][name] - 0.05, name


def losses_with_unsummed_heads(run):
    """A broken layout: the visual heads' gradients are not summed over tensor-parallel ranks."""
    import dataclasses

    engine, data = tiny.build(run)
    for parameter in engine.chunks[-1].semantic_head.parameters():
        parameter.sequence_parallel = False
    results = [dataclasses.asdict(engine.train_step(data.step(s))) for s in range(run.train.steps)]
    engine.shutdown()
    return results


def test_broken_layout_is_noticed(train, shards, tmp_path):
    (expected,) = train(1)
    run = tiny.tiny_run(tmp_path, shards, *LAYOUTS["TP2+SP"][1])
    broken = run_distributed(losses_with_unsummed_heads, 2, run)[0]
    with pytest.raises(AssertionError):
        assert_equal_runs(broken, expected, tolerance=1e-5)


@pytest.mark.parametrize("images", [(0, 0), (1, 1)], ids=["no image", "only pairs"])
def test_batches_of_one_kind(tmp_path, images):
    """Every rank runs every branch: batches without an image neither hang nor change the text loss."""
    shards = tiny.write_tiny_set(tmp_path / "set", images=images)
    (expected,) = run_distributed(tiny.losses, 1, tiny.tiny_run(tmp_path, shards, "train.steps=2"))
    got = run_distributed(tiny.losses, 2, tiny.tiny_run(tmp_path, shards, "train.steps=2", "parallel.tensor=2",
                                                        "parallel.sequence=true"))[0]  # fmt: skip
    assert_equal_runs(got, expected, tolerance=1e-5)
    assert (expected[0]["loss_pixel"] == 0) == (images == (0, 0))


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
