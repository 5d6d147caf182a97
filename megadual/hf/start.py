"""A Hugging Face model as a checkpoint to start a run from: Qwen2.5 of any size, or an exported folder.

Tensors are read, converted and written one at a time.
"""

import argparse
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from megadual.engine import cpu

cpu.install()

from megadual.config import load_config  # noqa: E402
from megadual.errors import UserError, first_line  # noqa: E402
from megadual.hf.configuration_megadual import MegaDualConfig  # noqa: E402
from megadual.hf.export import DUALTOKEN, check_dualtoken, model_config, read_dualtoken  # noqa: E402
from megadual.hf.folder import exported_shapes, is_export, read_export  # noqa: E402
from megadual.hf.mapping import CODEBOOK_PLACES, Sizes, origins  # noqa: E402
from megadual.hf.tensors import FolderTensors, read_json, write_checkpoint, write_folder  # noqa: E402
from megadual.model.dual_lm import Vocabulary  # noqa: E402
from megadual.model.init import initial  # noqa: E402
from megadual.run.checkpoints import EDITABLE  # noqa: E402
from megadual.text import load_text_tokenizer, save_text_tokenizer  # noqa: E402
from megadual.train.checkpoint import seal_weights  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402

TABLES = {"model.embed_tokens.weight", "lm_head.weight"}
VISUAL = re.compile(r"projector\.|heads\.")
FILES = ["*.safetensors", "*.json"]
RUN = EDITABLE


