"""What a tokenizer run is made of: its config, the modules it trains and freezes, and the plan of a dry run."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipConfig

from megadual.errors import UserError, first_line
from megadual.keys import key
from megadual.run.checkpoints import CheckpointFolder
from megadual.run.config import CheckpointConfig, OptimConfig, RunConfig, TrainConfig

from .config import DualTokenConfig, read_siglip_config, siglip_config
from .data import DataConfig, list_shards
from .losses import COMMIT, LossWeights
from .presets import BACKBONES
from .siglip import load_siglip
from .tokenizer import DualToken


@dataclass
class PerceptualConfig:
    """Where LPIPS or GAN are applied; the defaults are everywhere. Less of them makes runs on a CPU affordable."""

    start_step: int = key(0, "first step of its use", least=0)
    every: int = key(1, "steps from one use to the next", least=1)
    images: int | None = key(None, "of each rank's batch; null: all", least=1)


@dataclass
class GanConfig(PerceptualConfig, OptimConfig):
    """The discriminator and its optimizer, whose schedule begins at start_step."""

    channels: list[int] = key([64, 128, 256, 512], "of the discriminator's levels, finest first", least=1)
    norm_groups: int = key(32, "groups of its norms", least=1)


@dataclass
class TokenizerTrainConfig(TrainConfig):
    accumulate: int = key(1, "batches per step and rank", least=1)
    recompute: bool = key(False, "compute SigLIP's activations again in the backward pass, layer by layer")
    freeze: list[str] = key([], "dotted names of modules that are not trained; NAME[:4] is a list's first four")
    loss: LossWeights = field(default_factory=LossWeights)


@dataclass
class TokenizerCheckpointConfig(CheckpointConfig):
    start: str | None = key(
        None, "else the student starts from this DualToken's weights, an earlier stage's; null: from SigLIP's"
    )


@dataclass
class TrainTokenizerConfig:
    siglip: str = key("runs/demo/siglip", "local folder or hub id: the teacher, and where the student starts")
    model: DualTokenConfig = field(default_factory=DualTokenConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TokenizerTrainConfig = field(
        default_factory=lambda: TokenizerTrainConfig(
            lr=7.2e-5, beta1=0.5, beta2=0.9, weight_decay=1e-4, warmup_steps=10000, clip_grad=0.0, steps=781250
        )
    )
    lpips: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: GanConfig = field(default_factory=lambda: GanConfig(lr=7.2e-5, beta1=0.5, beta2=0.9, weight_decay=0.0))
    run: RunConfig = field(default_factory=lambda: RunConfig("runs/demo/tokenizer", name="tokenizer"))
    checkpoint: TokenizerCheckpointConfig = field(default_factory=lambda: TokenizerCheckpointConfig(every=5000))

    def resolve(self) -> None:
        self.run.check(self.train.steps)
        self.train.check("train", self.train.steps)
        self.gan.check("gan", self.train.steps - self.gan.start_step)


def applies(config: PerceptualConfig, weight: float, step: int) -> bool:
    return weight > 0 and step >= config.start_step and (step - config.start_step) % config.every == 0


def check(config: TrainTokenizerConfig) -> None:
    """Refuse what cannot work before any work starts."""
    config.data.check()
    commit, streams = config.train.loss.commit, config.model.streams
    if not streams:
        raise UserError("model.streams={} names no stream of codes; pretrain/configs/tokenizer_*.yaml have some")
    if unknown := sorted(set(commit) - set(streams)):
        raise UserError(f"train.loss.commit names {', '.join(unknown)}; the streams are {', '.join(streams)}")
    start, run = config.checkpoint.start, config.run.dir
    if start:
        try:
            DualTokenConfig.load(start)
        except ValueError as error:
            raise UserError(f"checkpoint.start: {error}") from error
    if not config.checkpoint.resume and CheckpointFolder(run, config.checkpoint.keep).latest():
        raise UserError(f"'{run}' holds checkpoints of a run: give another run.dir, or checkpoint.resume=true")


def frozen_modules(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules that `freeze` names; UserError for a name that the model does not have."""
    modules = []
    for name in names:
        path, first = re.fullmatch(r"(.*?)(?:\[:(\d+)\])?", name).groups()
        try:
            module = model.get_submodule(path)
            modules += module[: int(first)] if first else [module]
        except (AttributeError, TypeError) as error:
            raise UserError(f"config key 'train.freeze': a DualToken has no module '{name}'") from error
    return modules


