"""Pipeline stages cut by cost: the heads and the embedding count in units of a transformer layer."""

import dataclasses

import numpy as np

from megadual.data.dataset import PackedDataset
from megadual.model.dual_lm import Vocabulary
from megadual.model.flops import work
from megadual.train.config import PretrainConfig

ROWS_MEASURED = 64  # of each set


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What an average position of the data asks of the model; shares are per position."""

    text: float  # next position is text
    drawn: float  # next position is drawn
    image: float
    attended: float  # positions of its document, weighted by length: attention's work per position
    fill: float = 1.0  # share of rows' positions that are not padding; the others count no padding

    @classmethod
    def of(cls, data: PackedDataset) -> "Traffic":
        """The average over the first rows of each set, by its share of the rows."""
        total = np.zeros(5)
        for index, share in enumerate(np.diff(data.rows.bounds, prepend=0, append=1)):
            counts, size = np.zeros(5), 0
            for k in range(ROWS_MEASURED):
                batch = data.row_of(index, k)
                asked = [len(at) for at in (batch.predicts_text_at, batch.predicts_codes_at, batch.image_at)]
                counts += [*asked, sum(length**2 for length in batch.lengths), batch.filled]
                size += len(batch.tokens)
            total += share * np.append(counts[:-1] / counts[-1], counts[-1] / size)
        return cls(*total.tolist())


@dataclasses.dataclass(frozen=True)
class Costs:
    """Multiply-adds per position, forward and backward."""

    layer: float
    embedding: float
    heads: float
    first: float = 1.0  # a layer of the first chunk, where backward may end, in units of `layer`


def costs(run: PretrainConfig, vocabulary: Vocabulary, traffic: Traffic) -> Costs:
    forward, parts = work(run.model, vocabulary), run.train.parts
    first, others = (forward.with_backward(parts, received) for received in (False, run.parallel.pipeline > 1))
    first_layer, layer = (each.layer_position + each.attention * traffic.attended for each in (first, others))
    return Costs(
        layer=layer,
        embedding=first.embed_image * traffic.image,
        heads=others.text_target * traffic.text + others.drawn_target * traffic.drawn,
        first=first_layer / layer,
    )


def split_layers(layers: int, chunks: int, cost: Costs) -> list[int]:
    """Layers of each of the pipeline's chunks, first to last, so that the most expensive chunk is cheapest.

    Every chunk but the last has a layer; the last may have the heads alone.
    """
    if chunks == 1:
        return [layers]
    before, after = cost.embedding / cost.layer, cost.heads / cost.layer

    def dearest_then_least_even(split: list[int]) -> tuple[float, int]:
        first, *middle, last = split
        return max(first * cost.first + before, *middle, last + after), sum(layers**2 for layers in split)

    splits = [
        [first, *_evenly(layers - first - last, chunks - 2), last]
        for last in range(layers - chunks + 2)
        for first in ([layers - last] if chunks == 2 else range(1, layers - last - chunks + 3))
    ]
    return min(splits, key=dearest_then_least_even)


def _evenly(layers: int, chunks: int) -> list[int]:
    return [layers // chunks + (i < layers % chunks) for i in range(chunks)]
