"""An exported folder, opened with the installed classes; nothing of the code that it carries is run."""

from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from megadual.errors import UserError, first_line
from megadual.hf.configuration_megadual import MegaDualConfig
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.hf.tensors import FolderTensors, misfits, read_json


def is_export(folder: Path) -> bool:
    """UserError where its config.json can't be read."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "megadual"


def exported_shapes(config: MegaDualConfig) -> dict[str, Tensor]:
    """The tensors that an exported folder holds, on the meta device."""
    with torch.device("meta"):
        model = MegaDualForCausalLM(config)
    shapes = model.state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def read_export(folder: Path) -> tuple[MegaDualConfig, FolderTensors]:
    """An export's config and tensors, which fit each other; UserError names the file where one is damaged or edited."""
    try:
        config = MegaDualConfig.from_pretrained(folder)
        shapes, _ = exported_shapes(config), config.special
    except Exception as error:  # of building a model of any sizes
        raise UserError(f"'{folder / 'config.json'}' describes no model: {_line(error)}") from error
    tensors = FolderTensors(folder)
    if faults := misfits(tensors.meta, shapes):
        raise UserError(f"the weights in '{folder}' are not those of its config.json: {faults}")
    return config, tensors


def open_folder(folder: str | Path, device: str | None = None) -> MegaDualForCausalLM:
    """The model, in the dtype it was saved in, on `device` or else on a GPU where there is one.

    UserError where `folder` is not an exported model, or not all of one, or `device` is not here.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise UserError(f"'{folder}' is not an exported model; give the --output of checkpoints_tools/convert_to_hf.py")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not here: {first_line(error)}") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        read_json(folder / name)
    config, _ = read_export(folder)
    try:
        model = MegaDualForCausalLM.from_pretrained(folder, dtype="auto")
        tokens = len(model.tokenizer)
    except Exception as error:  # of transformers and tokenizers
        raise UserError(f"'{folder}' can't be opened: {_line(error)}") from error
    if tokens != config.text_config.vocab_size:
        told = f"its config.json {config.text_config.vocab_size:,}"
        raise UserError(f"'{folder / 'tokenizer.json'}' has {tokens:,} tokens, {told}; export the model anew")
    return model.to(device).eval()


def _line(error: Exception) -> str:
    """Its beginning: some say what is wrong on their second line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
