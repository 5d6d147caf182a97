"""Configs that are hostile, broken or odd: one line with the key, its value and what is wrong, and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.config import PipelineConfig
from megadual.config import load_config, parse_command_line
from megadual.engine.topology import topology
from megadual.errors import UserError, command
from megadual.train.config import PretrainConfig
from megadual.vision.recipe import TrainTokenizerConfig
from megadual.vision.siglip import TrainSiglipConfig

ROOT = Path(__file__).parents[2]
REQUIRED = {
    PretrainConfig: [
        "model.dualtoken=a", "model.text_tokenizer=b", "data.sets=[s]", "run.dir=r",
        "train.steps=8", "train.seq_len=64", "train.global_batch_tokens=512",
    ],
    TrainTokenizerConfig: ["run.dir=r", "model.streams.pixel={layers: [1], feeds: [picture]}"],
    TrainSiglipConfig: ["run.dir=r"],
    PipelineConfig: ["inputs=[a.tar]", "output=o", "dualtoken=d", "text_tokenizer=t"],
}  # fmt: skip
LLM, TOKENIZER, SIGLIP, PIPELINE = REQUIRED


@command
def read(schema, arguments, world):
    config, _ = parse_command_line(schema, "", arguments)
    if schema is LLM:
        topology(config, world)


@pytest.fixture
def complaint(capsys):
    """complaint(schema, arguments): the one line that they get."""

    def get(schema, arguments, world=1):
        with pytest.raises(SystemExit) as end:
            read(schema, [*REQUIRED[schema], *map(str, arguments)], world)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and len(line) < 500
        return line

    return get


WRONG_VALUES = [
    # sizes
    (LLM, "model.layers=0", "model.layers=0 must be at least 1"),
    (LLM, "model.layers=-3", "model.layers=-3 must be at least 1"),
    (LLM, "model.layers=2.5", "model.layers=2.5 must be int"),
    (LLM, "model.layers=4.0", "write 4"),
    (LLM, "train.steps=1e3", "train.steps=1000 must be int; at least 1; write 1000"),
    (LLM, "model.layers=99999999999999999999", "model.layers=99999999999999999999 does not fit into 64 bits"),
    (LLM, "model.hidden=130", "width 130 is not divisible by heads 4"),
    (LLM, "model.hidden=20", "model.hidden(20) / model.heads(4) = 5 must be even"),
    (LLM, "model.kv_heads=3", "model.heads 4 is not divisible by model.kv_heads 3"),
    (LLM, "model.kv_heads=0", "model.kv_heads=0 must be at least 1"),
    (LLM, "model.head.heads=5", "model.head: width 96 is not divisible by heads 5"),
    (LLM, "model.norm_eps=0", "model.norm_eps=0.0 must be over 0"),
    (LLM, "model.rope_base=.nan", "model.rope_base=nan must be a finite number, over 0"),
    (LLM, "model.preset=70b", "model.preset '70b' is unknown; known: tiny, 3b, 7b"),
    (LLM, "engine=fsdp", "engine 'fsdp' is unknown; known: megatron, deepspeed"),
    (LLM, "engine=null", "engine=null must be str"),
    (LLM, "model.dualtoken=''", "model.dualtoken='' is empty"),
    (LLM, "model.dualtoken=", "model.dualtoken=null must be str"),
    (LLM, "model.text_tokenizer=[a, b]", "model.text_tokenizer=[a, b] must be str"),
    # steps and numbers of training
    (LLM, "seed=1", "did you mean 'train.seed'"),
    (LLM, f"train.seed={2**70}", f"train.seed={2**70} must be between 0 and 4294967295"),
    (LLM, "train.seed=-1", "train.seed=-1 must be between 0 and"),
    (LLM, "train.steps=0", "train.steps=0 must be at least 1"),
    (LLM, "train.steps=true", "train.steps=true must be int"),
    (LLM, "train.steps=[1]", "train.steps=[1] must be int"),
    (LLM, "train.steps={a: 1}", "train.steps={'a': 1} must be int"),
    (LLM, "train.steps=1_000x", "train.steps=1_000x must be int"),
    (LLM, "train.seq_len=0", "train.seq_len=0 must be between 1 and 16777216"),
    (LLM, "train.seq_len=1000000000", "train.seq_len=1000000000 must be between 1 and 16777216"),
    (LLM, "train.micro_batch_size=3", "is not a multiple of train.seq_len(64) x train.micro_batch_size(3)"),
    (LLM, "train.global_batch_tokens=63", "train.global_batch_tokens=63 is not a multiple"),
    (LLM, "train.lr=.nan", "train.lr=nan must be a finite number"),
    (LLM, "train.lr=.inf", "train.lr=inf must be a finite number, 0 or more"),
    (LLM, "train.lr=-1e-3", "train.lr=-0.001 must be 0 or more"),
    (LLM, "train.lr=fast", "train.lr=fast must be float; 0 or more"),
    (LLM, "train.lr=null", "train.lr=null must be float"),
    (LLM, "train.min_lr=1", "train.min_lr=1.0 must not be over train.lr"),
    (LLM, "train.beta1=.nan", "train.beta1=nan must be a finite number"),
    (LLM, "train.clip_grad=-1", "train.clip_grad=-1.0 must be 0 or more"),
    (LLM, "train.schedule=linear", "train.schedule 'linear' is unknown; known: cosine, constant, wsd"),
    (LLM, "train.schedule=wsd", "train.decay_steps=None: give both"),
    (LLM, "train.precision=fp8", "train.precision 'fp8' is unknown; known: fp32, bf16"),
    (LLM, "train.recompute=maybe", "train.recompute=maybe must be true or false"),
    (LLM, "train.recompute=2", "train.recompute=2 must be true or false"),
    (LLM, "train.recompute=null", "train.recompute=null must be true or false"),
    (LLM, "train.parts=llm", "train.parts=llm must be list[str]; projector, llm, heads"),
    (LLM, "train.parts=[]", "train.parts=[] trains nothing"),
    (LLM, "train.loss=1", "train.loss=1 must be a mapping of names to float"),
    (LLM, "train.loss.text=null", "train.loss={'text': None} must be a mapping of names to float"),
    (LLM, "train.loss.text=.nan", "train.loss.text=nan must be a finite number"),
    (LLM, "train.spike_factor=.inf", "train.spike_factor=inf must be a finite number, over 0"),
    # data
    (LLM, "data.sets=[{path: a, weight: 1}, {path: b, weight: .nan}]", "data.sets[1].weight=nan must be a finite"),
    (LLM, "data.sets=[{path: a, weight: .inf}]", "data.sets[0].weight=inf must be a finite number, over 0"),
    (LLM, "data.sets=[{path: a, weight: -1}]", "data.sets[0].weight=-1.0 must be over 0"),
    (LLM, "data.sets=[{path: a, weight: 0}, {path: b, weight: 0}]", "data.sets[0].weight=0.0 must be over 0"),
    (LLM, "data.sets=[{path: a, wieght: 1}]", "did you mean 'data.sets[0].weight'"),
    (LLM, "data.sets=['']", "data.sets[0].path='' is empty"),
    (LLM, "data.sets=[null]", "'data.sets[0]' is a section and needs keys, got None"),
    (LLM, "data.sets=[[a]]", "'data.sets[0]' is a section and needs keys, got ['a']"),
    (LLM, "data.sets=null", "'data.sets' is a list: give it whole"),
    (LLM, "data.sets[0].weight=1", "'data.sets' is a list: give it whole"),
    (LLM, "data.weights=[1,2]", "unknown config key 'data.weights'; known here: data.sets"),
    (LLM, "data.validation=[s]", "data.validation holds out 's', which data.sets trains on"),
    (LLM, "data.validation_every=3", "data.validation_every=3 needs shard sets in data.validation"),
    (LLM, "data.validation_rows=0", "data.validation_rows=0 must be at least 1"),
    # parallel sizes
    (LLM, "parallel.tensor=0", "parallel.tensor=0 must be at least 1"),
    (LLM, "parallel.tensor=two", "parallel.tensor=two must be int"),
    (LLM, "parallel.stage_layers=[4.0]", "parallel.stage_layers=[4] must be list[int] or null"),
    (LLM, "parallel.gpu_memory_gib=.inf", "parallel.gpu_memory_gib=inf must be a finite number"),
    # the run
    (LLM, "run.dir=''", "run.dir='' is empty"),
    (LLM, "run.dir='  '", "is empty"),
    (LLM, "run.dir=s3://bucket/run", "run.dir=s3://bucket/run is a URL; a run's folder is on a disk"),
    (LLM, f"run.dir={__file__}/run", f"'{__file__}' is a file; give the path of a folder"),
    (LLM, r'run.dir="a\0b"', "holds a NUL character"),
    (LLM, "run.wandb=on", "run.wandb=true must be str; what YAML reads otherwise needs quotes; online, offline"),
    (LLM, "run.profile=[9,9]", "run.profile=[9, 9] begins after the last step: train.steps=8"),
    (LLM, "run.profile=[3,2]", "run.profile=[3, 2] must be two steps"),
    (LLM, "run.profile=3", "run.profile=3 must be list[int] or null"),
    (LLM, "run.profile=[0,1]", "run.profile=[0, 1] must be at least 1"),
    (LLM, "run.hang_timeout=.nan", "run.hang_timeout=nan must be a finite number, over 0"),
    (LLM, "run.hang_timeout=-1", "run.hang_timeout=-1.0 must be over 0"),
    (LLM, "run.ranks=0", "run.ranks=0 must be at least 1"),
    (LLM, "run.samples=[null]", "run.samples=[null] must be list[str]"),
    (LLM, "run.samples_every=10", "give some, and a multiple of checkpoint.every=1000"),
    (LLM, "checkpoint.keep=0", "checkpoint.keep=0 must be at least 1"),
    (LLM, "checkpoint.start=''", "checkpoint.start='' is empty"),
    (LLM, "checkpoint=null", "'checkpoint' is a section and needs keys, got None"),
    # names and forms
    (LLM, "train.stps=1", "did you mean 'train.steps'"),
    (LLM, "=1", "override '=1' is not of the form key=value"),
    (LLM, "train..steps=1", "is not of the form key=value"),
    (LLM, "train.steps", "is not of the form key=value"),
    (LLM, "train.lr=[1,", "override 'train.lr=[1,' can't be read: line 2: "),
    (LLM, "run.name=!!python/object:os.system {}", "can't be read: line 1: could not determine a constructor"),
    (LLM, "run.name=${run.name}", "config key 'run.name': Recursive interpolation detected"),
    (LLM, "run.name=${nowhere}", "config key 'run.name': Interpolation key 'nowhere' not found"),
    (LLM, "run.name=${oc.env:NOT_SET_ANYWHERE}", "Environment variable 'NOT_SET_ANYWHERE' not found"),
    (LLM, "train.steps=${run.name}", "train.steps"),
    (LLM, "run.name=${", "run.name"),
    # the other trainings and the data pipeline
    (TOKENIZER, "train.lr=.nan", "train.lr=nan must be a finite number"),
    (TOKENIZER, f"train.seed={2**70}", "must be between 0 and 4294967295"),
    (TOKENIZER, "model.streams.pixel.weights=[.nan]", "model.streams.pixel.weights=[nan] must be a finite number"),
    (TOKENIZER, "model.streams.pixel=3", "'model.streams.pixel' is a section and needs keys, got 3"),
    (TOKENIZER, "model.streams=[pixel]", "'model.streams' needs a section for each name, got ['pixel']"),
    (TOKENIZER, "model.streams.pixel.depth=0", "model.streams.pixel.depth=0 must be at least 1"),
    (TOKENIZER, "model.streams.pixel.codebook_size=70000", "=70000 must be between 1 and 65536"),
    (TOKENIZER, "model.streams.pixel.feeds=[screen]", "is unknown; known: teacher, picture"),
    (TOKENIZER, "train.loss.gan=-1", "train.loss.gan=-1.0 must be 0 or more"),
    (TOKENIZER, "data.min_crop=0", "data.min_crop=0.0 must be over 0 and at most 1"),
    (TOKENIZER, "data.train=null", "data.train=null must be str"),
    (TOKENIZER, "gan.every=0", "gan.every=0 must be at least 1"),
    (TOKENIZER, "run.dir=gs://bucket/run", "run.dir=gs://bucket/run is a URL"),
    (SIGLIP, "run.dir=s3://bucket/run", "is a URL"),
    (SIGLIP, "run.ranks=2", "run.ranks=2: training SigLIP is for one process"),
    (SIGLIP, "model.hidden_size=97", "model.hidden_size=97 does not divide by model.heads=4"),
    (SIGLIP, "model.patch_size=7", "model.image_size=64 does not divide by model.patch_size=7"),
    (PIPELINE, "inputs=a.tar", "inputs=a.tar must be list[str]"),
    (PIPELINE, "output=''", "output='' is empty"),
    (PIPELINE, "max_bad_fraction=2", "max_bad_fraction=2.0 must be between 0 and 1"),
    (PIPELINE, "max_bad_fraction=.nan", "max_bad_fraction=nan must be a finite number"),
    (PIPELINE, "workers.gpus=.inf", "workers.gpus=inf must be a finite number"),
    (PIPELINE, "workers.count=-1", "workers.count=-1 must be 0 or more"),
    (PIPELINE, "encode.batch_size=0", "encode.batch_size=0 must be at least 1"),
    (PIPELINE, "read.format=coco", "read.format 'coco' is unknown"),
    (PIPELINE, "filters.min_side=big", "filters.min_side=big must be int; 0 or more"),
]  # fmt: skip


@pytest.mark.parametrize("schema, override, message", WRONG_VALUES)
def test_a_wrong_value_gets_one_line(complaint, monkeypatch, schema, override, message):
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    assert message in complaint(schema, [override])


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG_FILES = [
    (b"", "is empty: it must hold a mapping of keys"),
    (b"# all is commented out\n", "is empty"),
    (b"- train\n- steps\n", "must hold a mapping of keys, not a list"),
    (b"train\n", "'train' is a section and needs keys, got None"),
    (b"3\n", "is not valid YAML"),
    (b"\x7fELF\x00\x00\x01", "is not valid YAML"),
    (b"run: {name: caf\xe9}\n", "is not a text in UTF-8, at byte 15"),
    (BOMB.encode(), "is not valid YAML: line 1: YAML "),
    (b"run: &run {name: *run}\n", "is not valid YAML: line 1: YAML recursive aliases"),
    (b"run: {name: !!python/object/apply:os.system [true]}\n", "is not valid YAML: line 1: could not determine"),
    (b"train:\n  steps: 3\n steps: 4\n", "is not valid YAML: line 3: "),
    (b"train:\n  steps: 3\n  steps: 4\n", "is not valid YAML: line 3: found duplicate key steps"),
    (b"[" * 20000, "is not valid YAML"),
    (b"train.steps: 3\n", "in YAML every dot begins a section, as in train: {steps: ...}"),
    (b"1: 2\n", "unknown config key '1'"),
    (b"train: 3\n", "'train' is a section and needs keys, got 3"),
    (b"train:\n", "'train' is a section and needs keys, got None"),
    (b"run: {name: yes}\n", "run.name=true must be str"),
    (b"base: config.yaml\n", "is its own base"),
    (b"base: 3\n", "base=3 must be the path of a YAML file"),
    (b"base: nowhere.yaml\n", "nowhere.yaml' does not exist"),
    (b"base: .\n", "is a folder; name a file"),
]


@pytest.mark.parametrize("content, message", WRONG_FILES)
def test_a_broken_file_gets_one_line(complaint, tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    line = complaint(LLM, ["--config", path])
    assert message in line and str(path.parent) in line


def test_a_folder_is_no_config(complaint, tmp_path):
    assert "is a folder; name a file" in complaint(LLM, ["--config", tmp_path])


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_a_file_in_the_place_of_a_runs_folder(complaint, tmp_path, name):
    (tmp_path / name).touch()
    assert f"'{tmp_path}/{name}' is a file; give" in complaint(LLM, [f"run.dir={tmp_path}"])


@pytest.mark.parametrize("world, overrides, message", [
    (2, ["parallel.context=2", "train.seq_len=30", "train.global_batch_tokens=30"], "the 4 equal shares"),
    (2, ["parallel.tensor=2", "parallel.sequence=true", "train.seq_len=63", "train.global_batch_tokens=63"],
     "the 2 equal shares"),
    (6, ["parallel.tensor=4"], "does not divide the world of 6 processes"),
    (3, [], "x data-parallel(3) = 192"),
])  # fmt: skip
def test_sizes_that_do_not_divide(complaint, world, overrides, message):
    assert message in complaint(LLM, overrides, world)


def test_what_is_odd_but_right():
    """Keys that another layer gives, texts that spell numbers, numbers that stand for texts."""
    odd = ["run.name=${oc.env:HOME}/${train.steps}", "train.lr='1e-3'", "train.clip_grad=3", "model.dualtoken=7"]
    run = load_config(LLM, None, [*REQUIRED[LLM], *odd, "data.sets=[x, {path: y}]", "train.loss={}"])
    assert (run.run.name, run.train.lr, run.model.dualtoken) == (f"{os.environ['HOME']}/8", 1e-3, "7")
    assert [each.path for each in run.data.sets] == ["x", "y"]
    with pytest.raises(UserError, match="holds out 'x'"):
        load_config(LLM, None, [*REQUIRED[LLM], "data.sets=[x]", "data.validation=${data.sets}"])


def test_the_command_says_it_in_one_line():
    command = [sys.executable, "pretrain/pretrain.py", *REQUIRED[LLM], "train.lr=.nan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: train.lr=nan must be a finite number, 0 or more\n"
