"""Is an exported folder the checkpoint that it was made from? Every tensor bitwise, and the logits of real samples.

`python checkpoints_tools/verify.py --checkpoint RUN --model DIR --output REPORT.json`

Tensors are compared one at a time, in both directions of the mapping table. For the logits the trainer's model runs
here, on packed samples of a shard set, then the exported one in a process of its own that cannot import megadual; both
in fp32, which needs 4 bytes a parameter (`--samples 0` leaves it out). Exit code 1 where they differ.
"""

import argparse
import json
import sys
from pathlib import Path

from megadual.errors import command
from megadual.hf.verification import verify
from megadual.train.checkpoint import resolve_checkpoint


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare an exported folder with the checkpoint it was made from.")
    parser.add_argument("--checkpoint", required=True, help="RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    parser.add_argument("--model", required=True, type=Path, help="folder that convert_to_hf.py wrote")
    parser.add_argument("--samples", type=int, default=8, help="documents to compare logits on; 0: tensors only")
    parser.add_argument("--data", help="shard set of the samples (default: the run's sets)")
    parser.add_argument(
        "--python", default=sys.executable, help="of an environment with other packages, for the export"
    )
    parser.add_argument("--output", type=Path, help="file for the report as JSON")
    args = parser.parse_args(argv)
    checkpoint = resolve_checkpoint(args.checkpoint)
    report = json.dumps(verify(checkpoint, args.model, args.samples, args.data, args.python), indent=2)
    print(report)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(report + "\n")
    if not json.loads(report)["equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
