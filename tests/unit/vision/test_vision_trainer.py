"""One step of the trainer: accumulation, checkpointed activations, bf16, metrics by depth, exact resuming."""

import json
from pathlib import Path

import pytest
import torch

from megadual.config import load_config
from megadual.run.signals import EXIT_STOPPED
from megadual.run.wandb_file import steps_in_wandb_files
from megadual.testing.distributed import run_distributed
from megadual.testing.vision import tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip
from megadual.vision import quantizer
from megadual.vision.loop import Ranks
from megadual.vision.metrics import perplexity
from megadual.vision.recipe import TrainTokenizerConfig
from megadual.vision.train import TokenizerTrainer, train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    return write_tiny_pairs(folder / "pairs"), write_tiny_siglip(folder / "siglip")


@pytest.fixture
def make(inputs, tmp_path):
    """make(*overrides): a config on tiny inputs, by default without LPIPS, with a GAN from the first step."""
    shards, siglip = inputs
    given = [f"data.train={shards}", f"siglip={siglip}", f"output={tmp_path / 'run'}", "steps=6", "data.batch_size=8"]
    given += ["loss.lpips=0", "gan.channels=[8,8,8]", "gan.norm_groups=4", "data.shuffle=16", "optim.warmup_steps=2"]

    def make(*overrides):
        config = load_config(TrainTokenizerConfig, None, [*given, *overrides])
        config.model = tiny_dualtoken_config(siglip={})
        return config

    return make


def trainer_of(config) -> TokenizerTrainer:
    trainer = TokenizerTrainer(config, Ranks.join())
    trainer.open_data()
    return trainer


def gradients(trainer, module="model"):
    """Those of the first step; AdamW's update itself is left out."""
    for optimizer in (trainer.optimizer, trainer.gan_optimizer):
        optimizer.step = lambda: None
        optimizer.zero_grad = lambda: None
    metrics = trainer.step()
    return metrics, {name: p.grad for name, p in getattr(trainer, module).named_parameters() if p.grad is not None}


