"""Run configurations: dataclasses, filled strictly from YAML and dotted `key=value` overrides."""

import argparse
import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megadual.errors import UserError


def _section(type_: Any) -> type | None:
    """The dataclass of a section, or of each entry of a mapping of sections (`dict[str, Section]`)."""
    of = typing.get_args(type_)[1:] if typing.get_origin(type_) is dict else (type_,)
    return next((each for each in of if dataclasses.is_dataclass(each)), None)


def _leaves(schema: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(schema):
        named = "NAME." if typing.get_origin(field.type) is dict else ""
        if section := _section(field.type):
            names += _leaves(section, f"{prefix}{field.name}.{named}")
        else:
            names.append(f"{prefix}{field.name}{named and '.NAME'}")
    return names


def _check_keys(given: Any, schema: type, place: str, prefix: str = "") -> None:
    """Refuse keys that `schema` does not have, naming the nearest one that it has."""
    if not isinstance(given, (dict, DictConfig)):
        raise UserError(f"{place}: '{prefix.rstrip('.')}' is a section and needs keys, got {given!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in fields:
            known = [prefix + field for field in fields] + _leaves(schema, prefix)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(_leaves(schema, prefix))}"
            raise UserError(f"{place}: unknown config key '{name}'; {hint}")
        section = _section(fields[key].type)
        if section and typing.get_origin(fields[key].type) is dict:
            for entry, keys in (value or {}).items():
                _check_keys(keys, section, place, f"{name}.{entry}.")
        elif section:
            _check_keys(value, section, place, f"{name}.")


def load_config(schema: type, path: str | Path | list[str] | None = None, overrides: list[str] = ()):
    """Build a `schema` dataclass from its defaults, then the YAML at `path` (or several, in order), then `overrides`.

    A YAML file may name another one to start from, relative to itself, under `base`.
    Unknown keys and values of the wrong type raise UserError.
    """
    merged = OmegaConf.structured(schema)
    paths = [path] if isinstance(path, (str, Path)) else path or []
    layers = [layer for path in paths for layer in _read_yaml_chain(Path(path))]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override '{override}' is not of the form key=value")
        try:
            layers.append(("command line", OmegaConf.from_dotlist([override])))
        except Exception as error:
            raise UserError(f"override '{override}' can't be read: {error}") from error
    for place, layer in layers:
        _check_keys(layer, schema, place)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(f"{place}: {str(error).splitlines()[0]} ({getattr(error, 'full_key', '')})") from error
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "")
        raise UserError(f"config key '{key}' has no value; give it in the YAML or as {key}=...") from error


def _read_yaml_chain(path: Path) -> list[tuple[str, DictConfig]]:
    if not path.is_file():
        raise UserError(f"config file '{path}' does not exist")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"config file '{path}' is not valid YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise UserError(f"config file '{path}' must hold a mapping of keys, not a list")
    base = layer.pop("base", None)
    return (_read_yaml_chain(path.parent / base) if base else []) + [(str(path), layer)]


def to_yaml(config) -> str:
    """The resolved config as YAML, as `--dry-run` prints it and a run's folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_command_line(schema: type, description: str, argv: list[str] | None = None):
    """The command line every entry point shares. Returns (config, args)."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys that can be overridden: " + ", ".join(_leaves(schema)),
    )
    parser.add_argument("--config", action="append", help="YAML file with this run's keys; a later one adds to it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and plan, then stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override config keys, dotted")
    args = parser.parse_intermixed_args(argv)
    return load_config(schema, args.config, args.overrides), args


@dataclasses.dataclass
class HeadConfig:
    """Each stream's visual head (DepthHead)."""

    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    ffn: int | None = None


@dataclasses.dataclass
class ModelConfig:
    """A Qwen2.5-shaped decoder with a visual projector and a visual head for each stream.

    `preset` fills every field that is left null (megadual/model/presets.py).
    """

    preset: str = "tiny"
    layers: int | None = None
    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    rope_base: float | None = None
    norm_eps: float | None = None
    tie_embeddings: bool | None = None
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    dualtoken: str = MISSING  # folder of the DualToken whose codes the model reads and writes
    streams: list[str] | None = None  # those of its streams that the model has; null: all
    text_tokenizer: str = MISSING  # Hugging Face folder or id


@dataclasses.dataclass
class DataConfig:
    sets: list[str] = MISSING  # shard sets made by data_pipeline/tokenize.py
    weights: list[float] | None = None  # share of each set in the rows; null: by their positions
    draw_probability: float = 0.5  # share of images that are to be drawn; the others are looked at
    caption_dropout: float = 0.1  # share of drawn pairs whose caption is left out, for classifier-free guidance


@dataclasses.dataclass
class ParallelConfig:
    """Sizes of the parallel groups; what is left of the world is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline stage
    stage_layers: list[int] | None = None  # layers of each chunk, first to last; null: cut by cost
    context: int = 1  # ranks that share each sequence, its attention and activations (megatron)
    sequence: bool = False  # sequence parallelism over the tensor-parallel group
    gpu_memory_gib: float = 80.0  # of one GPU, for the plan's warning
    zero_stage: int = 1  # what data-parallel ranks split: 1 optimizer state, 2 gradients too, 3 weights too (deepspeed)


@dataclasses.dataclass
class TrainConfig:
    steps: int = MISSING
    global_batch_tokens: int = MISSING  # positions per optimizer step, padding included
    micro_batch_size: int = 1  # packed rows of seq_len positions per forward pass
    seq_len: int = MISSING
    seed: int = 0
    precision: str = "fp32"  # fp32 or bf16
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    parts: list[str] = dataclasses.field(default_factory=lambda: ["projector", "llm", "heads"])  # what is trained
    recompute: bool = False  # full activation recompute, layer by layer
    loss: dict[str, float] = dataclasses.field(default_factory=dict)  # weights of mean losses (text, a stream); else 1
    spike_factor: float | None = None  # a loss over this many times the median of the steps before is bad
    spike_window: int = 64  # steps of that median
    bad_loss: str = "stop"  # at a loss that is bad or not finite: stop, or skip the step's update (megatron)
    max_skipped: int = 8  # stop after this many skipped steps in a row


@dataclasses.dataclass
class RunFolderConfig:
    dir: str = MISSING
    name: str = "pretrain"
    wandb: str = "disabled"  # online, offline or disabled
    wandb_project: str = "megadual"
    device: str | None = None  # cuda: every rank must have its GPU; cpu: none is used; null: what there is
    hang_timeout: float | None = 1200.0  # seconds without progress after which a rank shows its stacks and exits
    samples: list[str] = dataclasses.field(default_factory=list)  # prompts that are drawn from checkpoints
    samples_every: int | None = None  # steps between drawings; a multiple of checkpoint.every


@dataclasses.dataclass
class CheckpointConfig:
    every: int | None = 1000  # steps between checkpoints; the last step is saved too; null: none but at a signal
    keep: int = 2  # newest checkpoints kept
    resume: bool = True  # go on from run.dir's latest checkpoint, where there is one
    start: str | None = None  # else take the weights of this checkpoint, run or conversion; the optimizer starts anew
    background: bool = True  # write while training goes on


@dataclasses.dataclass
class PretrainConfig:
    """What `pretrain/pretrain.py` takes."""

    engine: str = "megatron"  # or deepspeed
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    run: RunFolderConfig = dataclasses.field(default_factory=RunFolderConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
