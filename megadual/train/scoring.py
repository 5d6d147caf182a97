"""How good the model is as it learns: scores of checkpoints on held-out scenes, taken beside the training."""

import json
from pathlib import Path
from typing import Any

from megadual.train.beside import Beside
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog


class Scoring(Beside):
    """Scores a checkpoint at every `run.evaluate_every` steps, into RUN/evaluations/STEP; the scores stand with the
    step that was done when they came, `score_step` being the checkpoint's."""

    last_s = 1800

    def __init__(self, run: PretrainConfig, log: MetricsLog):
        super().__init__(run.run.evaluate_every, Path(run.run.dir) / "evaluations", log)
        self.run = run.run

    def arguments(self, checkpoint: Path) -> list:
        corpus = ["--corpus", self.run.evaluate_corpus] if self.run.evaluate_corpus else []
        return [
            "megadual.evaluate", "checkpoint", checkpoint, "--detector", self.run.evaluate_detector,
            "--output", self.folder / checkpoint.name, "--scenes", self.run.evaluate_scenes, *corpus,
        ]  # fmt: skip

    def show(self, checkpoint: Path, entry: dict[str, Any] | None) -> None:
        found = json.loads((self.folder / checkpoint.name / "scenes.json").read_text())
        scores = {f"score_{name}": value for name, value in found["summary"].items()}
        scores["score_step"] = int(checkpoint.name)
        if entry is None:
            self.log.numbers(self.step, scores)
        else:
            entry.update(scores)
        said = ", ".join(f"{name} {value:.3f}" for name, value in found["summary"].items())
        self.log.message(f"step {int(checkpoint.name)} on {self.run.evaluate_scenes} scenes: {said}")
