"""Configs are strict, layouts are checked: the message names the value and the fix."""

import dataclasses

import pytest

from data_pipeline.config import PipelineConfig
from megadual.config import describe_keys, load_config, to_yaml
from megadual.engine.topology import topology
from megadual.errors import UserError
from megadual.keys import key
from megadual.model import sizes
from megadual.train.config import PretrainConfig, check_picked
from megadual.vision.siglip import TrainSiglipConfig

REQUIRED = [
    "model.dualtoken=a", "model.text_tokenizer=b", "data.sets=[s]", "run.dir=r",
    "train.steps=1", "train.seq_len=64", "train.global_batch_tokens=512",
]  # fmt: skip


def config(*overrides):
    return load_config(PretrainConfig, None, [*REQUIRED, *overrides])


@pytest.mark.parametrize("override, message", [
    ("train.stpes=3", "unknown config key 'train.stpes'; did you mean 'train.steps'"),
    ("trian.steps=3", "unknown config key 'trian'; did you mean 'train'"),
    ("quux=3", "unknown config key 'quux'; known here: engine, model, data"),
    ("train.eval_every=3", "unknown config key 'train.eval_every'; known here: .*train.seq_len"),
    ("checkpoint_every=3", "'checkpoint_every'; did you mean 'checkpoint.every'"),
    ("optim.lr=3", "'optim.lr'; did you mean 'train.lr'"),
    ("train.steps=many", "train.steps=many must be int; at least 1"),
    ("model.head.widht=3", "did you mean 'model.head.width'"),
    ("train=3", "'train' is a section"),
    ("train.steps", "not of the form key=value"),
])  # fmt: skip
def test_wrong_key_or_value(override, message):
    with pytest.raises(UserError, match=message):
        load_config(PretrainConfig, None, [*REQUIRED, override])


@dataclasses.dataclass
class Stream:
    depth: int = key(4, "codes of a position", least=1)


@dataclasses.dataclass
class Mappings:
    """A schema whose users choose names."""

    loss: dict[str, float] = key({"text": 1.0}, "weight in the total", least=0)
    streams: dict[str, Stream] = dataclasses.field(default_factory=dict)
    parts: list[str] = key(["llm"], "what is trained", choices=("llm", "heads"))


