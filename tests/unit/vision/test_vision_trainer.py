"""One step of the trainer: accumulation, checkpointed activations, bf16, metrics by depth, exact resuming."""

import copy
import json
import signal
import threading
from pathlib import Path

import pytest
import torch

from megadual.config import load_config
from megadual.errors import UserError
from megadual.run import exits
from megadual.run.checkpoints import CheckpointFolder
from megadual.run.local import STOP_SIGNALS, hold_stop_signals
from megadual.run.ranks import Ranks
from megadual.run.record import read_starts
from megadual.run.wandb_file import steps_in_wandb_files
from megadual.runs import describe
from megadual.testing.distributed import run_distributed
from megadual.testing.vision import tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip
from megadual.vision import quantizer
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
    given = [
        f"data.train={shards}",
        f"siglip={siglip}",
        f"run.dir={tmp_path / 'run'}",
        "train.steps=6",
        "data.batch_size=8",
    ]
    given += [
        "train.loss.lpips=0",
        "gan.channels=[8,8,8]",
        "gan.norm_groups=4",
        "data.shuffle=16",
        "train.warmup_steps=2",
    ]

    def make(*overrides):
        config = load_config(TrainTokenizerConfig, None, [*given, *overrides])
        config.model = tiny_dualtoken_config(siglip={})
        return config

    return make


def trainer_of(config) -> TokenizerTrainer:
    trainer = TokenizerTrainer(config, Ranks.current())
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
    given = ["train.freeze=[quantizers]", f"train.loss.gan={gan}"]  # codebooks move with every forward
    metrics, whole = gradients(trainer_of(make(*given)), module)
    halves_metrics, halves = gradients(trainer_of(make(*given, "data.batch_size=4", "train.accumulate=2")), module)
    assert halves_metrics["reconstruction"] == pytest.approx(metrics["reconstruction"], rel=1e-4)
    assert whole.keys() == halves.keys() and len(whole) > 10
    for name, grad in whole.items():
        torch.testing.assert_close(halves[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpointed_activations_are_computed_twice_and_change_nothing(make):
    results = []
    for checkpointing in (False, True):
        trainer = trainer_of(make(f"train.recompute={checkpointing}"))
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
    trainer = trainer_of(make("train.precision=bf16"))
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
    files = CheckpointFolder(config.run.dir, keep=1)
    first.save(files)
    second = TokenizerTrainer(config, Ranks.current())
    second.load(files.to_resume())
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


def steps_of(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def test_asked_to_stop_before_its_first_step_it_saves_and_goes_on_later(make):
    config = make("train.steps=3", "checkpoint.every=100")
    hold_stop_signals()
    for number in STOP_SIGNALS:
        signal.pthread_kill(threading.get_ident(), number)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stopped.value.code == exits.STOPPED
    assert CheckpointFolder(config.run.dir, keep=1).latest().name == "00000001"
    train(config)
    assert [step["step"] for step in steps_of(config)] == [1, 2, 3]
    first, second = read_starts(config.run.dir)
    assert (first["ended"], second["ended"]) == ("stopped by a signal", "finished")
    told = describe(Path(config.run.dir))
    assert told["step"] == "3 of 3" and told["last checkpoint"].endswith("00000003") and "images/s" in told


def test_a_damaged_checkpoint_is_named(make):
    config = make("train.steps=1")
    train(config)
    state = CheckpointFolder(config.run.dir, keep=1).latest() / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    config.train.steps = 2
    with pytest.raises(UserError, match=f"'{state.parent}' is damaged: state.pt"):
        train(config)


def test_a_refused_step_changes_no_weight_and_no_codebook(make):
    trainer = trainer_of(make())
    trainer.step()
    before = copy.deepcopy(_states(trainer))
    trainer.step(lambda result: False)
    for part in ("model", "discriminator", "optimizers"):
        assert_equal(before[part], _states(trainer)[part])
    trainer.step(lambda result: True)
    assert not torch.equal(before["model"]["decoder.conv_out.weight"], trainer.model.decoder.conv_out.weight)


def test_spikes_are_skipped_and_named_until_there_are_too_many(make):
    config = make("train.bad_loss=skip", "train.spike_factor=0.1", "train.spike_window=2", "train.max_skipped=2")
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == exits.BAD_LOSS and len(steps_of(config)) == 4
    bad = [json.loads(line) for line in (Path(config.run.dir) / "bad_steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in bad] == [3, 4] and bad[0]["documents"][0].startswith("pairs-0000")
    assert read_starts(config.run.dir)[0]["ended"] == "bad loss"


def _spoil(monkeypatch, at: int, after: bool) -> None:
    """Have weights be NaN from a step on, or from its end."""
    step = TokenizerTrainer.step

    def spoilt(trainer, approve=None):
        def spoil() -> None:
            if trainer.steps_done >= at:
                with torch.no_grad():
                    trainer.model.prequant["pixel"][0].proj.weight.fill_(torch.nan)

        if not after:
            spoil()
        metrics = step(trainer, approve)
        if after:
            spoil()
        return metrics

    monkeypatch.setattr(TokenizerTrainer, "step", spoilt)


@pytest.mark.parametrize("bad_loss, at, after", [("stop", 2, False), ("skip", 2, False), ("stop", 3, True)])
def test_a_run_ends_at_nan_and_keeps_what_it_had(make, monkeypatch, bad_loss, at, after):
    config = make("train.steps=3", f"train.bad_loss={bad_loss}", "train.max_skipped=1", "checkpoint.every=1")
    _spoil(monkeypatch, at, after)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == exits.BAD_LOSS and not (Path(config.run.dir) / "dualtoken").exists()
    assert CheckpointFolder(config.run.dir, keep=1).latest().name == "00000002"
    assert read_starts(config.run.dir)[0]["ended"] == "bad loss"


def test_a_run_logs_reconstructions_to_wandb(make, inputs):
    config = make(f"data.heldout={inputs[0]}", "run.wandb=offline", "train.steps=2", "checkpoint.every=1")
    train(config)
    media = sorted(Path(config.run.dir).glob("wandb/offline-run-*/files/media/images/reconstructions_*.png"))
    assert len(media) == 2
    lines = steps_of(config)
    assert {"loss", "reconstruction", "commit_pixel", "gan", "discriminator", "lr", "images_per_s"} <= lines[1].keys()
    config.train.steps = 3  # another start: the same wandb run, each step once
    train(config)
    assert steps_in_wandb_files(Path(config.run.dir)) == [1, 2, 3]
    assert len({path.name.rpartition("-")[2] for path in Path(config.run.dir).glob("wandb/offline-run-*")}) == 1
