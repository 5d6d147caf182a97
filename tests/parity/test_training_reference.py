"""Whole training runs against an independent one (training_reference.py), and that wrong settings would show."""

import dataclasses
from functools import partial

import pytest
import torch
from training_reference import Document, HeadSizes, Marks, Model, Recipe, Stream, train
from transformers import Qwen2Config

from megadual.data.dataset import MicroBatch
from megadual.hf.mapping import Sizes, to_hf
from megadual.model.dual_lm import Vocabulary
from megadual.streams import Role
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.shards import SPECIAL
from megadual.train.config import PretrainConfig
from megadual.train.metrics import LOSS, numbers_of

# A gradient that goes through the norm of something small magnifies rounding: 2e-5 in one step of conversations.
STEPS, STEPS_TO_SHOW, TOLERANCE = 20, 10, 3e-5
# Every setting differs from its default and counts. Where every norm were clipped, AdamW would not see by how much.
SETTINGS = [
    f"train.steps={STEPS}", "train.lr=2e-3", "train.min_lr=2e-4", "train.warmup_steps=5", "train.weight_decay=0.2",
    "train.beta1=0.8", "train.beta2=0.9", "train.clip_grad=1.5", "train.loss.text=0.5", "train.loss.semantic=1.5",
    "train.loss.pixel=0.75", "train.micro_batch_size=2",
]  # fmt: skip
CASES = {
    "megatron": [],
    "deepspeed": ["engine=deepspeed"],
    "tied": ["model.tie_embeddings=true"],
    "frozen": ["train.parts=[projector,heads]", "train.clip_grad=1"],
    "conversations": [],
}


# What MegaDual calls things, for the reference.
def streams_of(vocabulary: Vocabulary) -> list[Stream]:
    return [Stream(stream.name, stream.depth, vocabulary.codebooks[stream.name]) for stream in vocabulary.streams]


def losses_of(result: dict) -> dict[str, float]:
    return {name.removeprefix(LOSS): value for name, value in result.items() if name.startswith(LOSS)}


PARTS = {"projector": ("projector.",), "llm": ("model.", "lm_head."), "heads": ("heads.",)}
MARKS = Marks(
    SPECIAL.end_of_text, SPECIAL.image, SPECIAL.image_start, SPECIAL.image_gen_start,
    answer=SPECIAL.headers[Role.ASSISTANT].tolist(), im_end=SPECIAL.im_end,
)  # fmt: skip


def documents_of(batch: MicroBatch) -> list[Document]:
    """A micro-batch's documents, each by itself, without padding."""
    parts = zip(batch.cu_seqlens.tolist()[:-1], batch.cu_seqlens.tolist()[1:], strict=True)
    codes = batch.codes
    documents = [
        Document(batch.tokens[i:j].tolist(), {name: each[i:j] for name, each in codes.items()}) for i, j in parts
    ]
    return [document for document in documents if set(document.tokens) != {MARKS.end_of_text}]


