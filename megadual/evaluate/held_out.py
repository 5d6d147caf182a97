"""Scenes, questions and edits that a model has not been trained on."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadual.errors import UserError
from megadual.synthetic.corpus import KINDS, SHOWN
from megadual.synthetic.drawings import DRAWINGS
from megadual.synthetic.scenes import PRESETS, RICH, Preset, Scene


@dataclass(frozen=True)
class Trained:
    """What a corpus shows in training: which drawings, and how its scenes are composed."""

    names: frozenset[str] = frozenset(DRAWINGS)
    compositions: frozenset[str] = frozenset()
    preset: Preset = RICH

    @classmethod
    def on(cls, corpus: Path | None) -> "Trained":
        """Of a folder of megadual.synthetic.corpus; None: all drawings, and no scene is known to be trained on."""
        if corpus is None:
            return cls()
        try:
            shown = json.loads((corpus / SHOWN).read_text())
            summary = json.loads((corpus / "corpus.json").read_text())
            return cls(frozenset(shown["names"]), frozenset(shown["compositions"]), PRESETS[summary["scenes"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--corpus '{corpus}' is no whole corpus: {type(error).__name__}: {error}; give the folder that "
                "megadual.synthetic.corpus wrote, or make it again"
            ) from error

    def draw(self, kind: str, count: int, seed: str) -> list[Any]:
        """`count` samples of a kind of the corpus (pairs, questions, edits), no two alike, none of them trained on."""
        rng, drawn = random.Random(seed), {}
        of, tries = KINDS[kind], 0
        while len(drawn) < count:
            sample = self.allowed(of.draw, of.scenes, rng)
            drawn.setdefault(of.identity(sample), sample)
            if (tries := tries + 1) > 100 * count:
                raise UserError(f"there are not {count} different {kind} that the corpus does not show; ask for fewer")
        return list(drawn.values())

    def allowed(self, draw: Callable, scenes: Callable, rng: random.Random, barred: bool = True) -> Any:
        """A sample whose scenes show known drawings alone; `barred`: and are not all composed as ones of the corpus.

        So of an edit one scene may be known, as it is of most that add to a simple scene or make one simple.
        """
        for _ in range(1_000_000):
            sample = draw(rng, self.preset)
            shown: list[Scene] = scenes(sample)
            known = all(group.name in self.names for scene in shown for group in scene.groups)
            if known and not (barred and all(scene.composition in self.compositions for scene in shown)):
                return sample
        raise UserError("the corpus shows every scene that can be drawn of its drawings; give one of another seed")
