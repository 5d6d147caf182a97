"""A benchmark whose answers are known exactly: held-out composed scenes.

`python -m megadual.evaluate scenes --model DIR --detector detector.pt --corpus CORPUS --output OUT`

A model describes scenes (captions are read by their grammar), answers questions about them, draws them from captions
and edits them; pictures are judged by a detector that was trained on scenes alone (train-detector). What the detector
makes of the true pictures, and of the tokenizer's reconstructions of them, stands beside every score of pictures: no
model that draws with this tokenizer can be expected above them. OUT gets scenes.json and scenes.html.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from megadual.errors import UserError
from megadual.evaluate.detector import Detector, Seen
from megadual.evaluate.draw import Sampling, add_sampling, sampling_of
from megadual.evaluate.held_out import Trained
from megadual.evaluate.judge import AXES, judge, judge_edit, sight
from megadual.evaluate.record import file_sha256, model_record, now, software, write_json
from megadual.evaluate.scene_scores import Judged, description, drawing_scores, edit_scores, question_scores, shares
from megadual.evaluate.scenes_page import page, percent
from megadual.hf.folder import open_folder
from megadual.synthetic.drawings import check_packages
from megadual.synthetic.edits import Edit
from megadual.synthetic.questions import Conversation
from megadual.synthetic.scenes import Scene, render
from megadual.vision.tokenizer import to_image, to_tensor

TASKS = ("describe", "ask", "draw", "edit")
SIGHTS = ("kind", "count", "ground", "place", "all")  # of descriptions, what a detector tells of a picture too
BATCH = 32


class Trial:
    """The model and the detector at work on held-out samples; `cards` keeps what the page shows."""

    def __init__(self, model, detector: Detector, trained: Trained, seed: int, sampling: Sampling, image_scale: float):
        self.model, self.detector, self.trained, self.seed = model, detector, trained, seed
        self.sampling, self.image_scale = sampling, image_scale
        self.size = model.dualtoken.config.image_size
        self.cards: dict[str, list[dict]] = {}

    def draw_held_out(self, kind: str, count: int) -> list:
        return self.trained.draw(kind, count, f"evaluation {kind} {self.seed}")

    def describe(self, count: int) -> dict:
        scenes: list[Scene] = self.draw_held_out("pairs", count)
        judged: Judged = []
        self.cards["describe"] = []
        for some in in_batches(scenes, "describe"):
            images = [render(scene, self.size) for scene in some]
            for scene, image, said in zip(some, images, self.model.describe(images), strict=True):
                judged.append(description(scene, said))
                card = {"images": [image], "text": said, "true": scene.caption, "right": judged[-1]["all"]}
                self.cards["describe"].append(card)
        others = scenes[-1:] + scenes[:-1]

        def seen(images: list[Image.Image]) -> dict:
            return shares([sight(scene, found) for scene, found in self._seen(scenes, images)], SIGHTS)

        chance = [description(scene, other.caption) for scene, other in zip(scenes, others, strict=True)]
        return shares(judged, judged[0]) | {
            "chance": shares(chance, chance[0]),
            "ceiling": self._ceiling([render(scene, self.size) for scene in scenes], seen),
        }

    def ask(self, count: int) -> dict:
        """`count` conversations; each of their questions is asked by itself."""
        conversations: list[Conversation] = self.draw_held_out("questions", count)
        asked = [(talk.scene, question) for talk in conversations for question in talk.questions]
        answers = []
        self.cards["ask"] = []
        for some in in_batches(asked, "ask"):
            images = [render(scene, self.size) for scene, _ in some]
            said = self.model.ask(images, [question.asked for _, question in some])
            for (_, question), image, answer in zip(some, images, said, strict=True):
                right = answer.strip().casefold() == question.answer.casefold()
                answers.append({"kind": question.kind, "answer": question.answer, "right": right})
                card = {
                    "images": [image],
                    "text": f"{question.asked} {answer}",
                    "true": question.answer,
                    "right": right,
                }
                self.cards["ask"].append(card)
        return question_scores(answers)

    def draw(self, count: int) -> dict:
        scenes: list[Scene] = self.draw_held_out("pairs", count)
        options, drawn = asdict(self.sampling), []
        seed = options.pop("seed")
        for some in in_batches(scenes, "draw"):
            drawn += self.model.draw([scene.told for scene in some], seed=seed + len(drawn), **options)
        judged = self._judged(scenes, drawn)
        originals = [render(scene, self.size) for scene in scenes]
        self.cards["draw"] = [
            {"images": [image], "text": scene.told, "true": "", "right": each["all"]}
            for scene, image, each in zip(scenes, drawn, judged, strict=True)
        ]
        return drawing_scores(judged) | {
            "chance": drawing_scores(self._judged(scenes, originals[-1:] + originals[:-1])),
            "ceiling": self._ceiling(originals, lambda images: drawing_scores(self._judged(scenes, images))),
        }

    def edit(self, count: int) -> dict:
        edits: list[Edit] = self.draw_held_out("edits", count)
        options, drawn = asdict(self.sampling), []
        seed = options.pop("seed")
        for some in in_batches(edits, "edit"):
            sources = [render(edit.change.source, self.size) for edit in some]
            instructions = [edit.instruction for edit in some]
            drawn += self.model.edit(
                sources, instructions, image_scale=self.image_scale, seed=seed + len(drawn), **options
            )
        tasks = [edit.change.task for edit in edits]

        def judged(images: list[Image.Image]) -> Judged:
            return [judge_edit(edit.change, seen) for edit, seen in zip(edits, self.detector.see(images), strict=True)]

        before, true = (
            [render(scene, self.size) for scene in of]
            for of in zip(*((edit.change.source, edit.change.result) for edit in edits), strict=True)
        )
        found = judged(drawn)
        self.cards["edit"] = [
            {"images": [source, image], "text": edit.instruction, "true": "", "right": each["all"]}
            for edit, source, image, each in zip(edits, before, drawn, found, strict=True)
        ]
        return edit_scores(tasks, found) | {
            "chance": edit_scores(tasks, judged(before)),
            "ceiling": self._ceiling(true, lambda images: edit_scores(tasks, judged(images))),
        }

    def _ceiling(self, true: list[Image.Image], scored: Callable[[list[Image.Image]], dict]) -> dict:
        """What the true pictures get, and what their reconstructions do."""
        return {"originals": scored(true), "reconstructions": scored(self.reconstructed(true))}

    @torch.no_grad()
    def reconstructed(self, images: list[Image.Image]) -> list[Image.Image]:
        """The images through the tokenizer and back."""
        dualtoken, back = self.model.dualtoken, []
        for some in in_batches(images, "reconstruct"):
            pixels = torch.stack([to_tensor(image) for image in some])
            pixels = pixels.to(self.model.device, next(dualtoken.parameters()).dtype)
            back += [to_image(picture.float()) for picture in dualtoken.decode(dualtoken.encode(pixels).codes)]
        return back

    def _seen(self, scenes: list[Scene], images: list[Image.Image]) -> Iterable[tuple[Scene, Seen]]:
        return zip(scenes, self.detector.see(images), strict=True)

    def _judged(self, scenes: list[Scene], images: list[Image.Image]) -> Judged:
        return [judge(scene, seen) for scene, seen in self._seen(scenes, images)]


def in_batches(items: list, progress: str) -> Iterator[list]:
    with tqdm(total=len(items), desc=progress, unit="scene", mininterval=1 if sys.stderr.isatty() else 10) as bar:
        for start in range(0, len(items), BATCH):
            yield items[start : start + BATCH]
            bar.update(len(items[start : start + BATCH]))


def evaluate(
    model_folder: Path,
    detector_file: Path,
    output: Path,
    corpus: Path | None = None,
    count: int = 400,
    seed: int = 0,
    sampling: Sampling | None = None,
    image_scale: float = 1.5,
    tasks: Iterable[str] = TASKS,
    device: str | None = None,
    shown_as: str | None = None,
) -> dict:
    """Score a model and write scenes.json and scenes.html into `output`; returns what the JSON says.

    `shown_as`: what the model is, where its folder does not last.
    """
    check_packages()
    sampling = sampling or Sampling()
    about = model_record(model_folder) | ({"path": shown_as} if shown_as else {})
    model = open_folder(model_folder, device)
    detector = Detector.load(detector_file, model.device)
    trained = Trained.on(corpus)
    if unknown := sorted(trained.names - set(detector.names)):
        if corpus is not None:
            raise UserError(
                f"--detector '{detector_file}' does not know '{unknown[0]}', which --corpus '{corpus}' shows; train it "
                f"with train-detector --corpus {corpus}"
            )
        trained = Trained(frozenset(detector.names))
    trial = Trial(model, detector, trained, seed, sampling, image_scale)
    work: dict[str, Callable[[int], dict]] = {
        "describe": trial.describe, "ask": trial.ask, "draw": trial.draw, "edit": trial.edit,
    }  # fmt: skip
    left_out, begun = {}, time.time()
    if not model.draws:
        why = "the model does not write the streams that pictures are decoded from"
        left_out = {"draw": why, "edit": why}
    report = {
        "benchmark": "scenes",
        "model": about,
        "detector": {"path": str(detector_file), "sha256": file_sha256(detector_file)},
        "corpus": str(corpus) if corpus else None,
        "scenes": count,
        "seed": seed,
        "sampling": asdict(sampling) | {"image_scale": image_scale},
        "scores": {task: work[task](count) for task in work if task in tasks and task not in left_out},
        "left_out": left_out,
        "definitions": AXES,
    }
    report["summary"] = summary(report["scores"])
    report |= {"seconds": round(time.time() - begun, 1), "time": now(), "software": software()}
    write_json(output / "scenes.json", report)
    (output / "scenes.html").write_text(page(report, trial.cards))
    return report


def summary(scores: dict) -> dict[str, float]:
    """One figure of each task."""
    figures = {
        "describe": ("described", lambda of: of["all"]["right"]),
        "ask": ("answered", lambda of: of["overall"]["right"]),
        "draw": ("drawn", lambda of: of["overall"]),
        "edit": ("edited", lambda of: of["overall"]["all"]),
    }
    return {name: figure(scores[task]) for task, (name, figure) in figures.items() if task in scores}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="exported folder")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but the model."""
    parser.add_argument("--detector", required=True, type=Path, help="file of train-detector")
    parser.add_argument("--output", required=True, type=Path, help="folder for scenes.json and scenes.html")
    parser.add_argument("--corpus", type=Path, help="what the model was trained on: none of its scenes is used, and "
        "none with drawings that it does not show")  # fmt: skip
    parser.add_argument("--scenes", type=int, default=400, help="held-out samples of each task (default: 400)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--image-scale", type=float, default=1.5, help="guidance of edits towards their source")
    add_sampling(parser)
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.set_defaults(shown_as=None)


def run(args: argparse.Namespace) -> None:
    if args.scenes < 1:
        raise UserError(f"--scenes {args.scenes} must be at least 1")
    report = evaluate(
        args.model, args.detector, args.output, args.corpus, args.scenes, args.seed, sampling_of(args),
        args.image_scale, args.tasks, args.device, args.shown_as,
    )  # fmt: skip
    said = ", ".join(f"{name} {percent(value)}" for name, value in report["summary"].items())
    print(f"{said}: {args.output / 'scenes.html'}")
