"""Scenes, questions and edits that a model has not been trained on."""

import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadual.errors import UserError
from megadual.synthetic.corpus import KINDS
from megadual.synthetic.drawings import DRAWINGS
from megadual.synthetic.scenes import PRESETS, RICH, Preset, Scene
from megadual.tars import tar_members


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
        scenes = list(_scenes_of(corpus))
        if not scenes:
            raise UserError(f"--corpus '{corpus}' holds no *train-*.tar with scenes; give a folder of the corpus")
        names = {group.name for scene in scenes for group in scene.groups}
        return cls(frozenset(names), frozenset(scene.composition for scene in scenes), _preset_of(corpus))

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


def _preset_of(corpus: Path) -> Preset:
    """What the corpus's scenes are drawn from, by its summary."""
    summary = corpus / "corpus.json"
    return PRESETS[json.loads(summary.read_text()).get("scenes", "rich")] if summary.is_file() else RICH


def _scenes_of(corpus: Path) -> Iterator[Scene]:
    """Every scene of the training parts, as it stands beside the pictures."""
    for path in sorted(corpus.glob("*train-*.tar")):
        try:
            with open(path, "rb") as tar:
                for member in tar_members(tar, str(path)):
                    if member["fname"].endswith(".json"):
                        described = json.loads(member["data"])
                        shown = described.get("scenes") or [described.get("scene") or described]
                        yield from map(Scene.of_record, shown)
        except (tarfile.TarError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"'{path}' is no tar of a corpus: {error}; make the corpus again") from error
    for path in sorted(corpus.glob("edits-train-*.jsonl")):
        for line in path.read_text().splitlines():
            described = json.loads(line)
            yield from map(Scene.of_record, (described["source"], described["result"]))
