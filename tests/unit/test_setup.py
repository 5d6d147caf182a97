"""From a run's config to what it trains on: which streams, which losses, and what doesn't belong together."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megadual.engine.topology import topology
from megadual.errors import UserError
from megadual.streams import Marks, Stream
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.shards import random_documents, write_shard_set
from megadual.testing.vision import tiny_dualtoken
from megadual.text import fingerprint, load_text_tokenizer, save_text_tokenizer, train_text_tokenizer
from megadual.train import setup
from megadual.train.metrics import LOSS, numbers_of


@pytest.fixture(scope="module")
def run_with(tmp_path_factory):
    """A run on a saved DualToken, a text tokenizer and a set of all the streams' codes; takes overrides."""
    folder = tmp_path_factory.mktemp("setup")
    dualtoken = tiny_dualtoken()
    dualtoken.save_pretrained(folder / "dualtoken")
    save_text_tokenizer(train_text_tokenizer(["two red apples to the left of a cat, on blue"], 300), folder / "text")
    text = load_text_tokenizer(folder / "text")
    streams = [Stream(name, depth=3, codebook_size=32, code_dim=8) for name in ("semantic", "pixel")]  # the DualToken's
    documents = random_documents(60, 0, dualtoken.config.grid, streams, len(text), special=Marks.of(text))
    write_shard_set(
        folder / "set",
        documents,
        dualtoken={"fingerprint": dualtoken.fingerprint()},
        text_tokenizer={"fingerprint": fingerprint(text)},
        marks=Marks.of(text),
        shard_bytes=2048,
    )
    model = f"model.dualtoken={folder}/dualtoken", f"model.text_tokenizer={folder}/text"
    return lambda *overrides: tiny.tiny_run(folder, folder / "set", *model, *overrides)


def a_step(run):
    inputs, layout = setup.read_inputs(run), topology(run, 1)
    engine = setup.engine(run, layout, inputs.vocabulary)
    batches = setup.dataset(run, inputs.sets, inputs.marks, layout, engine.data_rank).step(0)
    result = numbers_of(engine.train_step(batches))
    engine.shutdown()
    return {stream for batch in batches for stream in batch.codes}, result


def test_some_streams_train_on_a_set_of_all(run_with):
    run = run_with("model.streams=[pixel]", "train.loss.pixel=0.5")
    ((read, result),) = run_distributed(a_step, 1, run)
    losses = {name.removeprefix(LOSS): value for name, value in result.items() if name.startswith(LOSS)}
    assert read == {"pixel"} and list(losses) == ["text", "pixel"]
    assert result["loss"] == pytest.approx(losses["text"] + 0.5 * losses["pixel"])


def compiler_is_loaded() -> bool:
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core's functions are compiled there")
def test_a_trainer_on_a_cpu_does_not_load_the_compiler():
    """It would take a fifth of each process's start."""
    assert run_distributed(compiler_is_loaded, 1) == [False]


def test_the_model_has_the_streams_that_are_chosen(run_with):
    run = run_with("model.streams=[pixel,semantic]")
    every = setup.read_inputs(run_with())
    chosen = setup.read_inputs(run)
    assert chosen.vocabulary.streams == every.vocabulary.streams  # in the DualToken's order
    for stream, vectors in every.vocabulary.codebooks.items():
        assert torch.equal(chosen.vocabulary.codebooks[stream], vectors)
    plan = setup.plan(run, topology(run, 1), chosen)
    assert "semantic: 3 codes among 32, pixel: 3 codes among 32" in plan


def test_epochs_are_how_often_documents_are_read(run_with):
    run = run_with("train.steps=40")
    inputs, layout = setup.read_inputs(run), topology(run, 1)
    data = setup.dataset(run, inputs.sets, inputs.marks, layout, 0)
    read = Counter(key for step in range(40) for batch in data.step(step) for key in batch.keys)
    assert inputs.epochs == [pytest.approx(read.total() / len(read), rel=0.1)]
    assert f"documents of '{inputs.sets[0].config.path}' are read {inputs.epochs[0]:,.0f} times" in (
        setup.plan(run, layout, inputs)
    )


def test_the_heads_keep_what_most_micro_batches_draw(run_with):
    run = run_with("train.steps=100")
    inputs = setup.read_inputs(run)
    layout = setup.settle(run, 1, inputs)
    data = setup.dataset(run, inputs.sets, inputs.marks, layout, 0)
    drawn = np.array([len(batch.predicts_codes_at) for step in range(100) for batch in data.step(step)])
    assert drawn.mean() < run.train.drawn_at_once < drawn.max()
    assert 0.02 < (drawn > run.train.drawn_at_once).mean() < 0.35  # of normal numbers 0.16


def test_a_cache_that_is_too_small_is_told_before_training(run_with, tmp_path, monkeypatch):
    """An error below what is read at a time, a warning below what the sets have."""
    path = run_with().data.sets[0].path
    at_url = f"data.sets=[file://{path}]", f"data.cache={tmp_path}", "train.micro_batch_size=2"
    inputs, size = setup.read_inputs(run_with(*at_url)), sum(file.stat().st_size for file in Path(path).glob("*/*.mds"))

    def plan(share):
        run = run_with(*at_url, f"data.cache_gb={size * share / 1e9}")
        layout = setup.settle(run, 2, inputs)
        setup.check_cache(run, layout, inputs)
        return setup.plan(run, layout, inputs)

    for local, rows in (2, 4), (1, 2):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        message = f"^data.cache_gb=.* node of {local} processes reads at a time, {rows} rows out of"
        with pytest.raises(UserError, match=message):
            plan(0.1)
    assert re.search(r"warning: data.cache_gb=\S+ is less than the \S+ GB of the sets at URLs", plan(0.9))
    assert "data.cache_gb" not in plan(1.1)


@pytest.mark.parametrize("overrides, message", [
    (["model.streams=[pixels]"], r"model.streams=\['pixels'\] must name .*\['semantic', 'pixel'\]"),
    (["model.streams=[]"], r"model.streams=\[\] must name"),
    (["train.loss.pixels=1"], "train.loss.pixels weighs .* known: text, semantic, pixel"),
    (["model.streams=[pixel]", "train.loss.semantic=1"], "train.loss.semantic weighs .* known: text, pixel"),
    (["train.loss={text: 0, semantic: 0, pixel: 0}"], "train.loss weighs text and semantic and pixel 0"),
])  # fmt: skip
def test_streams_and_losses_that_there_are_not(run_with, overrides, message):
    with pytest.raises(UserError, match=message):
        setup.read_inputs(run_with(*overrides))


def test_streams_are_chosen_in_their_own_order():
    a, b, c = streams = [Stream(name, 2, 64, 8) for name in "abc"]
    assert setup.choose_streams(streams, None) == streams and setup.choose_streams(streams, ["c", "a"]) == [a, c]
    for names in ([], ["d"], ["a", "d"]):
        with pytest.raises(UserError, match=r"model.streams=\[.*\['a', 'b', 'c'\]"):
            setup.choose_streams(streams, names)


def test_held_out_sets_are_checked_as_those_of_training_are(run_with, tmp_path):
    write_shard_set(tmp_path / "other", random_documents(5))
    with pytest.raises(UserError, match="shard set '.*other' was made with the dualtoken of 'random'"):
        setup.read_inputs(run_with(f"data.validation=[{tmp_path}/other]"))
