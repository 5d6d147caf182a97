"""Held-out losses: equal under every layout and on every rank, and nothing to the training."""

import pytest
import torch
import torch.distributed as dist

from megadual.engine.topology import topology
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE
from megadual.train import setup
from megadual.train.checkpoint import Checkpointer
from megadual.train.metrics import numbers_of

STEPS = 4
NAMES = ["val_loss", "val_loss_text", *(f"val_loss_{stream.name}" for stream in tiny.STREAMS)]


@pytest.fixture(scope="module")
def run_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    shards, held_out = (tiny.write_tiny_set(folder / name, count) for name, count in (("set", 200), ("held_out", 60)))
    held = [f"data.validation=[{held_out}]", "data.validation_every=2", "data.validation_rows=16"]

    def run(name, *overrides):
        keys = [f"train.steps={STEPS}", "train.loss.text=0.5", "checkpoint.background=false"]
        return tiny.tiny_run(folder / name, shards, *keys, *held, *overrides)

    return run


def train(run, hold_out: bool = True, start: int = 0, save_at: int | None = None, spoil: bool = False):
    """(each step's numbers, the weights of this rank's first chunk); `spoil` changes a weight at the beginning."""
    layout, inputs = topology(run, dist.get_world_size()), tiny.inputs_of(run)
    engine = setup.engine(run, layout, inputs.vocabulary)
    data = setup.dataset(run, inputs.sets, inputs.marks, layout, engine.data_rank)
    validation, checkpointer = setup.validation(run, engine, inputs, layout), Checkpointer(run)
    if start:
        checkpointer.load(engine, checkpointer.latest())
    if spoil:
        with torch.no_grad():
            next(p for p in engine.chunks[0].parameters() if p.dim() > 1).add_(0.01)
    entries = []
    for step in range(start + 1, run.train.steps + 1):
        entry = numbers_of(engine.train_step(data.step(step - 1)))
        if hold_out:
            validation.after_step(step, entry)
        entries.append(entry)
        if step == save_at:
            checkpointer.save(engine, step)
    weights = list(tiny.weights_of(engine).values())
    engine.shutdown()
    return entries, weights


def held_out_losses(entries):
    return [[entry[name] for name in NAMES] for entry in entries if "val_loss" in entry]


@pytest.fixture(scope="module")
def expected(run_in):
    ((entries, _),) = run_distributed(train, 1, run_in("one"))
    return entries


def test_every_so_many_steps_and_at_the_last(run_in, expected):
    assert [step for step, entry in enumerate(expected, 1) if "val_loss" in entry] == [2, STEPS]
    ((entries, _),) = run_distributed(train, 1, run_in("three", "data.validation_every=null", "train.steps=3"))
    assert [step for step, entry in enumerate(entries, 1) if "val_loss" in entry] == [3]
    before, after = held_out_losses(expected)
    for loss, text, *streams in before, after:
        assert loss == pytest.approx(0.5 * text + sum(streams))
    assert all(b < a for a, b in zip(before, after, strict=True))  # what is learned holds there too


def evaluate_what_is_trained_on(run):
    engine, data = tiny.build(run)
    losses = engine.evaluate(data.step(0)), engine.train_step(data.step(0)).losses
    engine.shutdown()
    return losses


@pytest.mark.parametrize("layout", ["TP2+SP", "DeepSpeed ZeRO-3 DP2", "DeepSpeed PP2"])
def test_losses_are_those_of_a_training_step(run_in, layout):
    processes, overrides = LAYOUTS[layout]
    evaluated, trained = run_distributed(evaluate_what_is_trained_on, processes, run_in("same", *overrides))[0]
    assert evaluated == trained


@pytest.mark.parametrize("layout", [
    "TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "DeepSpeed ZeRO-2 DP2", "DeepSpeed ZeRO-3 DP2", "DeepSpeed PP2",
])  # fmt: skip
def test_layout_equals_one_process(run_in, expected, layout):
    processes, overrides = LAYOUTS[layout]
    ranks = [held_out_losses(entries) for entries, _ in run_distributed(train, processes, run_in(layout, *overrides))]
    for losses in ranks:
        assert losses == ranks[0]
        for got, of in zip(losses, held_out_losses(expected), strict=True):
            assert got == pytest.approx(of, abs=TOLERANCE["fp32"])


def test_wrong_weight_is_noticed(run_in, expected):
    spoiled, _ = run_distributed(train, 2, run_in("spoiled", *LAYOUTS["DP2"][1]), True, 0, None, True)[0]
    difference = torch.tensor(held_out_losses(spoiled)) - torch.tensor(held_out_losses(expected))
    assert difference.abs().amax() > 10 * TOLERANCE["fp32"]


@pytest.mark.parametrize("layout", ["PP2xVPP2", "CP2", "DeepSpeed ZeRO-3 DP2", "DeepSpeed PP2"])
def test_training_is_bitwise_undisturbed(run_in, layout):
    """Also from where it was resumed, whose held-out losses are those of the run without a stop."""
    processes, overrides = LAYOUTS[layout]
    run = run_in(f"undisturbed {layout}", *overrides)
    without = run_distributed(train, processes, run, False)
    held_out = run_distributed(train, processes, run, True, 0, 3)
    resumed = run_distributed(train, processes, run, True, 3)
    for (plain, weights), (entries, same), (rest, again) in zip(without, held_out, resumed, strict=True):
        assert [{name: entry[name] for name in plain[0]} for entry in entries] == plain
        assert rest == entries[3:]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(weights, same, again, strict=True))