def find_model(name: str) -> Path:
    """The local folder of a model, downloaded first if `name` is a hub id."""
    if not Path(name).is_dir():
        try:
            return Path(snapshot_download(name, allow_patterns=FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = first_line(error)
            raise UserError(f"--model '{name}' is no folder, and no model that can be downloaded: {reason}") from error
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"--model '{name}' holds no config.json")
    return Path(name)


def read_config(folder: Path) -> PretrainedConfig:
    """A Qwen2Config or a MegaDualConfig; UserError for any other model, and for what the trainer does not compute."""
    if is_export(folder):
        return read_export(folder)[0]
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "qwen2":
        raise UserError(f"--model '{folder}' is of type '{kind}'; give a Qwen2.5 language model or an exported folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of transformers' checks
        raise UserError(f"'{folder / 'config.json'}' describes no model: {first_line(error)}") from error
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise UserError(f"--model '{folder}' scales its positions ({rope['rope_type']}), which the trainer does not")
    if config.use_sliding_window:
        raise UserError(f"--model '{folder}' attends within a sliding window, which the trainer does not")
    return config


def run_config(source: PretrainedConfig, args: argparse.Namespace) -> PretrainConfig:
    """A run of the model's sizes, which `overrides` can change where the model does not decide them."""
    exported = isinstance(source, MegaDualConfig)
    text = source.text_config if exported else source
    model = {
        "preset": "7b",  # which all visual heads of the paper are like
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "ffn": text.intermediate_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "rope_base": source.rope_base if exported else text.rope_parameters["rope_theta"],
        "norm_eps": text.rms_norm_eps,
        "tie_embeddings": text.tie_word_embeddings,
        "dualtoken": args.output / "dualtoken" if exported else args.dualtoken,
        "text_tokenizer": args.output / "text_tokenizer",
    }
    if exported:
        model |= {f"head.{name}": size for name, size in source.head.items()}
        model["streams"] = [stream.name for stream in source.code_streams]
    length = text.max_position_embeddings
    rest = ["data.sets=[]", "train.steps=1", f"train.seq_len={length}", f"train.global_batch_tokens={length}"]
    rest += [f"run.dir={args.output}", f"run.name={Path(args.model).name}"]
    overrides = [f"model.{name}={value}" for name, value in model.items()]
    run = load_config(PretrainConfig, None, [*overrides, *rest, *args.overrides])
    return run


def read_tokenizer(folder: Path, other: str | None) -> tuple[PreTrainedTokenizerFast, int]:
    """The text tokenizer, and how many ids the model's own has; `other` is used where it is given.

    UserError where there is none, or where `other` gives the model's tokens other ids.
    """
    own = {}
    if (folder / "tokenizer.json").is_file():
        try:
            own = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
        except Exception as error:  # of tokenizers' reader
            reason = first_line(error)
            raise UserError(f"'{folder / 'tokenizer.json'}' is no tokenizer that can be read: {reason}") from error
    elif not other:
        raise UserError(f"--model '{folder}' has no tokenizer.json; give --text-tokenizer DIR")
    tokenizer = load_text_tokenizer(other or folder)
    vocabulary = tokenizer.get_vocab()
    if moved := [token for token, i in own.items() if vocabulary.get(token) != i]:
        raise UserError(
            f"--text-tokenizer '{other}' gives {len(moved):,} of the model's tokens another id, such as {moved[0]!r}; "
            "leave it out to use the model's own"
        )
    return tokenizer, len(own or vocabulary)


class Conversion:
    """The trainer's tensors, made one at a time from a Hugging Face folder's."""

    def __init__(
        self,
        run: PretrainConfig,
        config: MegaDualConfig,
        folder: FolderTensors,
        dualtoken: FolderTensors | None,
        kept: int,
    ):
        """`config`: the model as it would be exported; `dualtoken`: None where `folder` has its own and all visual
        parts; `kept`: text ids whose rows `folder` has.
        """
        self.run, self.folder, self.dualtoken, self.kept = run, folder, dualtoken, kept
        text_size = config.text_config.vocab_size
        padded = Vocabulary(text_size, [], {}).padded_text_size
        self.sizes = Sizes(run.model.heads, run.model.kv_heads, text_size, padded)
        self.dtype = folder.meta["model.norm.weight"].dtype
        self.shapes = exported_shapes(config)
        self.fresh = {name for name in self.shapes if dualtoken and VISUAL.match(name)}
        self._check()
        self.origins = origins(self.shapes)
        self.meta = {name: origin.merge(self._shape, self.sizes) for name, origin in self.origins.items()}

    def _check(self) -> None:
        """UserError names what the folder lacks, has in another size, or has beyond the model."""
        left_out = "lm_head.weight" if self.run.model.tie_embeddings else None  # some folders have it all the same
        found = {name: tuple(tensor.shape) for name, tensor in self.folder.meta.items() if name != left_out}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.shapes.items() if name not in self.fresh}
        if self.dualtoken:
            check_dualtoken(self.dualtoken, self.shapes)
            wanted = {name: shape for name, shape in wanted.items() if not name.startswith(DUALTOKEN)}
        for name in TABLES & found.keys() & wanted.keys():
            if found[name][0] >= self.kept:
                wanted[name] = (found[name][0], self.run.model.hidden)
        faults = [
            f"'{name}' is {found.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if faults:
            more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise UserError(f"--model '{self.folder.folder}': {'; '.join(faults[:4])}{more}")

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name.startswith(DUALTOKEN) else self.dtype

    def _shape(self, name: str) -> Tensor:
        return self.shapes[name].to(self._dtype(name))

    def _tensor(self, name: str) -> Tensor:
        if self.dualtoken and name.startswith(DUALTOKEN):
            tensor = self.dualtoken.read(name.removeprefix(DUALTOKEN))
        else:
            tensor = self.folder.read(name)
        if name in TABLES:
            kept = tensor[: self.kept]
            mean = kept.mean(0, keepdim=True, dtype=torch.float32).to(kept.dtype)
            tensor = torch.cat([kept, mean.expand(self.sizes.text_size - self.kept, -1)])
        return tensor.to(self._dtype(name))

    def read(self, name: str) -> Tensor:
        """One of the trainer's tensors, in full."""
        origin, model = self.origins[name], self.run.model
        if self.fresh.isdisjoint(origin.names):
            return origin.merge(self._tensor, self.sizes)
        shape, place = self.meta[name].shape, f"{CODEBOOK_PLACES[0]}."
        codebooks = {each.removeprefix(place): self.read(each) for each in self.origins if each.startswith(place)}
        return initial(name, shape, self.run.train.seed, model.hidden, model.layers, codebooks).to(self.dtype)


def write_own_dualtoken(folder: FolderTensors, config: MegaDualConfig, output: Path) -> None:
    """The DualToken of an exported folder as a folder of its own."""
    names = {name: name.removeprefix(DUALTOKEN) for name in folder.meta if name.startswith(DUALTOKEN)}
    output.mkdir()
    config.dualtoken_config().save(output)
    meta = {names[name]: folder.meta[name] for name in names}
    write_folder(output, meta, ((names[name], folder.read(name)) for name in names), max_shard_size=1 << 62)


def write_run(run: PretrainConfig, output: Path, path: Path, base: Path | None) -> None:
    """The YAML that a run from the checkpoint `output` starts with."""
    keys = {"base": os.path.relpath(base, output)} if base else {}
    keys |= {"model": dataclasses.asdict(run.model), "checkpoint": {"start": str(output)}}
    path.write_text(OmegaConf.to_yaml(keys))


def convert(args: argparse.Namespace) -> None:
    """Write the checkpoint; it appears only when it is whole."""
    path = find_model(args.model)
    source = read_config(path)
    exported = isinstance(source, MegaDualConfig)
    if exported == bool(args.dualtoken):
        fix = "leave --dualtoken out: an exported folder has its own" if exported else "give --dualtoken DIR"
        raise UserError(f"--model '{args.model}' is {'an exported folder' if exported else 'a language model'}; {fix}")
    tokenizer, kept = read_tokenizer(path, args.text_tokenizer)
    kept = min(kept, (source.text_config if exported else source).vocab_size)

    run, folder = run_config(source, args), FolderTensors(path)
    if "model.norm.weight" not in folder.meta:
        raise UserError(f"--model '{path}' holds no 'model.norm.weight'; is it a language model's folder?")
    dtype = folder.meta["model.norm.weight"].dtype
    run.train.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    dualtoken = source.dualtoken_config() if exported else read_dualtoken(run)
    config = model_config(run, tokenizer, dualtoken, dtype)
    conversion = Conversion(run, config, folder, None if exported else FolderTensors(Path(args.dualtoken)), kept)

    partial = args.output.with_name(f".partial-{args.output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with tqdm(total=len(conversion.meta), unit="tensor", mininterval=1 if sys.stderr.isatty() else 10) as bar:

        def read(name: str) -> Tensor:
            bar.update()
            return conversion.read(name)

        write_checkpoint(partial, conversion.meta, read)
    save_text_tokenizer(tokenizer, partial / "text_tokenizer")
    if exported:
        write_own_dualtoken(folder, source, partial / "dualtoken")
    seal_weights(partial, run)
    write_run(run, args.output, partial / RUN, args.base)
    partial.rename(args.output)