@pytest.mark.parametrize("module, gan", [("model", 0), ("discriminator", 0.75)])
def test_accumulated_gradients_are_those_of_one_large_batch(make, module, gan):
    """The GAN's weight adapts to each batch, so it is left out of the model's."""
    given = ["freeze=[quantizers]", f"loss.gan={gan}"]  # codebooks move with every forward
    metrics, whole = gradients(trainer_of(make(*given)), module)
    halves_metrics, halves = gradients(trainer_of(make(*given, "data.batch_size=4", "accumulate=2")), module)
    assert halves_metrics["reconstruction"] == pytest.approx(metrics["reconstruction"], rel=1e-4)
    assert whole.keys() == halves.keys() and len(whole) > 10
    for name, grad in whole.items():
        torch.testing.assert_close(halves[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpointed_activations_are_computed_twice_and_change_nothing(make):
    results = []
    for checkpointing in (False, True):
        trainer = trainer_of(make(f"gradient_checkpointing={checkpointing}"))
        runs = []
        layer = trainer.model.siglip_model.vision_model.encoder.layers[0]
        layer.layer_norm1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        results.append((*gradients(trainer), runs))
    (metrics, plain, runs), (metrics_2, recomputed, runs_2) = results
    assert (len(runs), len(runs_2)) == (1, 2)
    assert metrics["loss"] == metrics_2["loss"]
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, msg=name)


def test_bf16_searches_codes_in_fp32(make, monkeypatch):
    dtypes = set()
    search = quantizer.nearest_code

    def watched(x_MC, codebook_KC):
        dtypes.update({x_MC.dtype, codebook_KC.dtype})
        assert not torch.is_autocast_enabled("cpu")
        return search(x_MC, codebook_KC)

    monkeypatch.setattr(quantizer, "nearest_code", watched)
    trainer = trainer_of(make("precision=bf16"))
    entered = []
    trainer.model.prequant["pixel"][0].proj.register_forward_hook(
        lambda module, given, output: entered.append(output.dtype)
    )
    metrics = trainer.step()
    assert dtypes == {torch.float32} and entered == [torch.bfloat16]
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


def test_metrics_tell_usage_perplexity_and_restarts_by_depth(make):
    config = make()
    config.model.streams["pixel"].depth = 2
    trainer = trainer_of(config)
    codes = {}
    for stream in ("semantic", "pixel"):
        trainer.model.quantizers[stream].register_forward_hook(
            lambda module, given, output, stream=stream: codes.update({stream: output[1]})
        )
    metrics = trainer.step()
    assert "code_usage_pixel/1" in metrics and "code_usage_pixel/2" not in metrics
    for stream, depth in (("semantic", 0), ("semantic", 2), ("pixel", 1)):
        counts = torch.bincount(codes[stream][..., depth].flatten(), minlength=32).float()
        assert metrics[f"code_usage_{stream}/{depth}"] == pytest.approx((counts > 0).float().mean().item())
        assert metrics[f"perplexity_{stream}/{depth}"] == pytest.approx(perplexity(counts), rel=1e-4)
    assert metrics["restarted_semantic"] > 0 and metrics["images_per_s"] > 0


def _states(trainer):
    return {
        "model": dict(trainer.model.state_dict()),  # with the codebooks' statistics
        "discriminator": dict(trainer.discriminator.state_dict()),
        "optimizers": [o.state_dict()["state"] for o in (trainer.optimizer, trainer.gan_optimizer)],
        "rng": torch.get_rng_state(),
        "data": trainer.data_state,
    }


def _straight_and_resumed(config):
    """The states behind 6 steps, and behind 3, a checkpoint and 3 more."""
    straight = trainer_of(config)
    losses = [straight.step()["loss"] for _ in range(6)]
    whole = _states(straight)
    first = trainer_of(config)
    again = [first.step()["loss"] for _ in range(3)]
    first.save(Path(config.output))
    first.ranks.barrier()
    second = TokenizerTrainer(config, Ranks.join())
    second.load(Path(config.output) / "checkpoints/00000003.pt")
    second.open_data()
    again += [second.step()["loss"] for _ in range(3)]
    return losses, again, whole, _states(second)


def assert_equal(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}/{i}")
    else:
        assert a == b, path


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make, processes):
    config = make("gan.start_step=1", "data.batch_size=4")
    results = [_straight_and_resumed(config)] if processes == 1 else run_distributed(_straight_and_resumed, 2, config)
    for losses, again, whole, resumed in results:
        assert losses == again
        assert_equal(whole, resumed)
    if processes == 2:
        (_, _, rank_0, _), (_, _, rank_1, _) = results
        assert_equal(rank_0["model"], rank_1["model"])
        assert not torch.equal(rank_0["rng"], rank_1["rng"]) or rank_0["data"] != rank_1["data"]


def test_asked_to_stop_it_saves_and_exits(make, tmp_path, monkeypatch):
    config = make("steps=3", "checkpoint_every=100")
    (tmp_path / "stop").touch()
    monkeypatch.setenv("MEGADUAL_STOP", str(tmp_path / "stop"))
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == EXIT_STOPPED
    assert [path.stem for path in (Path(config.output) / "checkpoints").iterdir()] == ["00000001"]
    monkeypatch.delenv("MEGADUAL_STOP")
    train(config)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_logs_reconstructions_to_wandb(make, inputs):
    config = make(f"pictures={inputs[0]}", "wandb.mode=offline", "steps=2", "checkpoint_every=1")
    train(config)
    media = sorted(Path(config.output).glob("wandb/offline-run-*/files/media/images/reconstructions_*.png"))
    assert len(media) == 2
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "reconstruction", "commit_pixel", "gan", "discriminator", "lr", "images_per_s"} <= lines[1].keys()
    config.steps = 3  # another start: the same wandb run, each step once
    train(config)
    assert steps_in_wandb_files(Path(config.output)) == [1, 2, 3]
    assert len({path.name.rpartition("-")[2] for path in Path(config.output).glob("wandb/offline-run-*")}) == 1
