"""What a tokenizer run is made of: its config, the modules it trains and freezes, and the plan of a dry run."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipConfig

from megadual.errors import UserError

from .config import DualTokenConfig
from .data import DataConfig, list_shards
from .loop import OptimConfig, WandbConfig
from .losses import COMMIT, LossWeights
from .presets import BACKBONES
from .siglip import load_siglip
from .tokenizer import DualToken


@dataclass
class PerceptualConfig:
    """Where LPIPS or GAN are applied; the defaults are everywhere. Less of them makes runs on a CPU affordable."""

    start_step: int = 0
    every: int = 1  # steps from one use to the next
    images: int | None = None  # of each rank's batch; None is all


@dataclass
class GanConfig(PerceptualConfig):
    channels: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    norm_groups: int = 32
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0, warmup_steps=0))


@dataclass
class TrainTokenizerConfig:
    siglip: str = "runs/demo/siglip"  # local folder or hub id: the teacher, and where the student starts
    start: str | None = None  # else the student starts from this DualToken's weights, an earlier stage's
    output: str = "runs/demo/tokenizer"
    seed: int = 0
    steps: int = 781250
    accumulate: int = 1  # forward passes per step
    precision: str = "fp32"  # or bf16: autocast; codebook search stays fp32
    gradient_checkpointing: bool = False
    freeze: list[str] = field(default_factory=list)  # dotted names of modules; NAME[:4] is a list's first four
    resume: bool = True  # go on from the newest checkpoint in `output`
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    pictures: str | None = None  # shards whose first images are reconstructed at every checkpoint
    model: DualTokenConfig = field(default_factory=DualTokenConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    lpips: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def applies(config: PerceptualConfig, weight: float, step: int) -> bool:
    return weight > 0 and step >= config.start_step and (step - config.start_step) % config.every == 0


def newest_checkpoint(folder: Path) -> Path | None:
    return max((folder / "checkpoints").glob("*.pt"), default=None)


def _patterns(config: TrainTokenizerConfig) -> dict[str, str]:
    """The shards that a run reads, by config key."""
    return {"data.train": config.data.train} | ({"pictures": config.pictures} if config.pictures else {})


def check(config: TrainTokenizerConfig) -> None:
    """Refuse what cannot work before any work starts."""
    for key, pattern in _patterns(config).items():
        try:
            list_shards(pattern)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    if config.precision not in ("fp32", "bf16"):
        raise UserError(f"precision is '{config.precision}', must be fp32 or bf16")
    if config.start:
        try:
            DualTokenConfig.load(config.start)
        except ValueError as error:
            raise UserError(f"start: {error}") from error
    if unknown := sorted(set(config.loss.commit) - set(config.model.streams)):
        raise UserError(f"loss.commit names {', '.join(unknown)}; streams are {', '.join(config.model.streams)}")
    if not config.resume and newest_checkpoint(Path(config.output)):
        raise UserError(f"'{config.output}' holds checkpoints of a run: give another output=..., or resume=true")


def frozen_modules(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules that `freeze` names; UserError for a name that the model does not have."""
    modules = []
    for name in names:
        path, first = re.fullmatch(r"(.*?)(?:\[:(\d+)\])?", name).groups()
        try:
            module = model.get_submodule(path)
            modules += module[: int(first)] if first else [module]
        except (AttributeError, TypeError) as error:
            raise UserError(f"config key 'freeze': a DualToken has no module '{name}'") from error
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
    if config.start:
        try:
            model.load_weights(config.start)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"start: '{config.start}' does not fit this run's model: {error}") from error
    for module in frozen_modules(model, config.freeze):
        module.requires_grad_(False)
    if config.gradient_checkpointing:
        model.siglip_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, siglip.vision_model


def _siglip_config(name: str) -> SiglipConfig:
    """The backbone's sizes, without its weights: those of a published one are known offline."""
    published = BACKBONES.get(Path(name).name)
    if published and not Path(name).exists():
        return SiglipConfig.from_dict(published)
    try:
        return SiglipConfig.from_pretrained(name)
    except OSError as error:
        raise UserError(f"no SigLIP in '{name}': {str(error).splitlines()[0]}") from error


def _how_many(pattern: str) -> str:
    try:
        return f"{len(list_shards(pattern))} shards"
    except UserError as error:
        return f"not there yet: {error}"


def _start(config: TrainTokenizerConfig) -> str:
    there = not config.start or (Path(config.start) / "config.json").is_file()
    return f"{config.start or config.siglip}{'' if there else ', not there yet: start=FOLDER, or start=null'}"


def _terms(model: DualTokenConfig) -> list[str]:
    """The names of the loss's terms, given what the streams feed."""
    taught = ["feature_mse", "feature_cos", "pooled_mse", "pooled_cos"] if model.feeding("teacher") else []
    drawn = ["reconstruction", "lpips", "gan"] if model.feeding("picture") else []
    return [*taught, *(f"{COMMIT}{name}" for name in model.streams), *drawn]


def plan(config: TrainTokenizerConfig, ranks: int) -> str:
    """What a run would train, on what and how long; nothing is loaded."""
    model_config = dataclasses.replace(config.model, siglip=_siglip_config(config.siglip).to_dict())
    with torch.device("meta"):
        model = DualToken(model_config)
    for module in frozen_modules(model, config.freeze):
        module.requires_grad_(False)
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or not only) / 1e6 for only in (False, True)
    )
    (rows, columns), batch = model_config.grid, config.accumulate * config.data.batch_size * ranks
    terms = [f"{config.loss.of(name):g} {name}" for name in _terms(model_config) if config.loss.of(name)]
    shards = {key: _how_many(pattern) for key, pattern in _patterns(config).items()}
    lines = {
        "steps": f"{config.steps} of {batch} images ({config.accumulate} x {config.data.batch_size} x {ranks} ranks)",
        "data": shards["data.train"],
        "pictures": shards.get("pictures", "none"),
        "images": f"{model_config.image_size} px, {rows} x {columns} positions",
        "start": _start(config),
        "trained": f"{trained:.1f} M of {total:.1f} M parameters",
        "frozen": ", ".join(["siglip_model.text_model", *config.freeze]),
        "loss": " + ".join(terms),
        "output": f"{config.output}/dualtoken",
    }
    return "\n".join(f"{name:8} {value}" for name, value in lines.items())
