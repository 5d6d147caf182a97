"""The recipes of the three stages: what each trains, and what its loss is."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megadual.config import load_config
from megadual.errors import UserError
from megadual.run.ranks import Ranks
from megadual.testing.vision import tiny_dualtoken, tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip
from megadual.vision import DualToken
from megadual.vision.presets import BACKBONES, preset
from megadual.vision.recipe import TrainTokenizerConfig, check, frozen_modules, plan
from megadual.vision.train import TokenizerTrainer
from pretrain.train_tokenizer import main

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "pretrain/configs"
SIZES = {"256_rvq4": "siglip2-so400m-256-rvq4", "384_rvq8": "siglip2-so400m-384-rvq8"}


def trained(name, layers=27):
    """Whether a stage trains the parameter `name`: stages 0, 1, 2 as the paper's table says."""
    if name.startswith("siglip_model.") and not name.startswith("siglip_model.vision_model."):
        return (False, False, False)  # the text tower, logit scale and bias
    if ".codebooks." in name:
        return (False, False, False)  # moved by averages, not by gradients
    if ".vision_model.embeddings." in name:
        return (False, True, False)
    if ".encoder.layers." in name:
        layer = int(name.split(".encoder.layers.")[1].split(".")[0]) + 1
        return (layer == layers, True, layer > 4)
    if name.startswith(("prequant.pixel.", "postquant.pixel.", "post_quant_conv.", "decoder.")):
        return (True, True, False)
    return (True, True, True)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_a_stage_trains_exactly_what_the_paper_says(size, stage):
    config = load_config(TrainTokenizerConfig, CONFIGS / f"tokenizer_{size}_stage{stage}.yaml")
    config.model.siglip = BACKBONES[Path(config.siglip).name]
    assert config.model == preset(SIZES[size])
    with torch.device("meta"):
        model = DualToken(config.model)
    frozen = frozen_modules(model, config.train.freeze)
    for module in frozen:
        module.requires_grad_(False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if trained(name)[stage]
    }
    assert any(module is model.quantizers["pixel"] for module in frozen) == (stage == 2)  # its averages rest too
    assert not any(module is model.quantizers["semantic"] for module in frozen)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return write_tiny_pairs(folder / "pairs"), write_tiny_siglip(folder / "siglip")


def tiny_run(stage, inputs, output, *overrides):
    """The stage's recipe on a tiny tokenizer of 3 layers."""
    shards, siglip = inputs
    path = CONFIGS / f"tokenizer_256_rvq4_stage{stage}.yaml"
    given = [
        f"data.train={shards}",
        f"siglip={siglip}",
        f"run.dir={output}",
        "checkpoint.start=null",
        "data.heldout=null",
        "train.steps=4",
    ]
    given += [
        "data.batch_size=4",
        "data.workers=0",
        "train.precision=fp32",
        "gan.channels=[8,8,8]",
        "gan.norm_groups=4",
    ]
    config = load_config(TrainTokenizerConfig, path, [*given, *overrides])
    config.model = tiny_dualtoken_config(siglip={})
    config.train.freeze = [name.replace("[:26]", "[:2]").replace("[:4]", "[:1]") for name in config.train.freeze]
    return config


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_composes_the_stated_loss(stage, inputs, tmp_path):
    trainer = TokenizerTrainer(tiny_run(stage, inputs, tmp_path), Ranks.current())
    trainer.model.eval()  # the codebooks rest, so that the second forward sees what the first did
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    total, _, output = trainer.losses(images)
    with torch.no_grad():
        states = trainer.teacher(images, output_hidden_states=True)
    both = lambda x, y: F.mse_loss(x, y) - F.cosine_similarity(x, y, dim=-1).mean()
    semantic = both(output.features, states.hidden_states[2])
    cosine = -F.cosine_similarity(output.features, states.hidden_states[2], dim=-1).mean()
    pooled = both(output.pooled, states.pooler_output)
    if stage == 2:
        assert output.reconstruction is None
        expected = cosine + 5 * pooled + 5 * output.commitments["semantic"]
    else:
        mse = F.mse_loss(output.reconstruction, images)
        lpips = trainer.lpips(output.reconstruction, images).mean()
        expected = 5 * sum(output.commitments.values()) + 5 * mse + lpips
        expected = expected + (5 * pooled if stage == 0 else 5 * semantic + pooled)
    if stage == 1:
        g = -trainer.discriminator(output.reconstruction).mean()
        last = trainer.model.decoder.conv_out.weight
        wanted, given = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (mse + lpips, g))
        expected = expected + 0.75 * (wanted / (given + 1e-4)).clamp(0.3, 10) * g
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_frozen_parts_rest_and_the_rest_moves(stage, inputs, tmp_path):
    trainer = TokenizerTrainer(
        tiny_run(stage, inputs, tmp_path, "train.loss.lpips=0", "train.warmup_steps=0"), Ranks.current()
    )
    trainer.open_data()
    before = {name: x.clone() for name, x in trainer.model.named_parameters()}
    trainer.step()
    moved = {name for name, x in trainer.model.named_parameters() if not torch.equal(x, before[name])}
    deep = {name for name in before if ".encoder.layers.2." in name or ".post_layernorm" in name or ".head." in name}
    assert {name for name in deep if "vision_model" in name and "k_proj.bias" not in name} <= moved
    if stage == 0:
        assert not any(".embeddings." in name or ".layers.0." in name or ".layers.1." in name for name in moved)
        assert {
            "decoder.conv_out.weight",
            "quantizers.pixel.codebooks.0.weight",
            "prequant.semantic.0.proj.weight",
        } <= moved
    else:
        assert {"quantizers.semantic.codebooks.0.weight", "postquant.semantic.teacher.proj.weight"} <= moved
        assert not any(
            name.startswith(("decoder", "quantizers.pixel", "prequant.pixel", "post_quant_conv")) for name in moved
        )