def build(config: TrainTokenizerConfig) -> tuple[DualToken, nn.Module]:
    """The student, which starts as the teacher, and the frozen teacher's vision model."""
    siglip = load_siglip(config.siglip)
    config.model.siglip = siglip.config.to_dict()
    try:
        model = DualToken(config.model, siglip_model=load_siglip(config.siglip))
    except ValueError as error:
        raise UserError(f"config section 'model': {error}") from error
    if model.decoder is not None and config.model.output_size != config.model.image_size:
        raise UserError(
            f"config section 'model': decoder_latent({config.model.decoder_latent}) * 2^(decoder_multipliers("
            f"{len(config.model.decoder_multipliers)}) - 1) = {config.model.output_size} px, but SigLIP reads "
            f"{config.model.image_size} px"
        )
    if start := config.checkpoint.start:
        try:
            model.load_weights(start)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint.start: '{start}' does not fit this run's model: {error}") from error
    for module in frozen_modules(model, config.train.freeze):
        module.requires_grad_(False)
    if config.train.recompute:
        model.siglip_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, siglip.vision_model


def _siglip_config(name: str) -> SiglipConfig:
    """The backbone's sizes, without its weights: those of a published one are known offline."""
    published = BACKBONES.get(Path(name).name)
    if published and not Path(name).exists():
        return siglip_config(published)
    try:
        return read_siglip_config(name)
    except OSError as error:
        raise UserError(f"no SigLIP in '{name}': {first_line(error)}") from error


def _how_many(pattern: str) -> str:
    try:
        return f"{len(list_shards(pattern))} shards"
    except UserError as error:
        return f"not there yet: {error}"


def _start(config: TrainTokenizerConfig) -> str:
    start = config.checkpoint.start
    there = not start or (Path(start) / "config.json").is_file()
    return f"{start or config.siglip}{'' if there else ', not there yet: checkpoint.start=FOLDER, or null'}"


def _terms(model: DualTokenConfig) -> list[str]:
    """The names of the loss's terms, given what the streams feed."""
    taught = ["feature_mse", "feature_cos", "pooled_mse", "pooled_cos"] if model.feeding("teacher") else []
    drawn = ["reconstruction", "lpips", "gan"] if model.feeding("picture") else []
    return [*taught, *(f"{COMMIT}{name}" for name in model.streams), *drawn]


def plan(config: TrainTokenizerConfig, ranks: int) -> str:
    """What a run would train, on what and how long; nothing is loaded."""
    model_config = dataclasses.replace(config.model, siglip=_siglip_config(config.siglip).to_dict())
    try:
        with torch.device("meta"):
            model = DualToken(model_config)
    except ValueError as error:
        raise UserError(f"config section 'model': {error}") from error
    for module in frozen_modules(model, config.train.freeze):
        module.requires_grad_(False)
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or not only) / 1e6 for only in (False, True)
    )
    train, size = config.train, config.data.batch_size
    (rows, columns), batch = model_config.grid, train.accumulate * size * ranks
    terms = [f"{train.loss.of(name):g} {name}" for name in _terms(model_config) if train.loss.of(name)]
    lines = {
        "steps": f"{train.steps} of {batch} images ({train.accumulate} x {size} x {ranks} ranks)",
        "data": _how_many(config.data.train),
        "held out": _how_many(config.data.heldout) if config.data.heldout else "none",
        "images": f"{model_config.image_size} px, {rows} x {columns} positions",
        "start": _start(config),
        "trained": f"{trained:.1f} M of {total:.1f} M parameters",
        "frozen": ", ".join(["siglip_model.text_model", *train.freeze]),
        "loss": " + ".join(terms),
        "output": f"{config.run.dir}/dualtoken",
    }
    return "\n".join(f"{name:8} {value}" for name, value in lines.items())
