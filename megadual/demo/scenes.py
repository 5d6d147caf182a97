"""A small model that describes, answers, draws and edits, trained from nothing on one GPU.

`python -m megadual.demo.scenes`

The demo's way at a size at which it works: 134 drawings, 1 to 4 of them a scene, at 128 pixels (docs/scenes.md tells
the recipe and what came of it). Each stage is a command of its own, printed before it runs. A stage is reused while
its command, its config file and the stages before it are those of the last run. With --stop-after the stages can be run
in pieces: a training that is stopped goes on from where it was.

--streams and --seed train another LLM on the same shards, beside the first: what one kind of codes is good for alone.
"""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path

from megadual.demo.report import write_report
from megadual.demo.stage import Stage, run_stages
from megadual.errors import command

RUN = Path("runs/scenes")
CORPUS, SHARDS, DETECTOR = RUN / "corpus", RUN / "shards", RUN / "detector.pt"
SAMPLING = "--cfg-scale 2 --temperature 0.7"  # docs/scenes.md has others


def model_stages(run: Path, overrides: list[str]) -> list[Stage]:
    """Training an LLM on the shards, its export and its scores, in the folder `run`."""
    config = "pretrain/configs/scenes/llm.yaml"
    held_out = f"'{CORPUS}/heldout-*.tar'"
    return [
        Stage(
            "pretrain", "train the unified LLM on pairs, questions and edits, with megatron-core",
            shlex.join(["pretrain/pretrain.py", "--config", config, f"run.dir={run}/pretrain", *overrides]),
            run / "pretrain/checkpoints/latest",
        ),
        Stage(
            "convert", "export a Hugging Face folder",
            f"checkpoints_tools/convert_to_hf.py --checkpoint {run}/pretrain --output {run}/hf", run / "hf/config.json",
        ),
        Stage(
            "verify", "compare the exported model with the trainer's",
            f"checkpoints_tools/verify.py --checkpoint {run}/pretrain --model {run}/hf --output {run}/verify.json",
            run / "verify.json",
        ),
        Stage(
            "use", "describe, draw, answer and edit what was held out, with the exported folder alone",
            f"checkpoints_tools/try_export.py --model {run}/hf --data {held_out} "
            f"--questions '{CORPUS}/questions-heldout-*.tar' --edits '{CORPUS}/edits-heldout-*.parquet' "
            f"--output {run}/use --draw 16 --answer 12 {SAMPLING}",
            run / "use/drawings.json",
        ),
        Stage(
            "scenes", "score describing, answering, drawing and editing on other held-out scenes",
            f"-m megadual.evaluate scenes --model {run}/hf --detector {DETECTOR} --corpus {CORPUS} "
            f"--output {run}/scenes --scenes 400 {SAMPLING}",
            run / "scenes/scenes.json",
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
        ),
        Stage(
            "tokenizer", "train a DualToken: semantic and pixel codes, pixel decoder",
            "pretrain/train_tokenizer.py --config pretrain/configs/scenes/tokenizer.yaml",
            RUN / "tokenizer/dualtoken/config.json",
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
    parser.add_argument("--streams", nargs="+", metavar="NAME", help="the LLM's streams of codes (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="of the LLM's weights and of the order of its data")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw pictures")
    parser.add_argument("--dry-run", action="store_true", help="print the stages' commands")
    args = parser.parse_args()

    streams, overrides = args.streams or [], []
    if streams:
        overrides.append(f"model.streams=[{','.join(streams)}]")
    if args.seed:
        overrides.append(f"train.seed={args.seed}")
    variant = "-".join([*(streams or ["all"]), str(args.seed)])
    run = RUN / variant if overrides else RUN
    model = [
        dataclasses.replace(stage, name=f"{stage.name} {variant}") if overrides else stage
        for stage in model_stages(run, overrides)
    ]
    plan = shared_stages(args.workers) + model
    if args.dry_run:
        print("\n".join(f"python {stage.arguments}" for stage in plan))
        return
    seconds = run_stages(plan, RUN, args.stop_after)
    if run == RUN:
        print(f"== report: {write_report(RUN, seconds)}", flush=True)
    else:
        print(f"== scores: {run / 'scenes/scenes.html'}", flush=True)


if __name__ == "__main__":
    main()
