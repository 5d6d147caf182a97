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
