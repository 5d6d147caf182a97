"""From a Qwen2 model of Hugging Face's to a checkpoint that a run starts from, and to an exported folder."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from checkpoints_tools import convert_from_hf, convert_to_hf
from megadual.config import load_config
from megadual.engine.topology import topology
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.hf.tensors import CheckpointTensors
from megadual.streams import END_OF_TEXT, SPECIAL_TOKENS, Marks
from megadual.testing.distributed import run_distributed
from megadual.testing.models import CAPTIONS, write_dualtoken
from megadual.testing.shards import random_documents, write_shard_set
from megadual.text import fingerprint, load_text_tokenizer
from megadual.train import setup
from megadual.train.config import PretrainConfig
from megadual.vision import DualTokenConfig, read_codebooks

HEAD = ["model.head.width=32", "model.head.layers=2", "model.head.heads=2", "model.head.ffn=48"]
BASE = Path(__file__).parents[2] / "pretrain" / "configs" / "tiny.yaml"
VISUAL = ("embedding.projector", "heads")
PADDING = 13  # rows of the table that no token has


def write_qwen(folder: Path, tied: bool, **changes) -> Qwen2ForCausalLM:
    """A random model with a tokenizer that knows one of SPECIAL_TOKENS, as Qwen2.5's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, rope_theta=1e5, max_position_embeddings=64, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer) + PADDING, **(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def dualtoken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dualtoken")
    write_dualtoken(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def converted(request, dualtoken, tmp_path_factory):
    """(Qwen's model, folder that holds `qwen` and the checkpoint `start`)."""
    folder = tmp_path_factory.mktemp("qwen")
    model = write_qwen(folder / "qwen", tied=request.param)
    arguments = [
        "--model",
        folder / "qwen",
        "--dualtoken",
        dualtoken,
        "--output",
        folder / "start",
        "--base",
        BASE,
        *HEAD,
    ]
    convert_from_hf.main([*map(str, arguments)])
    return model, folder


@torch.no_grad()
def test_the_export_gives_qwens_text_logits(converted, tmp_path):
    model, folder = converted
    convert_to_hf.main(["--checkpoint", str(folder / "start"), "--output", str(tmp_path / "hf")])
    exported = MegaDualForCausalLM.from_pretrained(tmp_path / "hf").eval()
    known = model.config.vocab_size - PADDING
    assert exported.config.text_config.vocab_size == known + len(SPECIAL_TOKENS) - 1
    ids = torch.randint(known, (3, 40), generator=torch.Generator().manual_seed(0))
    expected, found = model(ids).logits[..., :known], exported(input_ids=ids).logits
    assert expected.std() > 0.1 and (found[..., :known] - expected).abs().max() < 1e-5

    table, original = exported.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(table[:known], original[:known])
    mean = original[:known].mean(0)
    assert all(torch.allclose(row, mean, atol=1e-6) for row in table[known:])
    assert "not trained" in (tmp_path / "hf" / "README.md").read_text()


def weights(run: PretrainConfig) -> list[dict[str, torch.Tensor]]:
    """A rank's parameters before the first step, and that step's loss: as the run starts, and from scratch."""
    inputs, found = setup.read_inputs(run), []
    layout = topology(run, dist.get_world_size())
    for start in (run.checkpoint.start, None):
        run.checkpoint.start = start
        engine = setup.engine(run, layout, inputs.vocabulary)
        found.append({name: parameter.detach().clone() for name, parameter in engine.chunks[0].named_parameters()})
        data = setup.dataset(run, inputs.sets, inputs.marks, layout, engine.data_rank)
        found[-1]["loss"] = torch.tensor(engine.train_step(data.step(0)).loss)
        engine.shutdown()
    return found


def test_a_run_starts_from_it(converted, dualtoken, tmp_path):
    """Under tensor parallelism; the visual parts are those of a run from scratch with the same seed."""
    _, folder = converted
    tokenizer = load_text_tokenizer(folder / "start" / "text_tokenizer")
    assert fingerprint(tokenizer) == fingerprint(load_text_tokenizer(folder / "qwen"))  # shards made with either serve
    config = DualTokenConfig.load(dualtoken)
    documents = random_documents(
        30, grid=config.grid, streams=config.code_streams, vocabulary=len(tokenizer),
        special=Marks.of(tokenizer),
    )  # fmt: skip
    shards = write_shard_set(
        tmp_path / "shards",
        documents,
        dualtoken={"fingerprint": read_codebooks(dualtoken).fingerprint},
        text_tokenizer={"fingerprint": fingerprint(tokenizer)},
        marks=Marks.of(tokenizer),
    )
    rest = [f"data.sets=[{shards}]", f"run.dir={tmp_path}", "train.steps=1", "train.seq_len=64"]
    rest += ["train.global_batch_tokens=128", "parallel.tensor=2", "parallel.pipeline=1"]
    run = load_config(PretrainConfig, folder / "start" / "run.yaml", rest)
    assert run.train.warmup_steps == load_config(PretrainConfig, BASE).train.warmup_steps > 0
    ranks = run_distributed(weights, 2, run)

    table = CheckpointTensors(folder / "start").read("embedding.word_embeddings.weight")
    assert torch.equal(torch.cat([started["embedding.word_embeddings.weight"] for started, _ in ranks]), table)
    for started, scratch in ranks:
        assert started["loss"].isfinite()
        for name in started:
            assert torch.equal(started[name], scratch[name]) == name.startswith(VISUAL), name


def error_of(capsys, *args) -> str:
    with pytest.raises(SystemExit) as exit:
        convert_from_hf.main([*map(str, args)])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_wrong_input_is_named(converted, dualtoken, tmp_path, capsys):
    _, folder = converted
    qwen, output = folder / "qwen", tmp_path / "out"
    model = ["--model", qwen, "--output", output]
    assert "is a language model; give --dualtoken" in error_of(capsys, *model)
    assert "no DualToken in" in error_of(capsys, *model, "--dualtoken", tmp_path / "nowhere")
    assert "exists; give a new folder" in error_of(capsys, "--model", qwen, "--output", folder / "start")
    assert "no folder, and no model" in error_of(capsys, "--model", "./no/such/model", "--output", output)
    write_qwen(tmp_path / "windowed", tied=False, use_sliding_window=True, sliding_window=8)
    windowed = ["--model", tmp_path / "windowed", "--output", output, "--dualtoken", dualtoken]
    assert "sliding window" in error_of(capsys, *windowed)
    write_qwen(tmp_path / "deeper", tied=False, num_hidden_layers=3)
    (tmp_path / "deeper" / "config.json").write_text((qwen / "config.json").read_text())
    deeper = ["--model", tmp_path / "deeper", "--output", output, "--dualtoken", dualtoken, *HEAD]
    assert "'model.layers.2.input_layernorm.weight' is (64,), expected no such tensor" in error_of(capsys, *deeper)
    assert not output.exists()
