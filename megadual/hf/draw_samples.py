"""Draw from a run's checkpoint: `python -m megadual.hf.draw_samples RUN "two red apples" --output samples.png`"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from megadual.errors import command
from megadual.hf.export import export
from megadual.hf.folder import open_folder
from megadual.train.checkpoint import load_run_config, resolve_checkpoint


def in_rows(images: list[Image.Image], rows: int, gap: int = 4) -> Image.Image:
    """One picture of images of one size, row after row."""
    columns, (width, height) = len(images) // rows, images[0].size
    picture = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        picture.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return picture


def draw(checkpoint: Path, prompts: list[str], count: int, seed: int, scratch: Path | None = None) -> Image.Image:
    """A row of `count` images for each prompt; the exported model lies in `scratch` meanwhile."""
    run = load_run_config(checkpoint)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".export-") as folder:
        export(run, checkpoint, Path(folder) / "hf", "5GB")
        model = open_folder(Path(folder) / "hf")
        return in_rows(model.draw(prompts, n=count, seed=seed), rows=len(prompts))


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw from a pretraining checkpoint of any layout and engine.")
    parser.add_argument("checkpoint", help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--output", type=Path, required=True, help="the picture: a row for each prompt")
    parser.add_argument("-n", type=int, default=4, help="images for each prompt (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture = draw(resolve_checkpoint(args.checkpoint), args.prompts, args.n, args.seed, args.output.parent)
    partial = args.output.with_name(f".partial-{args.output.name}")
    picture.save(partial, "PNG")
    partial.rename(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
