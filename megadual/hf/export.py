"""A pretraining checkpoint as a Hugging Face folder: model, text tokenizer and DualToken, with the code to run them.

The checkpoint may have been written by either engine under any layout. It is read in one process, without a GPU, one
tensor at a time: the largest tensor decides the memory that is needed, not the model's size.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from megadual.engine import cpu

cpu.install()

from megadual.errors import UserError  # noqa: E402
from megadual.hf.carried_code import AUTO_MAP, code_files, write_code  # noqa: E402
from megadual.hf.configuration_megadual import MegaDualConfig  # noqa: E402
from megadual.hf.folder import exported_shapes, is_export  # noqa: E402
from megadual.hf.mapping import Sizes, codebook_of, to_hf  # noqa: E402
from megadual.hf.model_card import model_card  # noqa: E402
from megadual.hf.processing_megadual import MegaDualProcessor  # noqa: E402
from megadual.hf.tensors import INDEX, CheckpointTensors, FolderTensors, misfits, write_folder  # noqa: E402
from megadual.streams import IM_END, SpecialIds  # noqa: E402
from megadual.text import load_text_tokenizer, save_text_tokenizer  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402
from megadual.train.setup import choose_streams  # noqa: E402
from megadual.vision import DualTokenConfig, read_codebooks  # noqa: E402

DUALTOKEN = "dualtoken."
WRITTEN = {
    INDEX, "README.md", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
}  # fmt: skip
SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def read_dualtoken(run: PretrainConfig) -> DualTokenConfig:
    """The config of the run's DualToken; UserError where it can't be read."""
    try:
        return DualTokenConfig.load(run.model.dualtoken)
    except ValueError as error:
        raise UserError(f"model.dualtoken: {error}") from error


def model_sizes(run: PretrainConfig, meta: dict[str, Tensor], text_size: int) -> Sizes:
    """What the mapping table needs to know of a run."""
    return Sizes(run.model.heads, run.model.kv_heads, text_size, len(meta["embedding.word_embeddings.weight"]))


def model_config(run: PretrainConfig, tokenizer, dualtoken: DualTokenConfig, dtype: torch.dtype) -> MegaDualConfig:
    """The exported model's config from the run's."""
    model, special = run.model, SpecialIds.of(tokenizer)
    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=run.train.seq_len,
        tie_word_embeddings=model.tie_embeddings,
    )
    return MegaDualConfig(
        text_config=text_config,
        rope_base=model.rope_base,
        head=vars(model.head),
        streams=[stream.name for stream in choose_streams(dualtoken.code_streams, model.streams)],
        dualtoken=dualtoken.to_dict(),
        special_ids=vars(special),
        architectures=["MegaDualForCausalLM"],
        auto_map=AUTO_MAP,
        dtype=str(dtype).removeprefix("torch."),
    )


def check_dualtoken(dualtoken: FolderTensors, shapes: dict[str, Tensor]) -> None:
    """UserError where a DualToken's tensors are not those among the `shapes` of an exported model."""
    own = {name.removeprefix(DUALTOKEN): tensor for name, tensor in shapes.items() if name.startswith(DUALTOKEN)}
    if faults := misfits(dualtoken.meta, own):
        raise UserError(f"the weights of the DualToken in '{dualtoken.folder}' are not those of its config: {faults}")


