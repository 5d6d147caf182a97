"""A pretraining checkpoint -> a Hugging Face folder with the code to run it.

`python checkpoints_tools/convert_to_hf.py --checkpoint RUN --output DIR`
"""

import argparse
from pathlib import Path

from megadual.errors import command
from megadual.hf.export import check_output, export
from megadual.train.checkpoint import load_run_config, resolve_checkpoint


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a pretraining checkpoint to a Hugging Face folder.")
    parser.add_argument("--checkpoint", required=True, help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights, such as 500MB (default: 5GB)")
    args = parser.parse_args(argv)
    check_output(args.output)
    checkpoint = resolve_checkpoint(args.checkpoint)
    run = load_run_config(checkpoint)
    export(run, checkpoint, args.output, args.max_shard_size)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{checkpoint} -> {args.output} ({size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    main()
