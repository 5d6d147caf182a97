"""Speed of pretrain.py under every layout that this machine's GPUs allow, beside what the plan predicts.

python benchmarks/scaling.py [--only "one GPU" DP2 ...] [--steps 20] [--inputs DIR] [--output scaling.json]
    [--before CHECKOUT] [--keep DIR [--read]]

The 7B shape cut to 4 layers (pretrain/configs/7b_one_gpu.yaml) in rows of 4,096, CP in rows of 32,768, and whole
presets, all on made-up documents (megadual/synthetic/inputs.py) in the real data path. Every layout of a table trains
the same batches, of `--micro-batches` rows a GPU of this machine, one GPU all of them; where rows are longer a batch
has as many positions. Layouts that leave GPUs free run beside each other, unless --alone.

Prints a Markdown table: medians of the steps after the fifth, of which it gives the number, or of those after the first
where a run ended sooner; tokens/s a GPU as a share of the first row's; seconds of the first step, compilation included,
and in all from the start of the process to its end; the most memory that tensors took on rank 0; and the largest
relative difference of a step's loss from the first layout in the table that trains the same rows. What the plan
predicts for a figure stands in brackets behind it. --dry-run prints the predictions alone, for --gpus GPUs. With
--output, layouts whose figures the file holds are not run again, unless they ended early. --before runs each layout
with another checkout too. --read runs nothing: it reads what runs have left in --keep, ended or not.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

from megadual.config import load_config  # noqa: E402
from megadual.engine import cpu  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402
from megadual.run.step_log import METRICS, read_metrics  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402

cpu.install()

import torch  # noqa: E402

from megadual.engine.predict import Prediction, predict, rates_of  # noqa: E402
from megadual.train import setup  # noqa: E402

WARM = 5  # steps that are not counted
_TP, _PP = ["parallel.tensor=2", "parallel.sequence=true"], ["parallel.pipeline=2"]
_TP4 = ["parallel.tensor=4", "parallel.sequence=true"]
_ZERO = {stage: ["engine=deepspeed", f"parallel.zero_stage={stage}"] for stage in (1, 3)}
_FP8 = ["train.fp8=true"]
_BF16, _AHEAD, _TWO_ROWS = ["train.grad_reduce_dtype=bf16"], ["parallel.run_ahead=1"], ["train.micro_batch_size=2"]
# Of ZeRO-3: gradients are not copied into a bucket before they are copied for sending; weights are asked for two layers
# ahead; and those of the forward pass are kept for the backward pass.
_NO_BUCKET = ["parallel.zero.contiguous_gradients=0"]
_PREFETCH = ["parallel.zero.stage3_prefetch_bucket_size=5e8", "parallel.zero.stage3_max_live_parameters=2e9"]
_KEPT = [
    "parallel.zero.stage3_prefetch_bucket_size=5e8", "parallel.zero.stage3_max_live_parameters=1e10",
    "parallel.zero.stage3_max_reuse_distance=1e10",
]  # fmt: skip
_CUT, _3B, _7B = "7b_one_gpu.yaml", "3b_384.yaml", "7b.yaml"

# name -> (GPUs, config, overrides); what is left of the GPUs is data parallel.
LAYOUTS = {
    "one GPU": (1, _CUT, []),
    "one GPU, FP8": (1, _CUT, _FP8),
    "DP2": (2, _CUT, []),
    "DP2, gradients in bf16": (2, _CUT, _BF16),
    "PP2": (2, _CUT, _PP),
    "PP2, ahead": (2, _CUT, [*_PP, *_AHEAD]),
    "TP2+SP": (2, _CUT, _TP),
    "TP2+SP, two rows at a time": (2, _CUT, _TP + _TWO_ROWS),
    "CP2, rows of 32,768": (2, _CUT, ["parallel.context=2", "train.seq_len=32768"]),
    "ZeRO-1 DP2": (2, _CUT, _ZERO[1]),
    "ZeRO-3 DP2": (2, _CUT, _ZERO[3]),
    "ZeRO-3 DP2, no bucket": (2, _CUT, _ZERO[3] + _NO_BUCKET),
    "ZeRO-3 DP2, no bucket, prefetching": (2, _CUT, _ZERO[3] + _NO_BUCKET + _PREFETCH),
    "ZeRO-3 DP2, no bucket, weights kept": (2, _CUT, _ZERO[3] + _NO_BUCKET + _KEPT),
    "one GPU, two rows at a time": (1, _CUT, _TWO_ROWS),
    "ZeRO-1 DP2, two rows at a time": (2, _CUT, _ZERO[1] + _TWO_ROWS),
    "ZeRO-3 DP2, two rows at a time": (2, _CUT, _ZERO[3] + _TWO_ROWS),
    "3B DP2": (2, "3b.yaml", ["train.micro_batch_size=1"]),  # of two, 82 GiB
    "3B, rows of 8,192, recompute DP2": (2, _3B, ["train.recompute=true"]),
    "DP4": (4, _CUT, []),
    "DP4, gradients in bf16": (4, _CUT, _BF16),
    "TP2+SP DP2": (4, _CUT, _TP),
    "TP2+SP PP2": (4, _CUT, _TP + _PP),
    "PP2 DP2": (4, _CUT, _PP),
    "PP2 DP2, ahead": (4, _CUT, [*_PP, *_AHEAD]),
    "PP2xVPP2 DP2": (4, _CUT, [*_PP, "parallel.virtual_pipeline=2"]),
    "TP4+SP": (4, _CUT, _TP4),
    "ZeRO-1 DP4": (4, _CUT, _ZERO[1]),
    "ZeRO-3 DP4": (4, _CUT, _ZERO[3]),
    "3B DP4": (4, "3b.yaml", []),
    "3B TP2+SP DP2": (4, "3b.yaml", _TP),
    "7B TP2+SP PP2": (4, _7B, _TP + _PP),
    "7B TP2+SP PP2, ahead": (4, _7B, [*_TP, *_PP, *_AHEAD]),
    "7B TP2+SP PP2, ahead, two rows at a time": (4, _7B, [*_TP, *_PP, *_AHEAD, *_TWO_ROWS]),
    "7B TP2+SP PP2, ahead, two rows at a time, FP8": (4, _7B, [*_TP, *_PP, *_AHEAD, *_TWO_ROWS, *_FP8]),
    "7B TP4+SP": (4, _7B, _TP4),
    "DP8": (8, _CUT, []),
    "TP2+SP PP2 DP2": (8, _CUT, _TP + _PP),
    "3B DP8": (8, "3b.yaml", []),
    "7B TP2+SP PP2 DP2": (8, _7B, _TP + _PP),
    "7B TP4+SP DP2": (8, _7B, _TP4),
}
BEFORE = ", before"  # behind the name of a layout that another checkout runs


@dataclasses.dataclass
class Measured:
    """One layout's figures; None where the run did not get so far."""

    gpus: int
    work: str  # what rows it trains: layouts with the same one can be compared loss by loss
    predicted: Prediction
    tokens_per_s: float | None = None  # a GPU
    mfu: float | None = None
    first_step_s: float | None = None  # since the process began
    first_alone_s: float | None = None  # since the model was there
    peak_gib: float | None = None
    counted: int = 0  # steps
    losses: list[float] = dataclasses.field(default_factory=list)
    failed: str = ""  # how it ended


