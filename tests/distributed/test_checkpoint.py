"""Resuming goes on as if nothing had happened, under the same layout and others."""

import dataclasses

import pytest
import torch

from megadual.errors import UserError
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.train.checkpoint import Checkpointer, load_full_state, load_run_config, resolve_checkpoint

STEPS = 6
LAYOUTS = {
    "one": (1, []),
    "PP2": (2, ["parallel.pipeline=2"]),
    "TP2xPP2+SP": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "PP2xVPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "DP2": (2, []),
    "DeepSpeed ZeRO-3 DP2": (2, ["engine=deepspeed", "parallel.zero_stage=3"]),
    "DeepSpeed PP2": (2, ["engine=deepspeed", "parallel.pipeline=2"]),
}


def train_part(run, start: int, stop: int, save: bool):
    """Steps start..stop; on from the latest checkpoint if start > 0. Returns the losses and the full weights."""
    engine, data = tiny.build(run)
    checkpointer = Checkpointer(run)
    if start:
        assert checkpointer.load(engine, checkpointer.latest()) == start
    results = [dataclasses.asdict(engine.train_step(data.step(s))) for s in range(start, stop)]
    if save:
        checkpointer.save(engine, stop)
    weights = {name: p.detach().clone() for name, p in engine.chunks[0].named_parameters()}
    engine.shutdown()
    return results, weights


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_tiny_set(tmp_path_factory.mktemp("checkpoint") / "set")


@pytest.fixture(scope="module")
def run_in(shards, tmp_path_factory):
    def run(folder, *overrides):
        return tiny.tiny_run(folder, shards, f"train.steps={STEPS}", "train.warmup_steps=2", *overrides)

    return run


@pytest.fixture(scope="module")
def uninterrupted(run_in, tmp_path_factory):
    return run_distributed(train_part, 1, run_in(tmp_path_factory.mktemp("straight")), 0, STEPS, False)[0]


@pytest.mark.parametrize("saved, loaded", [
    ("one", "one"), ("one", "TP2xPP2+SP"), ("TP2xPP2+SP", "one"), ("TP2xPP2+SP", "PP2xVPP2"), ("PP2", "DP2"),
    ("DeepSpeed ZeRO-3 DP2", "DeepSpeed ZeRO-3 DP2"), ("DeepSpeed PP2", "DeepSpeed PP2"),
])  # fmt: skip
def test_resume(run_in, uninterrupted, tmp_path, saved, loaded):
    (processes, layout), (other_processes, other_layout) = LAYOUTS[saved], LAYOUTS[loaded]
    run_distributed(train_part, processes, run_in(tmp_path, *layout), 0, 3, True)
    got, _ = run_distributed(train_part, other_processes, run_in(tmp_path, *other_layout), 3, STEPS, False)[0]
    expected = uninterrupted[0][3:]
    for a, b in zip(got, expected, strict=True):
        if saved == loaded == "one":
            assert a == b
        for name in ("loss", "loss_text", "loss_semantic", "loss_pixel", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-5)


def test_full_state_and_pruning(run_in, tmp_path):
    run = run_in(tmp_path, "checkpoint.keep=2")
    _, weights = run_distributed(train_part, 1, run, 0, 1, True)[0]
    first = resolve_checkpoint(tmp_path)
    state = load_full_state(first)
    assert set(weights) <= set(state)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    run.parallel.stage_layers = [run.model.layers]  # what the engine resolved
    assert load_run_config(first) == run

    for stop in (2, 3):
        run_distributed(train_part, 1, run, stop - 1, stop, True)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["00000002", "00000003"]
    assert resolve_checkpoint(tmp_path / "checkpoints").name == "00000003"


def test_partial_write_is_ignored(run_in, tmp_path):
    """A folder that a killed save left behind is neither loaded nor in the way."""
    run = run_in(tmp_path)
    run_distributed(train_part, 1, run, 0, 1, True)
    leftover = tmp_path / "checkpoints" / ".partial-00000002"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    assert Checkpointer(run).latest().name == "00000001"
    run_distributed(train_part, 1, run, 1, 2, True)
    assert Checkpointer(run).latest().name == "00000002"
    assert not leftover.exists()


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        resolve_checkpoint(tmp_path)


def load_latest(run):
    engine, _ = tiny.build(run)
    checkpointer = Checkpointer(run)
    return checkpointer.load(engine, checkpointer.latest())


def test_flipped_byte_is_found_and_named(run_in, tmp_path):
    run = run_in(tmp_path, *LAYOUTS["DP2"][1])
    run_distributed(train_part, 2, run, 0, 1, True)
    victim = sorted((tmp_path / "checkpoints" / "00000001").glob("*.distcp"))[-1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"is damaged: {victim.name};"):
        run_distributed(load_latest, 2, run)
