"""An exported folder, opened with the installed classes; nothing of the code that it carries is run."""

import json
from pathlib import Path

import torch
from transformers.utils import logging

from megadual.errors import UserError
from megadual.hf.modeling_megadual import MegaDualForCausalLM


def open_folder(folder: str | Path, device: str | None = None) -> MegaDualForCausalLM:
    """The model, in the dtype it was saved in, on `device` or else on a GPU where there is one.

    UserError where `folder` is not an exported model, or `device` is not here.
    """
    config = Path(folder) / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != "megadual":
        raise UserError(f"'{folder}' is not an exported model; give the --output of checkpoints_tools/convert_to_hf.py")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not here: {str(error).splitlines()[0]}") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return MegaDualForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
