"""Pipeline stages cut by cost, and the plan's numbers against a model that was built."""

import pytest

from megadual.engine.stages import Costs, split_layers


@pytest.mark.parametrize("layers, chunks, heads, expected", [
    (4, 2, 0.0, [2, 2]),
    (28, 4, 0.0, [7, 7, 7, 7]),
    (28, 4, 6.0, [9, 8, 8, 3]),  # 34 units: at most 9 in a chunk
    (28, 4, 20.0, [10, 9, 9, 0]),  # heads larger than a stage stand alone
    (4, 1, 3.0, [4]),
    (4, 4, 9.0, [2, 1, 1, 0]),
])  # fmt: skip
def test_most_expensive_chunk_is_cheapest(layers, chunks, heads, expected):
    split = split_layers(layers, chunks, Costs(layer=1.0, embedding=0.0, heads=heads))
    assert sum(split) == layers and len(split) == chunks
    assert sorted(split[:-1]) == sorted(expected[:-1]) and split[-1] == expected[-1]


def test_embedding_counts_too():
    assert split_layers(8, 2, Costs(layer=1.0, embedding=2.0, heads=0.0)) == [3, 5]
