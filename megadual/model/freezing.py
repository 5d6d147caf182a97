"""The parts of the model that a training stage trains (paper, training stages)."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the configuration is checked before torch is loaded
    import torch

PARTS = {
    "projector": r"embedding\.projector\.",
    "llm": r"embedding\.word_embeddings\.|decoder\.|output_layer\.",
    "heads": r"heads\.",
}


def train_only(chunk: "torch.nn.Module", parts: list[str]) -> None:
    """Freeze the parameters that are in none of `parts`."""
    pattern = re.compile("|".join(PARTS[part] for part in parts))
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(pattern.match(name) is not None)
