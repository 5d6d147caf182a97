"""Pipeline stages cut by cost: the heads and the embedding count in units of a transformer layer."""

import dataclasses

from megadual.config import PretrainConfig
from megadual.model.dual_lm import Vocabulary
from megadual.model.flops import work
from megadual.streams import sequence_length


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What an average position of the data asks of the model; shares are per position."""

    text: float  # next position is text
    drawn: float  # next position is drawn
    image: float
    attended: float  # positions of its document, weighted by length: attention's work per position

    @classmethod
    def of(cls, sets, draw_probability: float) -> "Traffic":
        """The average over all documents of the shard sets."""
        text = images = positions = squares = total = 0.0
        for shard_set in sets:
            lengths = shard_set.lengths
            whole = sequence_length(*lengths).astype("float64")
            total, squares = total + whole.sum(), squares + (whole**2).sum()
            text, images = text + (whole - lengths.positions).sum(), images + lengths.positions.sum()
            positions += len(whole)
        text -= positions  # a document's last position predicts nothing
        return cls(text / total, draw_probability * images / total, images / total, squares / total)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Forward multiply-adds per position."""

    layer: float
    embedding: float
    heads: float


def costs(run: PretrainConfig, vocabulary: Vocabulary, traffic: Traffic) -> Costs:
    each = work(run.model, vocabulary)
    return Costs(
        layer=each.layer_position + each.attention * traffic.attended,
        embedding=each.embed_image * traffic.image,
        heads=each.text_target * traffic.text + each.drawn_target * traffic.drawn,
    )


def split_layers(layers: int, chunks: int, cost: Costs) -> list[int]:
    """Layers of each of the pipeline's chunks, first to last, so that the most expensive chunk is cheapest.

    Every chunk but the last has a layer; the last may have the heads alone.
    """
    if chunks == 1:
        return [layers]
    before, after = cost.embedding / cost.layer, cost.heads / cost.layer
    best = None
    for last in range(layers - chunks + 2):
        others, plain = layers - last, chunks - 1
        for first in range(1, others - plain + 2):
            middle = [(others - first) // (plain - 1)] * (plain - 1) if plain > 1 else []
            for i in range(others - first - sum(middle) if middle else 0):
                middle[i] += 1
            if first + sum(middle) != others:
                continue
            split = [first, *middle, last]
            worst = max([first + before, *middle, last + after])
            key = (worst, sum(layers**2 for layers in split))  # of equal ones, the most even
            if best is None or key < best[0]:
                best = (key, split)
    return best[1]
