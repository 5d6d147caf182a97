"""Model FLOPs of a step, forward and backward: what MFU is counted in.

A multiply-add counts two. Backward counts once more what activations' gradients flow through, and once more what has
weights that are trained. Causal attention counts half; padding, recomputation and heads at positions without a target
count nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from megadual.model.config import ModelConfig
from megadual.model.dual_lm import Vocabulary
from megadual.model.freezing import PARTS

# Dense bf16 peak of one GPU in FLOP/s, by a part of its name.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


@dataclass(frozen=True)
class Work:
    """Multiply-adds by what they are done for."""

    layer_position: float  # one layer, one position, without attention
    attention: float  # one layer, per squared document length
    embed_image: float  # the projector, per image position
    text_target: float  # the output layer, per position whose next one is text
    drawn_target: float  # both visual heads, per position whose next one is drawn

    def with_backward(self, parts: Collection[str], received: bool = False) -> "Work":
        """Of forward work, that of a step that trains `parts`.

        Backward ends where nothing before is trained, but goes through all of a pipeline's chunk whose hidden states
        are `received` from another.
        """
        through = received or "projector" in parts or "llm" in parts
        linear = 1 + through + ("llm" in parts)
        return Work(
            layer_position=linear * self.layer_position,
            attention=(1 + 2 * through) * self.attention,  # both factors of its products are activations
            embed_image=(1 + 2 * ("projector" in parts)) * self.embed_image,
            text_target=linear * self.text_target,
            drawn_target=(2 + ("heads" in parts)) * self.drawn_target,  # behind or in whatever is trained
        )


def work(model: ModelConfig, vocabulary: Vocabulary) -> Work:
    """The forward multiply-adds of a resolved model."""
    hidden, head = model.hidden, model.head
    kv = model.kv_heads * (hidden // model.heads)
    codebook_size, code_dim = vocabulary.codebooks["pixel"].shape
    depth = vocabulary.depth
    depth_layer = 4 * head.width**2 + 3 * head.width * head.ffn + depth * head.width  # with its attention
    one_head = hidden * head.width + head.width**2
    one_head += depth * (code_dim * head.width + head.layers * depth_layer + codebook_size * head.width)
    return Work(
        layer_position=hidden * (2 * hidden + 2 * kv) + 3 * hidden * model.ffn,
        attention=hidden,  # two products of length x length x hidden, half of each masked
        embed_image=2 * code_dim * hidden + hidden**2,
        text_target=hidden * vocabulary.padded_text_size,
        drawn_target=2 * one_head,
    )


def step_flops(
    model: ModelConfig,
    vocabulary: Vocabulary,
    positions: float,
    squares: float,
    images: float,
    text: float,
    drawn: float,
    parts: Collection[str] = tuple(PARTS),
) -> float:
    """FLOPs of a global batch with so many positions, squared document lengths, image positions and targets."""
    each = work(model, vocabulary).with_backward(parts)
    multiply_adds = (
        model.layers * (each.layer_position * positions + each.attention * squares)
        + each.embed_image * images
        + each.text_target * text
        + each.drawn_target * drawn
    )
    return 2 * multiply_adds


def peak_flops() -> float | None:
    """This GPU's dense bf16 peak in FLOP/s; None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)
