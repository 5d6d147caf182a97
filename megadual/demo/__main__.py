"""Run MegaDual's stages one after the other on the embedded corpus, on CPU: `python -m megadual.demo`.

Each stage is a command of its own, printed before it runs. A stage is reused while its command, its config
file and the stages before it are those of the last run; `make clean` starts over.
"""

import argparse
import shlex
from pathlib import Path

from megadual.config import load_config
from megadual.demo.report import write_report
from megadual.demo.stage import Stage, run_stages
from megadual.engine.topology import topology
from megadual.errors import UserError, command
from megadual.train.config import PretrainConfig

RUN = Path("runs/demo")
CORPUS, SHARDS = RUN / "corpus", RUN / "shards"


def stages(layout: list[str]) -> list[Stage]:
    """The demo's stages; `layout` are overrides of the trainer's config."""
    held_out = f"'{CORPUS}/heldout-*.tar'"
    tokenize = "data_pipeline/tokenize.py --config data_pipeline/configs/demo.yaml"
    return [
        Stage(
            "corpus", "compose scenes from drawings: captions, questions and edits",
            f"-m megadual.synthetic.corpus --output {CORPUS} --scenes simple --size 32 --train 12000 --questions 6000 "
            "--edits 6000 --heldout 40",
            CORPUS / "corpus.json",
        ),
        Stage(
            "text_tokenizer", "train a small text tokenizer on captions and questions",
            f"-m megadual.text --captions '{CORPUS}/*train-*.tar' --output {RUN}/text_tokenizer",
            RUN / "text_tokenizer/tokenizer.json",
        ),
        Stage(
            "siglip", "train a tiny SigLIP on the pairs: the semantic teacher",
            "pretrain/train_siglip.py --config pretrain/configs/siglip_tiny.yaml", RUN / "siglip/config.json",
            RUN / "siglip",
        ),
        Stage(
            "tokenizer", "train a tiny DualToken: semantic and pixel codes, pixel decoder",
            "pretrain/train_tokenizer.py --config pretrain/configs/tokenizer_tiny.yaml",
            RUN / "tokenizer/dualtoken/config.json", RUN / "tokenizer",
        ),
        Stage(
            "evaluate", "measure reconstruction and retrieval on held-out images",
            f"-m megadual.vision.eval --model {RUN}/tokenizer/dualtoken --siglip {RUN}/siglip --data {held_out} "
            f"--train-data '{CORPUS}/train-*.tar' --output {RUN}/tokenizer/eval",
            RUN / "tokenizer/eval/report.json",
        ),
        Stage(
            "tokenize_pairs", "turn the pairs into shards of dual codes, with Ray",
            tokenize, SHARDS / "pairs/manifest.json", SHARDS / "pairs",
        ),
        Stage(
            "tokenize_questions", "the questions likewise, in a set of their own",
            f"{tokenize} \"inputs=['{CORPUS}/questions-train-*.tar']\" output={SHARDS}/questions",
            SHARDS / "questions/manifest.json", SHARDS / "questions",
        ),
        Stage(
            "tokenize_edits", "and the edits",
            f"{tokenize} \"inputs=['{CORPUS}/edits-train-*.parquet']\" output={SHARDS}/edits",
            SHARDS / "edits/manifest.json", SHARDS / "edits",
        ),
        Stage(
            "pretrain", "train the unified LLM on pairs, questions and edits, with megatron-core",
            shlex.join(["pretrain/pretrain.py", "--config", "pretrain/configs/tiny.yaml", *layout]),
            RUN / "pretrain/checkpoints/latest", RUN / "pretrain",
        ),
        Stage(
            "convert", "export a Hugging Face folder",
            f"checkpoints_tools/convert_to_hf.py --checkpoint {RUN}/pretrain --output {RUN}/hf",
            RUN / "hf/config.json",
        ),
        Stage(
            "verify", "compare the exported model with the trainer's",
            f"checkpoints_tools/verify.py --checkpoint {RUN}/pretrain --model {RUN}/hf --output {RUN}/verify.json",
            RUN / "verify.json",
        ),
        Stage(
            "use", "describe, draw, answer and edit what was held out, with the exported folder alone",
            f"checkpoints_tools/try_export.py --model {RUN}/hf --data {held_out} "
            f"--questions '{CORPUS}/questions-heldout-*.tar' --edits '{CORPUS}/edits-heldout-*.parquet' "
            f"--output {RUN}/use --draw 16 --answer 12 --cfg-scale 2 --temperature 0.3",
            RUN / "use/drawings.json",
        ),
        Stage(
            "detector", "train the detector that judges pictures of scenes",
            f"-m megadual.evaluate train-detector --output {RUN}/detector.pt --corpus {CORPUS} --steps 150 "
            "--batch-size 32",
            RUN / "detector.pt",
        ),
        Stage(
            "scenes", "score describing, answering, drawing and editing on other held-out scenes",
            f"-m megadual.evaluate scenes --model {RUN}/hf --detector {RUN}/detector.pt --corpus {CORPUS} "
            f"--output {RUN}/scenes --scenes 200 --cfg-scale 2 --temperature 0.3",
            RUN / "scenes/scenes.json",
        ),
    ]  # fmt: skip


def layout_overrides(parallel: str) -> list[str]:
    """`tensor=2` -> the trainer's overrides, every size that is not named being 1."""
    sizes = {"tensor": 1, "pipeline": 1, "data": 1}
    for part in parallel.replace(",", " ").split():
        name, _, value = part.partition("=")
        if name not in sizes or not value.isdecimal() or int(value) < 1:
            raise UserError(f"PARALLEL '{parallel}': '{part}' is not of the form tensor=2, pipeline=2 or data=2")
        sizes[name] = int(value)
    ranks = sizes["tensor"] * sizes["pipeline"] * sizes.pop("data")
    return [f"run.ranks={ranks}", *(f"parallel.{name}={size}" for name, size in sizes.items())]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", default="data=2", help="the trainer's layout: data=2, pipeline=2, tensor=2, ...")
    args = parser.parse_args()

    layout = layout_overrides(args.parallel)
    run = load_config(PretrainConfig, "pretrain/configs/tiny.yaml", layout)
    topology(run, run.run.ranks)  # a layout that can't work stops here

    seconds = run_stages(stages(layout), RUN)
    page = write_report(RUN, seconds)
    print(f"== report: {page}", flush=True)


if __name__ == "__main__":
    main()