class Exported:
    """The tensors of an export by Hugging Face's names: the checkpoint's through the table, and its DualToken's."""

    def __init__(self, run: PretrainConfig, trainer: CheckpointTensors, text_size: int):
        self.trainer, self.dualtoken = trainer, FolderTensors(Path(run.model.dualtoken))
        self.meta: dict[str, Tensor] = {}
        try:
            self.sizes = model_sizes(run, trainer.meta, text_size)
            for name, tensor in trainer.meta.items():
                self.meta |= to_hf(name, tensor, self.sizes)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint '{trainer.folder}' is not of the model in its config.yaml: {error}") from error
        self.meta |= {DUALTOKEN + name: tensor for name, tensor in self.dualtoken.meta.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.trainer.meta:
            if not codebook_of(name):
                yield from to_hf(name, self.trainer.read(name), self.sizes).items()
        for name in self.dualtoken.meta:
            yield DUALTOKEN + name, self.dualtoken.read(name)

    def check(self, config: MegaDualConfig) -> None:
        """UserError if it is not of the model that `config` describes, or was trained on another DualToken's codes."""
        shapes = exported_shapes(config)
        check_dualtoken(self.dualtoken, shapes)
        if faults := misfits(self.meta, shapes):
            raise UserError(f"checkpoint '{self.trainer.folder}' is not of the model in its config.yaml: {faults}")
        self.check_codebooks()

    def check_codebooks(self) -> None:
        """UserError if the model was trained on other codes than its DualToken's."""
        for left in self.trainer.meta:
            right = codebook_of(left)
            if right is None:
                continue
            codebook = self.dualtoken.read(right.removeprefix(DUALTOKEN))[:-1].float()
            if not torch.equal(self.trainer.read(left), codebook):
                folder = self.dualtoken.folder
                raise UserError(f"the checkpoint's {left} are not the code vectors of the DualToken in '{folder}'")


def write_settings(folder: Path, run: PretrainConfig, tokenizer, config: MegaDualConfig) -> None:
    """Write what an export holds beside weights and model card: config, code, tokenizer, how it generates."""
    config.save_pretrained(folder)
    write_code(folder)
    special = config.special
    ends = [special.end_of_text, special.im_end]
    generation = GenerationConfig(
        eos_token_id=ends,
        pad_token_id=special.end_of_text,
        suppress_tokens=sorted(set(vars(special).values()) - set(ends)),  # images are drawn, not spelled
    )
    generation.save_pretrained(folder)
    dualtoken = config.dualtoken_config()
    rows, columns = dualtoken.grid
    processor = MegaDualProcessor(
        tokenizer,
        image_size=dualtoken.image_size,
        image_positions=rows * columns,
        dualtoken=read_codebooks(run.model.dualtoken).fingerprint,
        streams=config.streams,
    )
    tokenizer.chat_template = processor.chat_template  # in the place of one that the tokenizer came with
    tokenizer.eos_token = IM_END  # which is where programs that ask no generation config end an answer
    save_text_tokenizer(tokenizer, folder)
    described = processor.to_dict() | {"processor_class": "MegaDualProcessor", "auto_map": AUTO_MAP}
    (folder / "processor_config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def export(run: PretrainConfig, checkpoint: Path, output: Path, max_shard_size: str) -> None:
    """Write the folder `output`, in the place of an earlier export; it appears only when it is whole."""
    tokenizer, dualtoken = load_text_tokenizer(run.model.text_tokenizer), read_dualtoken(run)
    exported = Exported(run, CheckpointTensors(checkpoint), len(tokenizer))
    config = model_config(run, tokenizer, dualtoken, exported.meta["model.norm.weight"].dtype)
    exported.check(config)
    meta = {name: exported.meta[name] for name in exported_shapes(config)}  # in the model's order, whatever the layout
    card = model_card(run, checkpoint, meta)

    partial, replaced = (output.with_name(f".{state}-{output.name}") for state in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    interval = 1 if sys.stderr.isatty() else 10
    with tqdm(exported.tensors(), total=len(meta), unit="tensor", mininterval=interval) as bar:
        write_folder(partial, meta, bar, max_shard_size)
    write_settings(partial, run, tokenizer, config)
    (partial / "README.md").write_text(card)
    check_output(output)  # which has been there for a while
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def check_output(output: Path) -> None:
    """UserError where `output` is anything but an export, or holds files that no export wrote."""
    if not output.exists():
        return
    if not output.is_dir() or not is_export(output):
        raise UserError(f"--output '{output}' exists and is not an exported model; give a new folder")
    known = WRITTEN | code_files()
    others = {path.name for path in output.iterdir() if path.name not in known and not SHARD.fullmatch(path.name)}
    if others:
        raise UserError(
            f"--output '{output}' holds what no export wrote: {', '.join(sorted(others))}; move it, or give another"
        )
