"""The numbers of trainings do not change unnoticed (megadual/testing/golden.py)."""

from megadual.testing import golden


def test_trainings_give_the_numbers_that_they_gave():
    worst, tolerance = golden.worst_differences(golden.record())
    assert len(worst) == 5
    wrong = {name: found for name, found in worst.items() if not found[0] <= tolerance}
    assert not wrong, f"more than {tolerance}: {wrong}"
