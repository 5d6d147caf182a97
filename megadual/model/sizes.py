"""How many weights each part of a resolved model has: what parameters, memory and FLOPs are counted from."""

from collections.abc import Iterable
from dataclasses import dataclass

from megadual.model.config import ModelConfig
from megadual.streams import Stream


@dataclass(frozen=True)
class Weights:
    """A part's matrices, by their shapes, and how many numbers its vectors have."""

    shapes: tuple[tuple[int, int], ...]
    vectors: int = 0

    @property
    def matrices(self) -> int:
        """Numbers in them, each a multiply-add for what goes through; vectors cost none."""
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def total(self) -> int:
        return self.matrices + self.vectors


def layer(model: ModelConfig) -> Weights:
    """One transformer layer."""
    hidden, kv = model.hidden, model.kv_heads * (model.hidden // model.heads)
    return Weights(
        shapes=(*2 * [(hidden, hidden)], *2 * [(kv, hidden)], *2 * [(model.ffn, hidden)], (hidden, model.ffn)),
        vectors=hidden + 2 * kv + 2 * hidden,  # of q, k, v; two norms
    )


def text_table(model: ModelConfig, padded_text_size: int) -> Weights:
    """The text embedding, or the output layer."""
    return Weights(((padded_text_size, model.hidden),))


def projector(model: ModelConfig, streams: Iterable[Stream]) -> Weights:
    """From the code vectors of all streams to the embedding of an image position."""
    hidden = model.hidden
    return Weights(((hidden, sum(stream.code_dim for stream in streams)), (hidden, hidden)), 2 * hidden)


@dataclass(frozen=True)
class HeadWeights:
    """One stream's head."""

    projector: Weights  # a position goes through it once
    transformer: Weights  # each depth of a position goes through it, its code's projector included
    classifiers: Weights  # of all depths, each with its embedding

    @classmethod
    def of(cls, model: ModelConfig, stream: Stream) -> "HeadWeights":
        width, layers, ffn = model.head.width, model.head.layers, model.head.ffn
        return cls(
            projector=Weights(((width, model.hidden), (width, width)), 2 * width),
            transformer=Weights(
                shapes=(
                    (width, stream.code_dim),
                    *layers * [*4 * [(width, width)], *2 * [(ffn, width)], (width, ffn)],
                ),
                vectors=width + layers * 2 * width + width,  # of the codes' projector; norms of the layers and the last
            ),
            classifiers=Weights(((stream.depth * stream.codebook_size, width),), stream.depth * width),
        )

    @property
    def total(self) -> int:
        return self.projector.total + self.transformer.total + self.classifiers.total
