"""Resuming goes on as if nothing had happened, under the same layout and others."""

import errno
import functools
import os
import resource
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from megadual.engine import groups, sharded
from megadual.errors import UserError
from megadual.hf.tensors import CheckpointTensors
from megadual.testing import layouts, tiny
from megadual.testing.checkpoints import train_part, train_through
from megadual.testing.distributed import run_distributed
from megadual.train.checkpoint import Checkpointer, load_run_config, resolve_checkpoint, seal_weights

STEPS = 6
LAYOUTS = layouts.LAYOUTS | {"one": (1, [])}
LAYOUTS |= {f"{name}, muon": (n, [*given, "train.optimizer=muon"]) for name, (n, given) in LAYOUTS.items()}
LAYOUTS["TP2xPP2+SP, fp8"] = (4, [*LAYOUTS["TP2xPP2+SP"][1], "train.fp8=true"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.write_tiny_set(tmp_path_factory.mktemp("checkpoint") / "set")


@pytest.fixture(scope="module")
def run_in(shards, tmp_path_factory):
    def run(folder, *overrides):
        return tiny.tiny_run(folder, shards, f"train.steps={STEPS}", "train.warmup_steps=2", *overrides)

    return run


@pytest.fixture(scope="module")
def straight(run_in, tmp_path_factory):
    @functools.cache
    def run(optimizer: str):
        folder = tmp_path_factory.mktemp("straight")
        return run_distributed(train_part, 1, run_in(folder, f"train.optimizer={optimizer}"), 0, STEPS, False)[0]

    return run


@pytest.fixture(scope="module")
def uninterrupted(straight):
    return straight("adamw")


@pytest.mark.parametrize("saved, loaded", [
    ("one", "TP2xPP2+SP"), ("TP2xPP2+SP", "PP2xVPP2"), ("PP2", "DP2"), ("TP2xPP2+SP", "DeepSpeed ZeRO-3 DP2"),
    ("DeepSpeed ZeRO-3 TP2xDP2+SP", "DeepSpeed ZeRO-1 DP2"), ("DeepSpeed PP2", "DeepSpeed ZeRO-2 DP2"),
    ("DeepSpeed PP2", "one"), ("DP2", "TP2xCP2+SP"), ("TP2xPP2+SP, muon", "DP2, muon"), ("DP2, muon", "PP2xVPP2, muon"),
])  # fmt: skip
def test_resume_under_another_layout(run_in, straight, tmp_path, saved, loaded):
    (processes, layout), (other_processes, other_layout) = LAYOUTS[saved], LAYOUTS[loaded]
    run_distributed(train_part, processes, run_in(tmp_path, *layout, "checkpoint.background=false"), 0, 3, True)
    got, _ = run_distributed(train_part, other_processes, run_in(tmp_path, *other_layout), 3, STEPS, False)[0]
    expected, _ = straight("muon" if saved.endswith("muon") else "adamw")
    assert max(layouts.differences(got, expected[3:])) < 1e-5


@pytest.mark.parametrize("layout, precision", [
    ("TP2xPP2+SP, fp8", "bf16"), ("DP2", "fp32"), ("DeepSpeed ZeRO-1 DP2", "bf16"), ("DeepSpeed ZeRO-3 DP2", "fp32"),
    ("DeepSpeed PP2", "bf16"), ("DP2, muon", "bf16"),
])  # fmt: skip
def test_resume_is_bitwise_and_background_writing_sees_no_later_step(run_in, tmp_path, layout, precision):
    processes, overrides = LAYOUTS[layout]
    run = run_in(tmp_path, *overrides, f"train.precision={precision}")
    straight = run_distributed(train_through, processes, run, 3)[0]
    resumed, _ = run_distributed(train_part, processes, run, 3, STEPS, False)[0]
    assert resumed == straight[3:]


def die_in_second_save(run):
    """Rank 1 is killed when its part of the second checkpoint has been opened."""
    engine, data = tiny.build(run)
    checkpointer = Checkpointer(run)
    for s in range(4):
        engine.train_step(data.step(s))
        if s == 1:
            checkpointer.save(engine, 2)
            checkpointer.finish()
    if dist.get_rank() == 1:
        part = checkpointer.folder / ".partial-00000004" / "__1_0.distcp"
        threading.Thread(target=_die_once_there, args=(part,)).start()
    checkpointer.save(engine, 4)
    checkpointer.finish()


def _die_once_there(path):
    while not path.exists():
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_during_a_save(run_in, tmp_path):
    run = run_in(tmp_path, "parallel.pipeline=2")
    straight, _ = run_distributed(train_part, 2, run, 0, STEPS, False)[0]
    with pytest.raises(RuntimeError):
        run_distributed(die_in_second_save, 2, run)
    assert Checkpointer(run).latest().name == "00000002"
    assert (tmp_path / "checkpoints" / ".partial-00000004").exists()
    resumed, _ = run_distributed(train_part, 2, run, 2, STEPS, True)[0]
    assert resumed == straight[2:]
    assert [path.name for path in (tmp_path / "checkpoints").glob(".partial-*")] == []


def fill_the_disk(run):
    """The second checkpoint meets files that may not grow."""
    engine, data = tiny.build(run)
    checkpointer = Checkpointer(run)
    engine.train_step(data.step(0))
    checkpointer.save(engine, 1)
    checkpointer.finish()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    checkpointer.save(engine, 2)
    with pytest.raises(
        UserError, match=r"00000002' could not be written \(rank 1: .*too large.*good one is .*00000001'"
    ):
        checkpointer.finish()
    assert checkpointer.latest().name == "00000001"
    engine.shutdown()


def test_full_disk_is_told_on_every_rank_and_keeps_the_last_good(run_in, tmp_path):
    run_distributed(fill_the_disk, 2, run_in(tmp_path, "parallel.pipeline=2"))


def save_on_a_failing_disk(run, number):
    engine, _ = tiny.build(run)
    checkpointer = Checkpointer(run)

    def write(self):
        raise OSError(number, os.strerror(number))

    sharded.ShardedWrite.write = write
    checkpointer.save(engine, 1)
    checkpointer.finish()


@pytest.mark.parametrize("number, kind", [(errno.EIO, "RuntimeError"), (errno.ENOSPC, "UserError")])
def test_only_errors_that_last_keep_a_job_from_starting_again(run_in, tmp_path, number, kind):
    with pytest.raises(RuntimeError, match=rf"{kind}: checkpoint .*00000001' could not be written \(rank 0: .Errno"):
        run_distributed(save_on_a_failing_disk, 1, run_in(tmp_path), number)


def test_folder_that_cannot_be_made_is_told_on_every_rank(run_in, tmp_path):
    run = run_in(tmp_path, "parallel.pipeline=2")
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match="UserError: .*00000001' could not be written .*the run has none yet"):
        run_distributed(train_part, 2, run, 0, 1, True)


def first_loss(run, step: int):
    engine, data = tiny.build(run)
    result = engine.train_step(data.step(step))
    engine.shutdown()
    return result.loss, result.lr


def weights_of(checkpoint):
    tensors = CheckpointTensors(checkpoint)
    return {name: tensors.read(name) for name in tensors.meta}


@pytest.fixture(scope="module")
def weights_only(run_in, tmp_path_factory):
    """The weights after one step, in a folder as a tool would write it."""
    folder = tmp_path_factory.mktemp("weights")
    run = run_in(folder / "run")
    run_distributed(train_part, 1, run, 0, 1, True)
    state = weights_of(resolve_checkpoint(folder / "run"))
    torch.distributed.checkpoint.save(state, storage_writer=FileSystemWriter(folder / "start"), no_dist=True)
    seal_weights(folder / "start", run)
    return folder / "start"


@pytest.mark.parametrize("layout", ["TP2xPP2+SP", "DeepSpeed ZeRO-3 DP2", "DeepSpeed PP2"])
def test_start_from_weights(run_in, uninterrupted, weights_only, tmp_path, layout):
    processes, overrides = LAYOUTS[layout]
    run = run_in(tmp_path, *overrides, f"checkpoint.start={weights_only}")
    loss, lr = run_distributed(first_loss, processes, run, 1)[0]
    assert loss == pytest.approx(uninterrupted[0][1]["loss"], abs=1e-5)
    assert lr == uninterrupted[0][0]["lr"]  # the schedule starts anew


def refusals(runs) -> list[str]:
    """What is said of each run as it resumes, or takes the weights that it starts from."""
    said = []
    for run in runs:
        end = groups.destroy_groups
        try:
            engine, _ = tiny.build(run)
            end = engine.shutdown
            if not run.checkpoint.start:
                checkpointer = Checkpointer(run)
                checkpointer.load(engine, checkpointer.to_resume())
            said.append("")
        except UserError as error:
            said.append(str(error))
        end()
    return said


OTHERS = {
    "model.layers=2": "model.layers is 4, the run's is 2",
    "model.layers=6": "model.layers is 4, the run's is 6",
    "model.ffn=96": "model.ffn is 128, the run's is 96",
    "model.head.layers=1": "model.head.layers is 2, the run's is 1",
    "model.kv_heads=4": "model.kv_heads is 2, the run's is 4",
    "model.heads=8": "model.heads is 4, the run's is 8",
    "model.tie_embeddings=true": "model.tie_embeddings is False, the run's is True",
    "model.streams=[pixel]": "heads.semantic",
}


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("how", ["start", "resume"])
def test_a_checkpoint_of_another_shape_is_refused(run_in, weights_only, tmp_path, engine, how):
    place = weights_only.parent / "run" if how == "resume" else tmp_path
    start = [f"checkpoint.start={weights_only}"] if how == "start" else []
    runs = [run_in(place, f"engine={engine}", *start, other) for other in OTHERS]
    for said, expected in zip(run_distributed(refusals, 1, runs)[0], OTHERS.values(), strict=True):
        assert "does not fit the run's model: " in said and expected in said and len(said) < 1000 and "\n" not in said


def test_another_optimizers_checkpoint_is_refused(run_in, weights_only):
    run = run_in(weights_only.parent / "run", "train.optimizer=muon")
    checkpointer = Checkpointer(run)
    with pytest.raises(UserError, match=r"^train.optimizer=muon can't go on .* has the state of adamw: give train"):
        checkpointer.load(None, checkpointer.latest())


@pytest.mark.parametrize("parts, then", [("projector", "llm,projector"), ("heads", "projector,llm,heads")])
def test_stages_follow_each_other_where_a_pipeline_stage_trains_nothing(run_in, tmp_path, parts, then):
    """A rank without an optimizer saves and resumes; the next training stage starts from what the first has learned."""
    run = run_in(tmp_path / "first", "parallel.pipeline=2", f"train.parts=[{parts}]")
    straight = run_distributed(train_through, 2, run, 3)[0]
    resumed, _ = run_distributed(train_part, 2, run, 3, STEPS, True)[0]
    assert resumed == straight[3:]
    start = [f"checkpoint.start={tmp_path / 'first'}", f"train.parts=[{then}]"]
    one, _ = run_distributed(first_loss, 1, run_in(tmp_path / "second", *start), 0)[0]
    assert one < straight[0]["loss"] - 0.01
    two, _ = run_distributed(first_loss, 2, run_in(tmp_path / "third", *start, "parallel.tensor=2"), 0)[0]
    assert two == pytest.approx(one, abs=1e-5)


def skip_one(run):
    """Step 1 is refused; did weights and optimizer stay, and what came after."""
    engine, data = tiny.build(run)
    engine.train_step(data.step(0))
    before = [tensor.clone() for tensor in _all_tensors(engine)]
    refused = engine.train_step(data.step(1), approve=lambda result: False)
    same = all(torch.equal(a, b) for a, b in zip(before, _all_tensors(engine), strict=True))
    after = engine.train_step(data.step(2), approve=lambda result: True)
    updates = engine.updates
    engine.shutdown()
    return same, refused, after, updates


def updates_made(run) -> int:
    engine, data = tiny.build(run)
    for step in range(3):
        engine.train_step(data.step(step), approve=lambda result, step=step: step != 1)
    updates = engine.updates
    engine.shutdown()
    return updates


@pytest.mark.parametrize("parts", ["projector", "heads"])
def test_every_rank_tells_the_updates_made(run_in, tmp_path, parts):
    """A pipeline stage that trains nothing too."""
    run = run_in(tmp_path, "parallel.pipeline=2", f"train.parts=[{parts}]")
    assert run_distributed(updates_made, 2, run) == [2, 2]


def _all_tensors(engine):
    yield from tiny.weights_of(engine).values()
    for state in engine.optimizer.optimizer.state.values():
        yield from state.values()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_refused_step_changes_nothing_but_the_schedule(run_in, straight, tmp_path, optimizer):
    run = run_in(tmp_path, f"train.optimizer={optimizer}")
    same, refused, after, updates = run_distributed(skip_one, 2, run)[0]
    assert same and updates == 2
    results, _ = straight(optimizer)
    assert refused.loss == pytest.approx(results[1]["loss"], abs=1e-5)
    assert refused.grad_norm == pytest.approx(results[1]["grad_norm"], abs=1e-5)
    assert after.lr == results[2]["lr"] and after.loss != pytest.approx(results[2]["loss"], abs=1e-5)


def bytes_to_write(run, folder) -> int:
    engine, _ = tiny.build(run)
    write = engine.save(folder)
    engine.shutdown()
    return sum(tensor.nbytes for _, _, (_, tensors) in write.files for _, tensor in tensors)


@pytest.mark.parametrize("layout", ["DP4", "CP2xDP2", "DeepSpeed ZeRO-3 DP4"])
def test_a_rank_holds_its_share_of_a_checkpoint(run_in, tmp_path, layout):
    """Not its model-parallel rank's whole state: weights and optimizer state are spread over all that have them."""
    overrides = LAYOUTS[layout][1] if layout in LAYOUTS else ["engine=deepspeed", "parallel.zero_stage=3"]
    held = run_distributed(bytes_to_write, 4, run_in(tmp_path, "train.precision=bf16", *overrides), tmp_path)
    (whole,) = run_distributed(bytes_to_write, 1, run_in(tmp_path, "train.precision=bf16"), tmp_path)
    assert sum(held) == whole and max(held) < 0.3 * whole


def numbers_read(run) -> int:
    """Of the run's checkpoint, by this rank."""
    engine, _ = tiny.build(run)
    checkpointer, before, count = Checkpointer(run), sharded.read, 0

    def read(state, folder):
        nonlocal count
        loaded = before(state, folder)
        count += sum(tensor.numel() for entries in loaded.values() for tensor in entries.values())
        return loaded

    sharded.read = read
    checkpointer.load(engine, checkpointer.latest())
    engine.shutdown()
    return count


@pytest.mark.parametrize("layout", ["DP4", "DeepSpeed ZeRO-3 DP2"])
def test_a_rank_reads_its_share_of_a_checkpoint(run_in, tmp_path, layout):
    run_distributed(train_part, 1, run_in(tmp_path), 0, 1, True)
    (whole,) = run_distributed(numbers_read, 1, run_in(tmp_path))
    processes, overrides = LAYOUTS[layout]
    read = run_distributed(numbers_read, processes, run_in(tmp_path, *overrides))
    assert sum(read) == whole and max(read) < 1.2 * whole / processes


def test_full_state_and_pruning(run_in, tmp_path):
    run = run_in(tmp_path, "checkpoint.keep=2")
    _, weights = run_distributed(train_part, 1, run, 0, 1, True)[0]
    first = resolve_checkpoint(tmp_path)
    state = weights_of(first)
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