class Run:
    """A layout's pretrain.py, started on some of the machine's GPUs."""

    def __init__(self, name: str, args: argparse.Namespace, gpus: list[str], folder: Path):
        self.name, self.devices, self.folder = name, gpus, folder
        self.measured = Measured(layout(name)[0], *planned(name, args))
        overrides = [*overrides_of(name, args), f"run.dir={folder}", f"run.ranks={len(gpus)}"]
        pretrain = args.before / "pretrain/pretrain.py" if name.endswith(BEFORE) else args.pretrain
        command = [sys.executable, str(pretrain), "--config", str(config_of(name)), *overrides]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "PYTHONPATH": os.pathsep.join([str(pretrain.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        folder.mkdir(parents=True)
        self.begun = time.perf_counter()
        with open(folder / "output", "w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def poll(self, limit: float) -> bool:
        """Whether it is over; it is stopped after `limit` seconds."""
        metrics, seconds = self.folder / METRICS, time.perf_counter() - self.begun
        if self.measured.first_step_s is None and metrics.is_file() and metrics.stat().st_size:
            self.measured.first_step_s = seconds
        if self.process.poll() is None and seconds < limit:
            return False
        if self.process.poll() is None:
            self.process.kill()  # its ranks die with it
            self.measured.failed = f"stopped after {limit:.0f} s"
        elif self.process.returncode:
            last = (self.folder / "output").read_text().strip().splitlines()[-30:]
            self.measured.failed = "\n".join(last)
        self.process.wait()
        read(metrics, self.measured)
        return True


def read(metrics: Path, got: Measured) -> None:
    """Fill in what a run has logged so far, be it less than was asked for, or a line only half written."""
    steps, _ = read_metrics(metrics)
    counted = steps[WARM:] or steps[1:]
    got.losses, got.counted = [step["loss"] for step in steps], len(counted)
    if steps:
        got.first_alone_s = steps[0]["tokens"] / steps[0]["tokens_per_s"]
    if counted:
        got.tokens_per_s = statistics.median(step["tokens_per_s"] for step in counted) / got.gpus
        if counted[0]["mfu"] is not None:
            got.mfu = statistics.median(step["mfu"] for step in counted)
        got.peak_gib = steps[-1].get("peak_gib")


def layout(name: str) -> tuple[int, str, list[str]]:
    return LAYOUTS[name.removesuffix(BEFORE)]


def folder_of(name: str, among: Path) -> Path:
    return among / re.sub(r"\W+", "_", name)


def config_of(name: str) -> Path:
    return ROOT / "pretrain/configs" / layout(name)[1]


def overrides_of(name: str, args: argparse.Namespace) -> list[str]:
    _, config, own = layout(name)
    positions = args.micro_batches * 4096 * args.gpus * (2 if config == _3B else 1)  # whose rows are twice as long
    return [
        f"model.dualtoken={args.inputs}/dualtoken", f"model.text_tokenizer={args.inputs}/text_tokenizer",
        f"data.sets=[{args.inputs}/shards]", f"train.global_batch_tokens={positions}", f"train.steps={args.steps}",
        "train.warmup_steps=2", "checkpoint.every=null", "run.wandb=disabled", "parallel.layout=given", *own, *args.set,
    ]  # fmt: skip


def planned(name: str, args: argparse.Namespace) -> tuple[str, Prediction]:
    """What rows a layout trains, and what the plan says of it on this machine's GPUs."""
    gpus, config, _ = layout(name)
    run = load_config(PretrainConfig, config_of(name), [*overrides_of(name, args), "run.dir=unused"])
    sizes, inputs = topology(run, gpus), setup.read_inputs(run)
    predicted = predict(run, sizes, inputs.vocabulary, inputs.traffic, rates_of(args.gpu))
    return f"{config} in rows of {run.train.seq_len}", predicted


def beside(measured: float | None, predicted: float | None, form: str) -> str:
    shown = "-" if measured is None else format(measured, form)
    return shown if predicted is None else f"{shown} ({predicted:{form}})"


def row(name: str, got: Measured, results: dict[str, Measured]) -> str:
    first, plan = next(iter(results.values())), got.predicted
    share = got.tokens_per_s / first.tokens_per_s if got.tokens_per_s and first.tokens_per_s else None
    expected = plan.tokens_per_s / first.predicted.tokens_per_s
    reference = next(other.losses for other in results.values() if other.work == got.work)
    differences = [abs(a - b) / b for a, b in zip(got.losses, reference, strict=False)]
    started = ", ".join(beside(seconds, None, ".0f") for seconds in (got.first_alone_s, got.first_step_s))
    cells = [
        name, str(got.gpus), beside(got.tokens_per_s, plan.tokens_per_s, ",.0f"), beside(share, expected, ".1%"),
        beside(got.mfu, plan.mfu, ".3f"), started,
        beside(got.peak_gib, plan.peak_gib, ".1f"), f"{max(differences):.1e}" if differences else "-", str(got.counted),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, Measured]) -> str:
    heads = (
        "layout",
        "GPUs",
        "tokens/s a GPU",
        "of the first",
        "MFU",
        "first step, in all, s",
        "peak GiB",
        "loss differs by",
    )
    heads += ("steps counted",)
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    lines += [row(name, got, results) for name, got in results.items()]
    return "\n".join(lines)


def stored(path: Path) -> dict[str, Measured]:
    """What was measured before, with what was predicted then."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {name: Measured(**got | {"predicted": Prediction(**got["predicted"])}) for name, got in found.items()}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Measured]:
    """Run all layouts, each on GPUs of its own; prints and stores each as it ends."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    free = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    results = stored(args.output) if args.output else {}
    waiting, running = [name for name in args.only if name not in results or results[name].failed], []
    while waiting or running:
        fits = next((name for name in waiting if layout(name)[0] <= len(free) and not (args.alone and running)), None)
        if fits:
            waiting.remove(fits)
            own, free = free[: layout(fits)[0]], free[layout(fits)[0] :]
            running.append(Run(fits, args, own, folder_of(fits, folder)))
            continue
        time.sleep(0.2)
        for run in [run for run in running if run.poll(args.limit)]:
            running.remove(run)
            free += run.devices
            results[run.name] = run.measured
            results = {name: results[name] for each in LAYOUTS for name in (each, each + BEFORE) if name in results}
            seconds = time.perf_counter() - run.begun
            print(f"{row(run.name, run.measured, results)} {seconds:.0f} s {run.measured.failed}", flush=True)
            if args.output:  # as far as it got, should it be stopped
                kept = {name: dataclasses.asdict(got) for name, got in results.items() if not got.failed or got.counted}
                args.output.write_text(json.dumps(kept, indent=1))
    return results


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS), metavar="LAYOUT", help="default: all that fit")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batches", type=int, default=8, help="rows of 4,096 a GPU and step")
    parser.add_argument("--inputs", type=Path, help="made before by megadual.synthetic.inputs; else made for this")
    parser.add_argument("--pretrain", type=Path, default=ROOT / "pretrain/pretrain.py", help="another checkout's")
    parser.add_argument("--before", type=Path, help="another checkout, with which each layout is run too")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a layout is stopped")
    parser.add_argument("--alone", action="store_true", help="one layout at a time, also where GPUs are left free")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every run, as run.profile=[9,9]")
    parser.add_argument("--keep", type=Path, help="folder for the runs' folders and what they print; default: none")
    parser.add_argument("--read", action="store_true", help="run nothing, read what is in --keep")
    parser.add_argument("--dry-run", action="store_true", help="the plan's predictions alone")
    parser.add_argument("--gpus", type=int, help="of the machine; default: those that are here")
    parser.add_argument("--gpu", help="type of GPU to predict for, as in megadual/engine/rates.yaml; default: this one")
    parser.add_argument("--output", type=Path, help="JSON of everything measured, kept up while it runs")
    args = parser.parse_args()
    args.gpus = args.gpus or torch.cuda.device_count()
    args.only = args.only or [name for name, (gpus, *_) in LAYOUTS.items() if gpus <= args.gpus]
    args.pretrain = args.pretrain.absolute()
    if args.before:
        args.before = args.before.absolute()
        args.only = [name for each in args.only for name in (each, each + BEFORE)]
    if args.read and not args.keep:
        raise UserError("--read reads the folders of runs: give --keep DIR, in which they are")
    if not (args.dry_run or args.read) and torch.cuda.device_count() < max(layout(name)[0] for name in args.only):
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs; --dry-run --gpus N only predicts")

    with tempfile.TemporaryDirectory() as folder:
        if args.inputs is None:
            args.inputs = Path(folder) / "inputs"
            subprocess.run([sys.executable, "-m", "megadual.synthetic.inputs", "--output", args.inputs], check=True)
        if args.dry_run or args.read:
            results = {name: Measured(layout(name)[0], *planned(name, args)) for name in args.only}
            for name, got in results.items() if args.read else ():
                read(folder_of(name, args.keep) / METRICS, got)
        else:
            results = measure(args, args.keep or Path(folder))
    print(table(results))
    sys.exit(any(got.failed for got in results.values()))


if __name__ == "__main__":
    main()
