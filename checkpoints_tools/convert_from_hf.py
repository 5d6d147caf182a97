"""A Hugging Face model -> a checkpoint to start a run from: Qwen2.5 of any size, or an exported folder.

`python checkpoints_tools/convert_from_hf.py --model Qwen/Qwen2.5-7B --dualtoken DIR --output CKPT`
`python pretrain/pretrain.py --config CKPT/run.yaml data.sets=[...] run.dir=... train.steps=...`

Of Qwen2.5 the projector and the visual heads start fresh, as in a run from scratch with the same seed. The text
tokenizer is the model's own with MegaDual's special tokens added; the table keeps the rows of all ids that the model's
tokenizer has, an added id starts as their mean, and rows beyond (Qwen's padding) are left out. An exported folder
gives everything, its DualToken included. Tensors are read, converted and written one at a time.

CKPT/run.yaml has the model's sizes and names CKPT as what the run starts from; `--base pretrain/configs/7b.yaml` adds
the rest of a run to it. CKPT/text_tokenizer and, of an exported folder, CKPT/dualtoken are for the pipeline too.
"""

import argparse
from pathlib import Path

from megadual.errors import UserError, command
from megadual.hf.start import RUN, convert


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id: Qwen2.5, or what convert_to_hf.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint to write")
    parser.add_argument("--dualtoken", help="folder of the DualToken whose codes the model is to read and write")
    parser.add_argument("--text-tokenizer", help="folder or id, instead of the model's own; must give the same ids")
    parser.add_argument("--base", type=Path, help="YAML of a run, for the output's run.yaml to start from")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="what the model does not decide: model.head.*, the sizes of the visual heads (default: the paper's), and "
        "train.seed, from which they are drawn",
    )
    args = parser.parse_intermixed_args(argv)
    if args.output.exists():
        raise UserError(f"--output '{args.output}' exists; give a new folder")
    if args.base and not args.base.is_file():
        raise UserError(f"--base '{args.base}' does not exist")
    convert(args)
    print(f"{args.model} -> {args.output}; go on with python pretrain/pretrain.py --config {args.output / RUN}")


if __name__ == "__main__":
    main()