def trained_by_megadual(runs: list[PretrainConfig]) -> list[tuple]:
    """For each run its initial weights, its micro-batches by step, and what the steps gave."""
    found = []
    for run in runs:
        engine, data = tiny.build(run)
        rows = tiny.vocabulary().padded_text_size  # ids that don't exist are in the softmax as well
        sizes = Sizes(run.model.heads, run.model.kv_heads, rows, rows)
        weights = {}
        for name, parameter in engine.chunks[0].named_parameters():
            weights |= {n: t.clone() for n, t in to_hf(name, parameter.detach(), sizes).items()}
        batches = [data.step(step) for step in range(run.train.steps)]
        found.append((weights, batches, [numbers_of(engine.train_step(step)) for step in batches]))
        engine.shutdown()
    return found


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Of each case the run, its initial weights, its steps' documents, and its results in the reference's words."""
    folder = tmp_path_factory.mktemp("runs")
    shards = dict.fromkeys(CASES, tiny.write_tiny_set(folder / "shards", images=(0, 2)))
    shards["conversations"] = tiny.write_tiny_set(folder / "conversations", images=(0, 2), conversations=200)
    runs = [
        tiny.tiny_run(folder / name, shards[name], *SETTINGS, *overrides, caption_dropout=0.5, text_dropout=0.2)
        for name, overrides in CASES.items()
    ]
    (found,) = run_distributed(trained_by_megadual, 1, runs)
    trainings = {}
    for name, run, (weights, batches, results) in zip(CASES, runs, found, strict=True):
        steps = [[document for batch in step for document in documents_of(batch)] for step in batches]
        results = [{"total": r["loss"], **losses_of(r), "grad_norm": r["grad_norm"], "lr": r["lr"]} for r in results]
        trainings[name] = (run, weights, steps, results)
    return trainings


def reference_model(run: PretrainConfig, weights: dict[str, torch.Tensor]) -> Model:
    model, vocabulary = run.model, tiny.vocabulary()
    config = Qwen2Config(
        vocab_size=vocabulary.padded_text_size, hidden_size=model.hidden, intermediate_size=model.ffn,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps, rope_theta=model.rope_base, tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )  # fmt: skip
    head = HeadSizes(model.head.width, model.head.layers, model.head.heads, model.head.ffn)
    reference = Model(config, head, streams_of(vocabulary))
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    return reference


def recipe_of(run: PretrainConfig) -> Recipe:
    train = run.train
    return Recipe(
        train.steps, train.lr, train.min_lr, train.warmup_steps, train.weight_decay, (train.beta1, train.beta2),
        train.clip_grad, dict(train.loss), sum((PARTS[part] for part in train.parts), ()),
    )  # fmt: skip


def difference(found: list[dict], reference: list[dict]) -> float:
    """The largest of a loss or gradient norm, relative to what is over 1."""
    return max(
        abs(a[name] - b[name]) / max(1.0, abs(b[name]))
        for a, b in zip(found, reference, strict=True)
        for name in b
        if name != "lr"
    )


@pytest.mark.parametrize("case", CASES)
def test_a_run_trains_as_the_reference_does(trainings, case):
    run, weights, steps, results = trainings[case]
    recipe = recipe_of(run)
    reference = train(reference_model(run, weights), steps, MARKS, recipe)
    assert difference(results, reference) < TOLERANCE
    assert [r["lr"] for r in results] == pytest.approx([r["lr"] for r in reference], rel=1e-9)
    # The documents are of every kind.
    documents = sum(steps, [])
    kinds = {(d.tokens.count(MARKS.draw), d.tokens.count(MARKS.look_at)) for d in documents}
    assert kinds == {(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)}
    assert any(not all(d.learned(MARKS)) for d in documents) == (case == "conversations")
    assert any(d.tokens[0] == MARKS.draw and d.tokens[-2] != MARKS.image for d in documents)  # no caption
    assert {r["grad_norm"] > recipe.clip for r in reference} == {True, False}


def but(**changes):
    return partial(dataclasses.replace, **changes)


def weight(name: str, factor: float):
    return lambda recipe: dataclasses.replace(recipe, weights=recipe.weights | {name: recipe.weights[name] * factor})


WRONG = {
    "weight of text": ("megatron", weight("text", 1.01)),
    "weight of a stream": ("megatron", weight("pixel", 1.01)),
    "decay": ("megatron", but(decay=0.1)),
    "decay of biases and norms": ("megatron", but(decay_vectors=True)),
    "warm-up one longer": ("megatron", but(warmup=6)),
    "no warm-up": ("megatron", but(warmup=0)),
    "end of the cosine": ("megatron", but(min_lr=0.0)),
    "clipping": ("megatron", but(clip=1.55)),
    "no clipping": ("megatron", but(clip=1e9)),
    "second moment": ("megatron", but(betas=(0.8, 0.91))),
    "targets shifted": ("megatron", but(shift=2)),
    "targets not shifted": ("megatron", but(shift=0)),
    "what the user says is learned": ("conversations", but(mask_shift=-1)),
    "the assistant's last token is not": ("conversations", but(mask_shift=1)),
    "heads frozen": ("megatron", but(trained=PARTS["projector"] + PARTS["llm"])),
    "final norm frozen": ("megatron", but(trained=("projector.", "heads.", "model.embed", "model.layers", "lm_head."))),
    "nothing frozen": ("frozen", but(trained=PARTS["projector"] + PARTS["llm"] + PARTS["heads"])),
    "projector frozen too": ("frozen", but(trained=PARTS["heads"])),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_shows(trainings, what):
    case, change = WRONG[what]
    run, weights, steps, results = trainings[case]
    wrong = train(reference_model(run, weights), steps[:STEPS_TO_SHOW], MARKS, change(recipe_of(run)))
    assert difference(results[:STEPS_TO_SHOW], wrong) > 10 * TOLERANCE
