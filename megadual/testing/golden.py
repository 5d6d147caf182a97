"""Golden runs: 20 steps of each training, whose numbers a change of the code must not change.

`python -m megadual.testing.golden --check` compares with tests/golden/golden.json, `--renew` writes it anew (`make
golden`); a renewal belongs into the changelog, with its reason. All of it runs in fp32, on one thread of a CPU, in one
process: the tiny preset on each engine, and the tokenizer's three stages, each from the one before.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import torch

from megadual.config import load_config
from megadual.run.ranks import Ranks
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.vision import tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip
from megadual.vision.recipe import TrainTokenizerConfig
from megadual.vision.train import TokenizerTrainer

GOLDEN = Path(__file__).parents[2] / "tests/golden/golden.json"
STEPS = 20
TOLERANCE = 1e-6  # of a number, relative to it where it is over 1
# On another kind of processor kernels round differently, and soon a vector between two codes falls the other way; with
# other instructions they do so at once.
STEPS_ELSEWHERE, TOLERANCE_ELSEWHERE = 5, 1e-4
ENGINES = ("megatron", "deepspeed")
# What the paper's stages freeze and weigh (pretrain/configs/tokenizer_256_rvq4_stage*.yaml), at the tiny sizes.
SIGLIP_UP_TO = "siglip_model.vision_model.embeddings,'siglip_model.vision_model.encoder.layers[:{}]'"
PIXEL_PARTS = "prequant.pixel,quantizers.pixel,postquant.pixel,post_quant_conv,decoder"
POOLED = ["pooled_mse=5", "pooled_cos=5"]
STAGES = {
    "stage0": [f"freeze=[{SIGLIP_UP_TO.format(2)}]",
               *(f"loss.{weight}" for weight in ("feature_mse=0", "feature_cos=0", *POOLED, "gan=0"))],
    "stage1": [],
    "stage2": [f"freeze=[{SIGLIP_UP_TO.format(1)},{PIXEL_PARTS}]",
               *(f"loss.{weight}" for weight in ("feature_mse=0", "feature_cos=1", *POOLED, "commit.pixel=0",
                                                 "reconstruction=0", "lpips=0", "gan=0"))],
}  # fmt: skip


def pretrain_steps(engine: str, folder: Path) -> list[dict]:
    """Every step's losses, gradient norm and learning rate of the tiny preset on random documents."""
    shards = tiny.write_tiny_set(folder / engine / "shards")
    run = tiny.golden_run(folder / engine, shards, engine, STEPS)
    (results,) = run_distributed(tiny.losses, 1, run)
    return [
        flat({name: value for name, value in result.items() if name not in ("flops", "fill")}) for result in results
    ]


def flat(result: dict) -> dict[str, float]:
    """Lists as one number each: depth_pixel -> depth_pixel/0, depth_pixel/1, ..."""
    numbers = {}
    for name, value in result.items():
        parts = {f"{name}/{i}": each for i, each in enumerate(value)} if isinstance(value, list) else {name: value}
        numbers |= parts
    return numbers


def tokenizer_steps(folder: Path) -> dict[str, list[dict]]:
    """Likewise of the tokenizer's three stages, each from the one before."""
    shards, siglip = write_tiny_pairs(folder / "pairs"), write_tiny_siglip(folder / "siglip")
    stages, start = {}, None
    for stage, overrides in STAGES.items():
        train = [f"steps={STEPS}", "warmup_steps=3", "lr=3e-4", "clip_grad=3", *overrides]
        given = [f"data.train={shards}", f"siglip={siglip}", f"run.dir={folder / stage}"]
        given += [*(f"train.{value}" for value in train), "data.batch_size=8", "data.shuffle=16", "lpips.images=2"]
        given += ["gan.channels=[8,8,8]", "gan.norm_groups=4"] + (["gan.start_step=5"] if stage == "stage1" else [])
        given += [f"checkpoint.start={start}"] if start else []
        config = load_config(TrainTokenizerConfig, None, given)
        config.model = tiny_dualtoken_config(siglip={})
        trainer = TokenizerTrainer(config, Ranks.current())
        trainer.open_data()
        steps = [trainer.step() for _ in range(STEPS)]
        for metrics in steps:
            metrics.pop("images_per_s")
        stages[stage], start = steps, folder / stage / "dualtoken"
        trainer.model.save_pretrained(start)
    return stages


def record() -> dict[str, list[dict]]:
    """All golden runs, by name."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {f"pretrain/{engine}": pretrain_steps(engine, Path(folder)) for engine in ENGINES}
        return runs | {f"tokenizer/{name}": steps for name, steps in tokenizer_steps(Path(folder)).items()}


def worst_differences(runs: dict[str, list[dict]]) -> tuple[dict[str, tuple[float, str]], float]:
    """For each run its largest difference from the golden numbers and where it is; and this machine's tolerance."""
    golden = json.loads(GOLDEN.read_text())
    here, there = _cpu(), golden["cpu"]
    steps = STEPS if here == there else STEPS_ELSEWHERE
    worst = {name: _difference(runs[name][:steps], numbers[:steps]) for name, numbers in golden["runs"].items()}
    return worst, TOLERANCE if here.split()[0] == there.split()[0] else TOLERANCE_ELSEWHERE


def _cpu() -> str:
    """The kind of processor, which libraries choose their kernels by, and not by its instructions alone."""
    told = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    kind = [re.search(rf"^{name}\s*: (.*)$", told, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(found[1] for found in kind if found)])


def _difference(found: list[dict], golden: list[dict]) -> tuple[float, str]:
    worst = (0.0, "none")
    for step, (a, b) in enumerate(zip(found, golden, strict=True), 1):
        assert a.keys() == b.keys(), f"step {step} has other numbers: {sorted(a.keys() ^ b.keys())}"
        for name in b:
            difference = abs(a[name] - b[name]) / max(1.0, abs(b[name]))
            worst = max(worst, (difference if math.isfinite(difference) else math.inf, f"step {step}, {name}"))
    return worst


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="print the largest difference of each run")
    what.add_argument("--renew", action="store_true", help="write the numbers anew")
    args = parser.parse_args(argv)
    runs = record()
    if args.renew:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(json.dumps({"cpu": _cpu(), "runs": runs}, indent=0) + "\n")
        print(f"{GOLDEN}: {sum(len(step) for run in runs.values() for step in run):,} numbers")
        return
    found, tolerance = worst_differences(runs)
    for name, (difference, where) in found.items():
        print(f"{name:20} {difference:.1e} ({where})")
    if max(difference for difference, _ in found.values()) > tolerance:
        sys.exit(f"more than {tolerance}")


if __name__ == "__main__":
    main()
