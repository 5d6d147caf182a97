"""A small model that describes, answers, draws and edits, trained from nothing on one GPU.

`python -m megadual.demo.scenes`

The demo's way at a size at which it works: 134 drawings, 1 to 4 of them a scene, at 128 pixels (docs/scenes.md tells
the recipe and what came of it). Each stage is a command of its own, printed before it runs. A stage is reused while
its command, its config file and the stages before it are those of the last run. With --stop-after the stages can be run
in pieces: a training that is stopped goes on from where it was.

--variant trains another LLM on the same shards, in a folder of its own, and scores it: what one kind of codes is good
for alone, another size or rate (benchmarks/scenes.py makes tables of such). Several may run at a time, each on its GPU.
"""

import argparse
import os
import shlex
from pathlib import Path

from megadual.demo.report import write_report
from megadual.demo.stage import Stage, done_key, run_stages
from megadual.errors import UserError, command

RUN = Path("runs/scenes")
CORPUS, SHARDS, DETECTOR = RUN / "corpus", RUN / "shards", RUN / "detector.pt"
CONFIG = "pretrain/configs/scenes/llm.yaml"
SAMPLING = "--cfg-scale 2 --temperature 0.7"  # docs/scenes.md has others


def model_stages(run: Path, overrides: list[str], scenes: int = 400) -> list[Stage]:
    """Training an LLM on the shards, its export and its scores on `scenes` of each task, in the folder `run`."""
    return [
        Stage(
            "pretrain", "train the unified LLM on pairs, questions and edits, with megatron-core",
            shlex.join(["pretrain/pretrain.py", "--config", CONFIG, f"run.dir={run}/pretrain", *overrides]),
            run / "pretrain/checkpoints/latest", run / "pretrain",
        ),
        Stage(
            "convert", "export a Hugging Face folder",
            f"checkpoints_tools/convert_to_hf.py --checkpoint {run}/pretrain --output {run}/hf", run / "hf/config.json",
        ),
        Stage(
            "scenes", "score describing, answering, drawing and editing on held-out scenes",
            f"-m megadual.evaluate scenes --model {run}/hf --detector {DETECTOR} --corpus {CORPUS} "
            f"--output {run}/scenes --scenes {scenes} {SAMPLING}",
            run / "scenes/scenes.json",
        ),
    ]  # fmt: skip


def shown_stages(run: Path) -> list[Stage]:
    """Proof and pictures of the model in the folder `run`."""
    return [
        Stage(
            "verify", "compare the exported model with the trainer's",
            f"checkpoints_tools/verify.py --checkpoint {run}/pretrain --model {run}/hf --output {run}/verify.json",
            run / "verify.json",
        ),
        Stage(
            "use", "describe, draw, answer and edit what was held out, with the exported folder alone",
            f"checkpoints_tools/try_export.py --model {run}/hf --data '{CORPUS}/heldout-*.tar' "
            f"--questions '{CORPUS}/questions-heldout-*.tar' --edits '{CORPUS}/edits-heldout-*.parquet' "
            f"--output {run}/use --draw 16 --answer 12 {SAMPLING}",
            run / "use/drawings.json",
        ),
        Stage(
            "pictures", "show what it does with the first held-out scenes",
            f"-m megadual.demo.pictures --model {run}/hf --corpus {CORPUS} --output {run}/pictures {SAMPLING}",
            run / "pictures/edits.png",
        ),
    ]  # fmt: skip


def shared_stages(workers: int) -> list[Stage]:
    """What all LLMs share: corpus, tokenizers, shards and the detector; `workers` processes draw pictures."""
    tokenize = "data_pipeline/tokenize.py --config data_pipeline/configs/scenes.yaml"
    return [
        Stage(
            "corpus", "compose scenes from drawings: captions, questions and edits",
            f"-m megadual.synthetic.corpus --output {CORPUS} --size 128 --train 200000 --questions 70000 --edits 70000 "
            f"--heldout 500 --workers {workers}",
            CORPUS / "corpus.json",
        ),
        Stage(
            "text_tokenizer", "train a small text tokenizer on captions and questions",
            f"-m megadual.text --captions '{CORPUS}/*train-0000*.tar' --output {RUN}/text_tokenizer",
            RUN / "text_tokenizer/tokenizer.json",
        ),
        Stage(
            "siglip", "train a small SigLIP on the pairs: the semantic teacher",
            "pretrain/train_siglip.py --config pretrain/configs/scenes/siglip.yaml", RUN / "siglip/config.json",
            RUN / "siglip",
        ),
        Stage(
            "tokenizer", "train a DualToken: semantic and pixel codes, pixel decoder",
            "pretrain/train_tokenizer.py --config pretrain/configs/scenes/tokenizer.yaml",
            RUN / "tokenizer/dualtoken/config.json", RUN / "tokenizer",
        ),
        Stage(
            "evaluate", "measure reconstruction and retrieval on held-out images",
            f"-m megadual.vision.eval --model {RUN}/tokenizer/dualtoken --siglip {RUN}/siglip --data "
            f"'{CORPUS}/heldout-*.tar' --train-data '{CORPUS}/train-0000[0-3].tar' --output {RUN}/tokenizer/eval",
            RUN / "tokenizer/eval/report.json",
        ),
        *(
            Stage(
                f"tokenize_{name}", f"turn the {name} into shards of dual codes, with Ray",
                f"{tokenize} \"inputs=['{CORPUS}/{files}']\" output={SHARDS}/{name}", SHARDS / f"{name}/manifest.json",
                SHARDS / name,
            )
            for name, files in (
                ("pairs", "train-*.tar"), ("questions", "questions-train-*.tar"), ("edits", "edits-train-*.parquet"),
            )
        ),
        Stage(
            "detector", "train the detector that judges pictures of scenes",
            f"-m megadual.evaluate train-detector --output {DETECTOR} --corpus {CORPUS} --steps 700 "
            f"--workers {workers}",
            DETECTOR,
        ),
    ]  # fmt: skip


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="end then, saved; start again to go on")
    parser.add_argument("--variant", metavar="NAME", help=f"train another LLM, in {RUN}/NAME")
    parser.add_argument(
        "--scenes", type=int, default=400, help="held-out samples of each task that models are scored on"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"keys of {CONFIG}, for a variant")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw pictures")
    parser.add_argument("--dry-run", action="store_true", help="print the stages' commands")
    args = parser.parse_intermixed_args()
    if bool(args.variant) != bool(args.overrides):
        raise UserError(f"--variant {args.variant} with {args.overrides}: give a name and what differs, or neither")
    shared = shared_stages(args.workers)
    run = RUN / args.variant if args.variant else RUN
    own = model_stages(run, args.overrides, args.scenes)
    if not args.variant:
        own += shown_stages(run)
    if args.dry_run:
        print("\n".join(f"python {stage.arguments}" for stage in shared + own))
        return
    if not args.variant:
        seconds = run_stages(shared + own, RUN, args.stop_after)
        print(f"== report: {write_report(RUN, seconds)}", flush=True)
        return
    before = done_key(shared, RUN)
    if before is None:
        raise UserError(f"the stages that a variant shares are not done in '{RUN}'; run without --variant first")
    run_stages(own, run, args.stop_after, before)
    print(f"== scores: {run / 'scenes/scenes.html'}", flush=True)


if __name__ == "__main__":
    main()
