"""Scores of checkpoints beside a training: when it begins, what it runs, where the figures go."""

import json
from pathlib import Path

import pytest

from megadual.errors import UserError
from megadual.testing.models import sized_run
from megadual.train.scoring import Scoring


class Log:
    def __init__(self):
        self.said, self.sent = [], []

    def message(self, line: str) -> None:
        self.said.append(line)

    def numbers(self, step: int, numbers: dict) -> None:
        self.sent.append((step, numbers))


def run_of(folder, *more: str):
    return sized_run(
        f"run.dir={folder}", "checkpoint.every=2", "run.evaluate_every=4", "run.evaluate_detector=d.pt",
        "data.sets=[a]", "model.dualtoken=a", "model.text_tokenizer=a", *more,
    )  # fmt: skip


def test_scores_stand_with_the_step_that_was_done(tmp_path):
    """Another program stands in the place of the evaluation; one that fails is told of, and training goes on."""
    log = Log()
    scoring = Scoring(run_of(tmp_path, "run.evaluate_corpus=c", "run.evaluate_scenes=7"), log)
    arguments = scoring.arguments(tmp_path / "checkpoints/00000004")
    assert list(map(str, arguments)) == [
        "megadual.evaluate", "checkpoint", f"{tmp_path}/checkpoints/00000004", "--detector", "d.pt",
        "--output", f"{tmp_path}/evaluations/00000004", "--scenes", "7", "--corpus", "c",
    ]  # fmt: skip

    def program(checkpoint):
        folder = scoring.folder / checkpoint.name
        folder.mkdir()
        text = json.dumps({"summary": {"described": 0.5, "drawn": 0.25}})
        statement = f"open({str(folder / 'scenes.json')!r}, 'w').write({text!r})"
        return ["timeit", "-n1", "-r1", statement]

    scoring.arguments = program
    scoring.after_checkpoint(Path("00000002"))
    assert scoring.process is None
    scoring.after_checkpoint(Path("00000004"))
    scoring.process.wait()
    entry = {"step": 6}
    scoring.after_step(6, entry)
    assert entry == {"step": 6, "score_described": 0.5, "score_drawn": 0.25, "score_step": 4} and log.sent == []
    scoring.after_checkpoint(Path("00000008"))
    scoring.after_step(8, {})
    scoring.at_end(finished=True)
    assert log.sent == [(8, {"score_described": 0.5, "score_drawn": 0.25, "score_step": 8})]
    assert log.said == [f"step {step} on 7 scenes: described 0.500, drawn 0.250" for step in (4, 8)]

    scoring.arguments = lambda checkpoint: ["no_such_module"]
    scoring.after_checkpoint(Path("00000012"))
    scoring.at_end(finished=True)
    assert "nothing was made of 00000012: see" in log.said[-1]
    assert "no_such_module" in json.dumps((scoring.folder / "00000012.log").read_text())


def test_what_it_needs_is_told(tmp_path):
    with pytest.raises(UserError, match="give a multiple of checkpoint.every=2"):
        run_of(tmp_path, "run.evaluate_every=3")
    with pytest.raises(UserError, match="needs a detector: make one with"):
        run_of(tmp_path, "run.evaluate_detector=null")