def test_mappings_of_values_and_of_sections():
    config = load_config(Mappings, None, ["loss.pixel=2", "streams.pixel.depth=8", "streams.semantic={}"])
    assert config.loss == {"text": 1.0, "pixel": 2.0}
    assert config.streams == {"pixel": Stream(8), "semantic": Stream(4)}
    for override, message in (
        ("loss.pixel=-1", "^loss.pixel=-1.0 must be 0 or more"),
        ("streams.pixel.depth=0", "^streams.pixel.depth=0 must be at least 1"),
        ("streams.pixel.dept=8", "'streams.pixel.dept'; did you mean 'streams.pixel.depth'"),
        ("parts=[llm,tails]", "parts '.*tails.*' is unknown; known: llm, heads"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(Mappings, None, [override])


def test_help_tells_meaning_type_bounds_and_default_of_every_key():
    told = describe_keys(Mappings)
    assert "  loss.NAME  (float, 0 or more; default {'text': 1.0})\n      weight in the total" in told
    assert "streams.NAME:\n  streams.NAME.depth  (int, at least 1; default 4)\n      codes of a position" in told
    assert "  parts  (list[str], one of llm, heads; default [llm])" in told
    for schema in (PretrainConfig, PipelineConfig, TrainSiglipConfig):
        lines = describe_keys(schema).splitlines()
        keys = [i for i, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
        assert len(keys) > 20 and all(lines[i + 1].startswith("      ") for i in keys)


def test_missing_value():
    with pytest.raises(UserError, match="'model.text_tokenizer' has no value"):
        load_config(PretrainConfig, None, [r for r in REQUIRED if "text_tokenizer" not in r])


def test_yaml_with_base(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: 5, seq_len: 32}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\ntrain: {steps: 7}\n")
    run = load_config(
        PretrainConfig, tmp_path / "child.yaml", [r for r in REQUIRED if "steps" not in r and "seq" not in r]
    )
    assert (run.train.steps, run.train.seq_len) == (7, 32)
    (tmp_path / "bad.yaml").write_text("train: {stepz: 7}\n")
    with pytest.raises(UserError, match="bad.yaml: unknown config key 'train.stepz'"):
        load_config(PretrainConfig, tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="does not exist"):
        load_config(PretrainConfig, tmp_path / "none.yaml")


def test_a_later_yaml_adds_to_the_ones_before(tmp_path):
    (tmp_path / "model.yaml").write_text("train: {steps: 5, seq_len: 32, lr: 1.0}\n")
    (tmp_path / "stage.yaml").write_text("train: {lr: 2.0}\n")
    paths = [tmp_path / "model.yaml", tmp_path / "stage.yaml"]
    run = load_config(PretrainConfig, paths, [r for r in REQUIRED if "steps" not in r and "seq" not in r])
    assert (run.train.steps, run.train.lr) == (5, 2.0)


def test_yaml_round_trip(tmp_path):
    run = config("model.layers=6", "data.sets=[{path: a, weight: 1, prompts: [What is this?]}, {path: b, weight: 2}]")
    (tmp_path / "c.yaml").write_text(to_yaml(run))
    assert load_config(PretrainConfig, tmp_path / "c.yaml") == run


def test_presets_fill_only_what_is_null():
    run = config("model.preset=7b", "model.layers=4", "model.head.width=64", "model.head.heads=4")
    assert (run.model.layers, run.model.hidden, run.model.head.width, run.model.head.layers) == (4, 3584, 64, 3)
    with pytest.raises(UserError, match="model.preset '8b' is unknown"):
        config("model.preset=8b")


@pytest.mark.parametrize("preset, weights", [
    ("3b", 3_085_938_688), ("7b", 7_615_616_512), ("14b", 14_770_033_664), ("32b", 32_763_876_352),
])  # fmt: skip
def test_presets_are_as_large_as_the_released_models(preset, weights):
    """As counted in their files, where the tables have rows that no token needs."""
    model = config(f"model.preset={preset}").model
    table = sizes.text_table(model, 151_936 if model.tie_embeddings else 152_064).total
    assert model.layers * sizes.layer(model).total + model.hidden + (2 - model.tie_embeddings) * table == weights


def test_what_auto_picks_is_not_given():
    run = config("parallel.layout=auto")
    check_picked(run, ["train.steps=3"])
    check_picked(config(), ["parallel.tensor=2"])
    with pytest.raises(UserError, match="parallel.tensor=2 is given, but parallel.layout=auto picks that"):
        check_picked(run, ["train.steps=3", "parallel.tensor=2"])


@pytest.mark.parametrize("world, overrides, message", [
    (2, ["parallel.tensor=3"], r"parallel.tensor\(3\) x parallel.pipeline\(1\) = 3 does not divide the world of 2"),
    (8, ["parallel.pipeline=8"], r"model.layers=4 are too few for parallel.pipeline\(8\)"),
    (2, ["parallel.pipeline=2", "parallel.stage_layers=[3,2]"], "2 numbers that add up to model.layers=4"),
    (8, ["parallel.tensor=8"], "model.heads=4 does not divide by parallel.tensor=8"),
    (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=4"], "= 8 chunks"),
    (2, ["model.heads=6", "model.kv_heads=3", "model.hidden=96", "parallel.tensor=2"], "one must divide the other"),
    (2, ["parallel.context=4"], r"x parallel.context\(4\) = 4 does not divide the world of 2"),
    (2, ["parallel.context=2", "train.seq_len=62", "train.global_batch_tokens=62"], "the 4 equal shares"),
    (2, ["engine=deepspeed", "parallel.context=2"], "parallel.context=2 needs engine=megatron"),
    (1, ["parallel.sequence=true"], "needs parallel.tensor > 1"),
    (1, ["train.global_batch_tokens=500"], r"is not a multiple of train.seq_len\(64\).* = 64"),
    (1, ["train.precision=fp8"], "train.precision 'fp8' is unknown"),
    (1, ["engine=jax"], "engine 'jax' is unknown"),
    (2, ["engine=deepspeed", "parallel.pipeline=2", "parallel.zero_stage=2"], "does not go with parallel.pipeline=2"),
    (2, ["engine=deepspeed", "parallel.pipeline=2", "model.tie_embeddings=true"], "counts the shared table twice"),
    (1, ["parallel.zero_stage=3"], "needs engine=deepspeed"),
    (1, ["engine=deepspeed", "parallel.zero_stage=3", "train.drawn_at_once=9"], "drawn_at_once=9 does not go with"),
    (1, ["engine=deepspeed", "train.optimizer=muon"], "train.optimizer=muon needs engine=megatron"),
    (1, ["engine=deepspeed", "train.fp8=true"], "train.fp8=true needs engine=megatron"),
    (1, ["train.fp8=true", "model.ffn=100"], "multiples of 16; model.ffn / parallel.tensor: 100"),
    (1, ["train.optimizer=sgd"], "train.optimizer 'sgd' is unknown; known: adamw, muon"),
    (1, ["train.momentum=1"], "train.momentum=1.0 must be 0 or more and below 1"),
    (1, ["train.bad_loss=shrug"], "train.bad_loss 'shrug' is unknown"),
    (1, ["engine=deepspeed", "train.grad_reduce_dtype=bf16"], "grad_reduce_dtype=bf16 needs engine=megatron"),
    (1, ["parallel.zero.reduce_bucket_size=1e8"], "they need engine=deepspeed"),
    (1, ["engine=deepspeed", "parallel.zero.stage=3"], "the stage is parallel.zero_stage"),
    (2, ["engine=deepspeed", "parallel.pipeline=2", "parallel.run_ahead=1"], "run_ahead=1 needs engine=megatron"),
    (1, ["engine=deepspeed", "train.bad_loss=skip"], "train.bad_loss=skip needs engine=megatron"),
    (2, ["engine=deepspeed", "parallel.pipeline=2", "train.parts=[heads]"], "a stage .* with nothing to train"),
    (2, ["engine=deepspeed", "parallel.pipeline=2", "parallel.virtual_pipeline=2"], "needs engine=megatron"),
    (1, ["parallel.tensor=0"], "parallel.tensor=0 must be at least 1"),
    (1, ["train.micro_batch_size=0"], "train.micro_batch_size=0 must be at least 1"),
    (1, ["train.seq_len=0"], "train.seq_len=0 must be between 1 and 16777216"),
    (1, ["checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1"),
    (1, ["checkpoint.every=0"], "checkpoint.every=0 must be at least 1"),
    (1, ["train.warmup_steps=-1"], "train.warmup_steps=-1 must be 0 or more"),
    (1, ["train.loss.pixel=-1"], "train.loss.pixel=-1.0 must be 0 or more"),
    (1, ["train.lr=1e-5"], "train.min_lr=3e-05 must not be over train.lr=1e-05"),
    (1, ["data.sets=[{path: a, draw: 50}]"], r"data.sets\[0\].draw=50.0 must be between 0 and 1"),
    (1, ["data.sets=[{path: a, weight: 1}, b]"], "'b' has no weight, 'a' has"),
    (1, ["data.sets=[{path: a, image_dropout: 0.9, both_dropout: 0.2}]"], "together 1.15; at most 1"),
    (1, ["data.sets=a"], "is a list: give it whole"),
    (1, ["train.beta2=1"], "train.beta2=1.0 must be 0 or more and below 1"),
    (1, ["run.device=gpu"], "run.device 'gpu' is unknown; known: cuda, cpu"),
    (1, ["run.wandb=on"], "run.wandb=true must be str; .* online, offline, disabled"),
    (1, ["data.sets=[]"], "names no shard set"),
    (1, ["data.validation_every=5"], "data.validation_every=5 needs shard sets in data.validation"),
    (1, ["data.sets=[a,b]", "data.validation=[./b]"], "holds out './b', which data.sets trains on"),
    (2, ["data.validation=[v]", "data.validation_rows=9"], r"rows=9 .*size\(1\) x data-parallel\(2\) = 2"),
    (2, ["data.validation=[v]", "data.validation_rows=7", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
     r"x parallel.pipeline\(2\), for the virtual pipeline, = 2"),
    (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_tokens=192"], "micro-batches"),
])  # fmt: skip
def test_layout_that_does_not_divide(world, overrides, message):
    with pytest.raises(UserError, match=message):
        topology(config(*overrides), world)


def test_topology_sizes():
    layout = topology(config("parallel.tensor=2", "parallel.pipeline=2"), 8)
    assert (layout.data, layout.rows_per_step, layout.microbatches) == (2, 8, 4)
    run = config("parallel.tensor=2", "parallel.context=2")
    assert topology(run, 8).data == 2 and "context=2" in topology(run, 8).describe(run)
