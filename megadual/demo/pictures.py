"""Pictures of what an exported model does with held-out scenes, for a README.

`python -m megadual.demo.pictures --model runs/scenes/hf --corpus runs/scenes/corpus --output docs/pictures`

Writes reconstructions.png (originals above what the tokenizer makes of them), drawings.png (under their captions),
answers.png (questions about a picture, and what was said) and edits.png (source, instruction, result). Nothing is
chosen: they are the first held-out samples of their kind.
"""

import argparse
import tempfile
import textwrap
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from checkpoints_tools.try_export import Trial, edits, first, samples  # noqa: E402
from megadual.errors import command  # noqa: E402
from megadual.hf.folder import open_folder  # noqa: E402
from megadual.vision.tokenizer import to_image, to_tensor  # noqa: E402

COLUMNS = 6
LINE, WIDTH = 0.125, 23  # of text: inches of a line, letters in one


def grid(count: int, rows_of_one: int = 1, text_lines: int = 0):
    """A figure and its axes, (count / COLUMNS * rows_of_one, COLUMNS), with room for `text_lines` below each."""
    rows = -(-count // COLUMNS) * rows_of_one
    side, below = 1.3, 0.08 + LINE * text_lines  # inches
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS * (side + 0.08), rows * (side + below)), squeeze=False)
    figure.subplots_adjust(0.005, below / (rows * (side + below)), 0.995, 1, wspace=0.08 / side, hspace=below / side)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show(axis, image: Image.Image, text: str = "") -> None:
    axis.imshow(image)
    lines = "\n".join(wrapped for line in text.split("\n") for wrapped in textwrap.wrap(line, WIDTH))
    axis.text(0, 1.04 * image.height, lines, fontsize=7, va="top")


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as picture:  # few colours: a third of the bytes
        picture.convert("RGB").quantize(256).save(path, optimize=True)


@torch.no_grad()
def reconstructions(model, images: list[Image.Image]):
    pixels = torch.stack([to_tensor(image.convert("RGB")) for image in images]).to(model.device)
    figure, axes = grid(len(images), rows_of_one=2)
    decoded = model.dualtoken.decode(model.dualtoken.encode(pixels))
    for i, (image, again) in enumerate(zip(images, decoded, strict=True)):
        row, column = divmod(i, COLUMNS)
        show(axes[2 * row, column], image)
        show(axes[2 * row + 1, column], to_image(again.float()))
    return figure


def drawings(trial: Trial, pairs: list):
    figure, axes = grid(len(pairs), text_lines=4)
    for axis, drawn in zip(axes.flat, trial.draw(pairs), strict=False):
        show(axis, Image.open(trial.output / drawn["file"]), drawn["caption"])
    return figure


def answers(trial: Trial, conversations: list):
    figure, axes = grid(len(conversations), text_lines=9)
    asked = groupby(trial.answer(conversations), key=lambda answer: answer["file"])
    for axis, (file, about) in zip(axes.flat, asked, strict=False):
        lines = [f"{each['question']} {each['said']}{'' if each['right'] else ' (wrong)'}" for each in about]
        show(axis, Image.open(trial.output / file), "\n".join(lines[:4]))
    return figure


def edited(trial: Trial, rows: list):
    figure, axes = grid(len(rows), rows_of_one=2, text_lines=3)
    for i, edit in enumerate(trial.edit(rows)):
        row, column = divmod(i, COLUMNS)
        show(axes[2 * row, column], Image.open(trial.output / edit["source"]), edit["instruction"])
        show(axes[2 * row + 1, column], Image.open(trial.output / edit["drawn"]))
    return figure


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder")
    parser.add_argument("--corpus", required=True, help="folder of composed scenes: its held-out parts are used")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--count", type=int, default=2 * COLUMNS, help="pictures of each kind")
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="guidance of drawings and edits")
    parser.add_argument("--temperature", type=float, default=1.0, help="that their codes are drawn at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = open_folder(args.model)
    patterns = {
        "pairs": (f"{args.corpus}/heldout-*.tar", lambda pattern: samples("--corpus", pattern, "txt")),
        "questions": (f"{args.corpus}/questions-heldout-*.tar", lambda pattern: samples("--corpus", pattern, "json")),
        "edits": (f"{args.corpus}/edits-heldout-*.parquet", edits),
    }
    held_out = {
        name: first("--corpus", pattern, read(pattern), args.count) for name, (pattern, read) in patterns.items()
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(model, Path(folder), args.seed, cfg_scale=args.cfg_scale, temperature=args.temperature)
        figures = {
            "reconstructions": reconstructions(model, [image for _, image, _ in held_out["pairs"]]),
            "drawings": drawings(trial, held_out["pairs"]),
            "answers": answers(trial, held_out["questions"]),
            "edits": edited(trial, held_out["edits"]),
        }
        for name, figure in figures.items():
            save(figure, args.output / f"{name}.png")
            print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
