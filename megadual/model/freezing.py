"""The parts of the model that a training stage trains (paper, training stages)."""

import re
from typing import TYPE_CHECKING

from megadual.errors import UserError

if TYPE_CHECKING:  # the configuration is checked before torch is loaded
    import torch

PARTS = {
    "projector": r"embedding\.projector\.",
    "llm": r"embedding\.word_embeddings\.|decoder\.|output_layer\.",
    "heads": r"heads\.",
}


def check_parts(parts: list[str]) -> None:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(f"train.parts={parts} must name at least one of: {', '.join(PARTS)}")


def train_only(chunk: "torch.nn.Module", parts: list[str]) -> None:
    """Freeze the parameters that are in none of `parts`."""
    pattern = re.compile("|".join(PARTS[part] for part in parts))
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(pattern.match(name) is not None)
