"""Model FLOPs of a step, forward and backward: what MFU is counted in.

A multiply-add counts two. Backward counts once more what activations' gradients flow through, and once more what has
weights that are trained. Causal attention counts half; padding, recomputation and heads at positions without a target
count nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from megadual.model import sizes
from megadual.model.config import ModelConfig
from megadual.model.dual_lm import Vocabulary
from megadual.model.freezing import PARTS
from megadual.streams import Stream

# Dense bf16 peak of one GPU in FLOP/s, by a part of its name.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


@dataclass(frozen=True)
class Work:
    """Multiply-adds by what they are done for."""

    layer_position: float  # one layer, one position, without attention
    attention: float  # one layer, per squared document length
    embed_image: float  # the projector, per image position
    text_target: float  # the output layer, per position whose next one is text
    drawn_target: float  # all visual heads, per position whose next one is drawn

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

    def one_head(stream: Stream) -> int:
        head = sizes.HeadWeights.of(model, stream)
        attention = model.head.layers * stream.depth * model.head.width
        each_depth = stream.depth * (head.transformer.matrices + attention)
        return head.projector.matrices + each_depth + head.classifiers.matrices

    return Work(
        layer_position=sizes.layer(model).matrices,
        attention=model.hidden,  # two products of length x length x hidden, half of each masked
        embed_image=sizes.projector(model, vocabulary.streams).matrices,
        text_target=sizes.text_table(model, vocabulary.padded_text_size).matrices,
        drawn_target=sum(map(one_head, vocabulary.streams)),
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
