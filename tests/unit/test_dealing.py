"""Rows are dealt once each, equally many to a rank, and evenly by cost."""

import random

from megadual.data.dealing import deal


def test_all_rows_evenly():
    costs = [random.Random(0).choice((0, 729, 1458, 2916)) for _ in range(64)]
    dealt = deal(costs, 8)
    assert sorted(row for rows in dealt for row in rows) == list(range(64))
    assert all(len(rows) == 8 and rows == sorted(rows) for rows in dealt)
    totals = [sum(costs[row] for row in rows) for rows in dealt]
    assert max(totals) - min(totals) <= 2916


def test_one_rank_keeps_the_order():
    assert deal([3.0, 9.0, 1.0], 1) == [[0, 1, 2]]


def test_to_who_has_the_least_so_far():
    """Of several the first; who has as many rows as the others takes no more."""
    assert deal([5.0, 4.0, 3.0, 3.0, 2.0, 1.0], 3) == [[0, 5], [1, 4], [2, 3]]
    assert deal([9.0, 1.0, 1.0, 1.0], 2) == [[0, 3], [1, 2]]