def test_a_stage_starts_from_the_one_before_and_keeps_its_teacher(inputs, tmp_path):
    before = tiny_dualtoken(seed=5, siglip=tiny_dualtoken_config().siglip)
    before.save_pretrained(tmp_path / "before")
    trainer = TokenizerTrainer(
        tiny_run(2, inputs, tmp_path, f"checkpoint.start={tmp_path}/before", "train.loss.lpips=0"), Ranks.current()
    )
    for name, tensor in before.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    student = trainer.model.siglip_model.vision_model.embeddings.patch_embedding.weight
    assert not torch.equal(trainer.teacher.embeddings.patch_embedding.weight, student)


def commands(*files: str) -> list[list[str]]:
    """The arguments of train_tokenizer.py in the code blocks of documents."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    found = [re.search(r"^torchrun .* pretrain/train_tokenizer.py (.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("arguments", commands("README.md", "docs/tokenizer.md"))
def test_the_documents_commands_run_as_they_are_written(arguments, inputs, tmp_path, monkeypatch):
    """After each other: a stage starts where the one before it ends."""
    path, *overrides = (argument.replace("SHARDS", inputs[0]) for argument in arguments if argument != "--config")
    config = load_config(TrainTokenizerConfig, ROOT / path, overrides)
    stage = int(re.search(r"stage(\d)", path)[1])
    monkeypatch.chdir(tmp_path)
    for earlier in range(stage):
        folder = load_config(TrainTokenizerConfig, ROOT / path.replace(f"stage{stage}", f"stage{earlier}")).run.dir
        tiny_dualtoken().save_pretrained(tmp_path / folder / "dualtoken")
    check(config)
    assert config.checkpoint.start is None or (tmp_path / config.checkpoint.start).is_dir()
    assert "not there yet" not in plan(config, 8)


def test_missing_shards_are_named_by_their_key(inputs, tmp_path):
    for key in ("data.train", "data.heldout"):
        config = tiny_run(1, inputs, tmp_path, f"{key}={tmp_path}/none-*.tar")
        with pytest.raises(UserError, match=f"^{key}: no shard matches"):
            check(config)
    config = load_config(TrainTokenizerConfig, CONFIGS / "tokenizer_256_rvq4_stage1.yaml", ["data.heldout=none-*.tar"])
    assert "held out not there yet: no shard matches 'none-*.tar'" in plan(config, 8)
    assert "start    runs/tokenizer_256_rvq4/stage0/dualtoken, not there yet" in plan(config, 8)


def test_a_dry_run_prints_the_plan_without_data_or_weights(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    main(["--config", str(CONFIGS / "tokenizer_384_rvq8_stage1.yaml"), "--dry-run"])
    printed = capsys.readouterr().out
    for line in (
        "steps    781250 of 256 images (1 x 32 x 8 ranks)",
        "images   384 px, 27 x 27 positions",
        "frozen   siglip_model.text_model",
        "data     not there yet: no shard matches",
        "held out none",
    ):
        assert line in printed
    config = load_config(TrainTokenizerConfig, CONFIGS / "tokenizer_256_rvq4_stage0.yaml")
    assert "trained  241.7 M of 1348.0 M parameters" in plan(config, 8)
