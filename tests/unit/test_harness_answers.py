"""What harnesses share of an exported model's answers, as far as it needs no model; the rest: tests/harnesses."""

import pytest
import torch
from megadual_harnesses.answers import Sampling, _drawing, _last_run, interleaved

from megadual.testing.benchmarks import ROTATION, mmbench_rows, mmbench_score, mme_rows, mme_scores, pope_rows, scenes


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def test_images_stand_where_the_text_names_them():
    first, second = ({"type": "image", "image": name} for name in "ab")
    (placed,) = interleaved([{"role": "user", "content": [first, second, text("<image>: one, <image> two")]}])
    assert placed == {"role": "user", "content": [first, text(": one, "), second, text(" two")]}


@pytest.mark.parametrize("said", ["no mark", "<image> <image> for one image"])
def test_images_stay_where_they_are_if_marks_do_not_fit(said):
    messages = [{"role": "user", "content": [{"type": "image", "image": "a"}, text(said)]}]
    assert interleaved(messages) == messages
    assert interleaved([{"role": "system", "content": "<image>"}]) == [{"role": "system", "content": "<image>"}]


def test_a_row_is_drawn_alike_whatever_stands_beside_it():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.7, top_p=0.9)
    together, seeds = _drawing(sampling, list(range(6))), [3, 1]
    apart = _drawing(sampling, seeds)
    for _ in range(20):
        chosen = together(None, logits).argmax(-1)
        assert torch.equal(apart(None, logits[seeds]).argmax(-1), chosen[seeds])


def test_draws_have_the_probabilities_asked_for():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20_000, 4)
    for top_p, expected in ((1.0, [0.0900, 0.2447, 0.0, 0.6652]), (0.9, [0.0, 0.2689, 0.0, 0.7311])):
        draw = _drawing(Sampling(temperature=1.0, top_p=top_p), list(range(20_000)))
        found = torch.bincount(draw(None, logits).argmax(-1), minlength=4) / 20_000
        assert found.tolist() == pytest.approx(expected, abs=0.01)


def test_only_the_last_answer_counts():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
    assert _last_run(mask).int().tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]]


def test_right_answers_have_the_highest_scores():
    shown = scenes(12, seed=0)
    mme, mmbench = mme_rows(shown, 16), mmbench_rows(shown, 16)
    answers = [row["answer"] for row in mme]
    of = {"mme_perception_score": 200.0 * len({r["category"] for r in mme} - {"numerical_calculation"})}
    assert mme_scores(mme, answers) == of | {"mme_cognition_score": 200.0}
    assert mme_scores(mme, ["yes"] * len(mme)) == {name: score / 4 for name, score in of.items()} | {
        "mme_cognition_score": 50.0
    }
    assert mmbench_score(mmbench, [row["answer"] for row in mmbench]) == 100
    alone = {row["index"] for row in mmbench if row["index"] < ROTATION}
    turned = {row["index"] - ROTATION for row in mmbench if row["index"] >= ROTATION}
    assert turned and turned < alone  # whoever always says the same letter is wrong in one of two rotations
    assert mmbench_score(mmbench, ["A"] * len(mmbench)) <= 100 * len(alone - turned) / len(alone)
    assert len({row["question_id"] for row in pope_rows(shown, 16)}) == 24
