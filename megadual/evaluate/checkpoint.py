"""Scores of a training run's checkpoint on held-out scenes, whatever its layout and engine; see `scenes`.

`python -m megadual.evaluate checkpoint RUN --detector detector.pt --corpus CORPUS --output OUT`
"""

import argparse
import tempfile
from pathlib import Path

from megadual.evaluate import scenes
from megadual.hf.export import export
from megadual.train.checkpoint import load_run_config, resolve_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    scenes.add_options(parser)


def run(args: argparse.Namespace) -> None:
    checkpoint = resolve_checkpoint(args.checkpoint)
    args.output.mkdir(parents=True, exist_ok=True)
    # Beside the output, which holds results alone.
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".export-") as folder:
        args.model, args.shown_as = Path(folder) / "hf", str(checkpoint)
        export(load_run_config(checkpoint), checkpoint, args.model, "5GB")
        scenes.run(args)
