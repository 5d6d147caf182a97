"""The scenes recipe in many variants on the same shards, several GPUs at a time: tables and figures of docs/scenes.md.

    python -m megadual.demo.scenes                                     # first: corpus, tokenizers, shards, one model
    python benchmarks/scenes.py claim fp8 sizes --seeds 3
    python benchmarks/scenes.py optimizers --seeds 3
    python benchmarks/scenes.py sampling --model runs/scenes/hf

claim: one kind of codes against both; fp8: its losses and scores beside bf16's; sizes: how the loss falls with the
LLM's size; optimizers: Muon and AdamW, as many rates of each; sampling: guidance, temperature, top-k, top-p.

Every variant has the same steps (--steps) and positions. Trainings that are done are reused; an interrupted call goes
on when it is repeated. Prints a table of each kind and writes it, and a figure where there is one, to --output/KIND.
"""

import argparse
import itertools
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.ticker import FormatStrFormatter, NullFormatter  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megadual.demo.scenes import CONFIG, CORPUS, DETECTOR, RUN  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402
from megadual.run.step_log import METRICS, read_metrics  # noqa: E402

LAST = 100  # steps whose mean is a run's final loss
LOSSES = ("loss_text", "loss_semantic", "loss_pixel")
Variants = dict[str, list[str]]  # what each overrides
Results = dict[str, dict]
ROOT = Path(__file__).parents[1]


@dataclass
class Job:
    """A command of Python's."""

    name: str
    arguments: list[str]


def run_jobs(jobs: list[Job], args: argparse.Namespace) -> None:
    """All jobs, --each at a time on each of --gpus; at their end UserError with the ends of the logs of failed ones."""
    logs = args.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (visible.split(",") if visible else [str(each) for each in range(args.gpus)])[: args.gpus]
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus * args.each:
        free.put(gpu)

    def run(job: Job) -> str | None:
        gpu, log = free.get(), logs / f"{job.name}.log"
        try:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if torch.cuda.is_available() else {})
            with log.open("w") as file:
                code = subprocess.run([sys.executable, *job.arguments], stdout=file, stderr=file, env=environment)
        finally:
            free.put(gpu)
        return f"'{job.name}' failed, see {log}: {log.read_text()[-1500:]}" if code.returncode else None

    with ThreadPoolExecutor(len(gpus) * args.each) as pool:
        running = [pool.submit(run, job) for job in jobs]
        done = tqdm(as_completed(running), total=len(running), desc="runs", unit="run", mininterval=1)
        failed = [failure for failure in (each.result() for each in done) if failure]
    if failed:
        raise UserError("\n".join(failed))


def train(variants: Variants, args: argparse.Namespace) -> Results:
    """Train and score LLMs with these overrides; of each its final losses, curve, FLOPs and scores."""
    jobs = [
        Job(
            name,
            [
                *("-m", "megadual.demo.scenes", "--variant", name, "--scenes", str(args.scenes)),
                *("--workers", str(args.workers), f"train.steps={args.steps}", *args.overrides, *overrides),
            ],
        )
        for name, overrides in variants.items()
    ]
    run_jobs(jobs, args)
    return {name: result(RUN / name) for name in variants}


def result(run: Path) -> dict:
    steps, _ = read_metrics(run / "pretrain" / METRICS)
    final = {name: statistics.mean(step[name] for step in steps[-LAST:]) for name in LOSSES if name in steps[-1]}
    return {
        "final": final,
        "curve": [(step["step"], *(step.get(name) for name in LOSSES)) for step in steps],
        "summary": json.loads((run / "scenes/scenes.json").read_text())["summary"],
        "flops": sum(step["flops"] for step in steps),
    }


def spread(values: list[float | None], digits: int = 1, scale: float = 100) -> str:
    """Mean and standard deviation over seeds."""
    there = [scale * value for value in values if value is not None]
    if not there:
        return "–"
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.{digits}f}{deviation}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


SCORES = {"described": "described, all right", "answered": "answered", "drawn": "drawn", "edited": "edited"}


def score_rows(groups: dict[str, list[dict]]) -> list[list[str]]:
    """A row of each group of runs that differ in their seed: scores in %, and final losses in nats."""
    return [
        [
            name,
            *(spread([run["summary"].get(score) for run in runs]) for score in SCORES),
            *(spread([run["final"].get(loss) for run in runs], 3, 1) for loss in LOSSES),
        ]
        for name, runs in groups.items()
    ]


def scores_of(groups: dict[str, list[str]], results: dict[str, dict]) -> str:
    rows = score_rows({name: [results[each] for each in members] for name, members in groups.items()})
    return table(["", *(f"{about}, %" for about in SCORES.values()), "text", "semantic code", "pixel code"], rows)


def seeded(name: str, args: argparse.Namespace, *overrides: str) -> Variants:
    """A variant of each seed."""
    return {f"{name}-{seed}": [f"train.seed={seed}", *overrides] for seed in range(args.seeds)}


CODES = {"both": (), "semantic": ("model.streams=[semantic]",), "pixel": ("model.streams=[pixel]",)}


def claim_variants(args: argparse.Namespace) -> Variants:
    return {name: of for codes, what in CODES.items() for name, of in seeded(codes, args, *what).items()}


def claim(args: argparse.Namespace, results: Results) -> str:
    """The paper's claim that two kinds of codes are better than either alone."""
    return scores_of({codes: list(seeded(codes, args)) for codes in CODES}, results)


def totals(run: dict) -> list[float]:
    """Of each step, its losses of all streams together."""
    return [sum(value for value in losses if value is not None) for _, *losses in run["curve"]]


def smoothed(run: dict) -> list[float]:
    """Mean total losses of LAST steps at a time."""
    losses = totals(run)
    return [statistics.mean(losses[at : at + LAST]) for at in range(0, len(losses) - LAST + 1, LAST)]


def draw_curves(groups: dict[str, list[dict]], path: Path) -> None:
    """Total losses over steps, one line a run, one colour a group."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for color, (label, runs) in enumerate(groups.items()):
        for number, run in enumerate(runs):
            shown = [statistics.mean(totals(run)[max(at - 20, 0) : at + 1]) for at in range(len(run["curve"]))]
            steps = [step for step, *_ in run["curve"]]
            axes.plot(steps, shown, color=f"C{color}", lw=0.9, label=None if number else label)
    axes.set(ylim=(0, None), xlabel="steps", ylabel="losses of all streams, nats")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fp8_variants(args: argparse.Namespace) -> Variants:
    return seeded("both", args) | seeded("fp8", args, "train.fp8=true")


def fp8(args: argparse.Namespace, results: Results) -> str:
    """Scores, and how far a seed's losses in FP8 are from its bf16's, beside how far two seeds are from each other."""

    def apart(first: str, second: str) -> float:
        """The largest relative difference of two runs' mean losses of LAST steps, after the first LAST."""
        pairs = list(zip(smoothed(results[first]), smoothed(results[second]), strict=True))[1:]
        return max((abs(b / a - 1) for a, b in pairs), default=0.0)

    bf16, in_fp8 = list(seeded("both", args)), list(seeded("fp8", args))
    lines = [f"{b} beside {a}: losses at most {apart(a, b):.2%} apart" for a, b in zip(bf16, in_fp8, strict=True)]
    lines += [f"{b} beside {a}: {apart(a, b):.2%}" for a, b in itertools.combinations(bf16, 2)]
    return scores_of({"bf16": bf16, "FP8": in_fp8}, results) + "\n" + "\n".join(lines) + "\n"


SIZES = {  # layers, hidden, ffn, heads, KV heads; of the visual heads: width, layers, heads, ffn; "recipe": llm.yaml's
    "small": (6, 256, 768, 4, 2, 160, 2, 5, 480),
    "middle": (9, 384, 1152, 6, 3, 256, 2, 4, 768),
    "recipe": (),
    "large": (16, 768, 2304, 12, 4, 448, 3, 7, 1344),
}
SIZE_KEYS = ("layers", "hidden", "ffn", "heads", "kv_heads", "head.width", "head.layers", "head.heads", "head.ffn")


def size_variants(args: argparse.Namespace) -> Variants:
    return {
        f"size-{name}" if SIZES[name] else "both-0": [
            "train.seed=0",
            *(f"model.{key}={value}" for key, value in zip(SIZE_KEYS, SIZES[name], strict=False)),
        ]
        for name in args.sizes
    }


def sizes(args: argparse.Namespace, results: Results) -> str:
    """Final losses of LLMs of several sizes."""
    variants = size_variants(args)
    flops = [results[name]["flops"] for name in variants]
    figure, axes = plt.subplots(1, len(LOSSES), figsize=(4 * len(LOSSES), 3.2), layout="constrained")
    for axis, loss in zip(axes, LOSSES, strict=True):
        nats = [results[name]["final"][loss] for name in variants]
        axis.plot(flops, nats, "o-", color="black")
        for name, at in zip(variants, zip(flops, nats, strict=True), strict=True):
            label = name.partition("size-")[2] or "recipe"
            axis.annotate(label, at, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.set(
            xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="nats", title=loss.removeprefix("loss_")
        )
        axis.margins(0.15)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    figure.savefig(folder_of("sizes", args) / "sizes.png", dpi=110)
    return scores_of({name: [name] for name in variants}, results)


def with_optimizer(name: str, rate: float, seed: int) -> Variants:
    recipe = OmegaConf.load(ROOT / CONFIG)
    if (name, rate) == (recipe.train.optimizer, recipe.train.lr):
        return {f"both-{seed}": [f"train.seed={seed}"]}  # which other kinds train too
    return {f"{name}-{rate:g}-{seed}": [f"train.optimizer={name}", f"train.lr={rate}", f"train.seed={seed}"]}


def optimizer_variants(args: argparse.Namespace) -> Variants:
    """Every rate with one seed, those in the middle, which are the likeliest, with all."""
    variants: Variants = {}
    for name, rates in (("adamw", args.adamw), ("muon", args.muon)):
        for rate in rates:
            seeds = args.seeds if rate == rates[len(rates) // 2] else 1
            for seed in range(seeds):
                variants |= with_optimizer(name, rate, seed)
    return variants


def optimizers(args: argparse.Namespace, results: Results) -> str:
    """AdamW and Muon at as many rates each; then each one's best rate with other seeds."""

    def final(run: str) -> float:
        return sum(results[run]["final"].values())

    def named(optimizer: str, seed: int) -> str:
        return next(iter(with_optimizer(optimizer, best[optimizer], seed)))

    def best_of(optimizer: str, rates: list[float]) -> float:
        return min(rates, key=lambda rate: final(next(iter(with_optimizer(optimizer, rate, 0)))))

    best = {"adamw": best_of("adamw", args.adamw), "muon": best_of("muon", args.muon)}
    seeds: Variants = {}
    for seed in range(1, args.seeds):
        for optimizer, rate in best.items():
            seeds |= with_optimizer(optimizer, rate, seed)
    results |= train(seeds, args)
    groups = {
        f"{optimizer} {rate:g}": list(with_optimizer(optimizer, rate, 0))
        for optimizer, rates in (("adamw", args.adamw), ("muon", args.muon))
        for rate in rates
    }
    lines = []
    for seed in range(args.seeds):
        reached = steps_to(results[named("muon", seed)], final(named("adamw", seed)))
        after = f"after {reached} of" if reached else "not in"
        lines.append(f"seed {seed}: Muon reaches AdamW's final loss {after} {args.steps} steps")
    for optimizer, rate in best.items():
        groups[f"{optimizer} {rate:g}, all seeds"] = [named(optimizer, seed) for seed in range(args.seeds)]
    drawn = {name: [results[each] for each in runs] for name, runs in groups.items() if len(runs) == args.seeds}
    draw_curves(drawn, folder_of("optimizers", args) / "curves.png")
    return scores_of(groups, results) + "\n" + "\n".join(lines) + "\n"


def steps_to(run: dict, loss: float) -> int | None:
    """The first step at whose end the mean of the last LAST total losses is no more than `loss`."""
    losses = totals(run)
    for end in range(LAST, len(losses) + 1):
        if statistics.mean(losses[end - LAST : end]) <= loss:
            return run["curve"][end - 1][0]
    return None


def sampling(args: argparse.Namespace, _: Results) -> str:
    """Drawings and edits at several guidances and temperatures, and with fewer codes to draw from."""
    output = folder_of("sampling", args)
    settings = [(scale, temperature, 900, 0.96) for scale in (1, 2, 3, 5) for temperature in (0.3, 0.5, 0.7, 1.0)]
    settings += [(2, 0.7, 50, 0.96), (2, 0.7, 900, 0.8), (2, 1.0, 50, 0.96), (2, 1.0, 900, 0.8)]
    jobs = []
    for scale, temperature, top_k, top_p in settings:
        name = f"cfg{scale}-t{temperature}-k{top_k}-p{top_p}"
        folder = output / name
        options = f"--cfg-scale {scale} --temperature {temperature} --top-k {top_k} --top-p {top_p}"
        arguments = (
            f"-m megadual.evaluate scenes --model {args.model} --detector {DETECTOR} --corpus {CORPUS} "
            f"--output {folder} --tasks draw edit --scenes {args.scenes} {options}"
        )
        jobs.append(Job(name, shlex.split(arguments)))
    run_jobs(jobs, args)
    found = {
        setting: json.loads((output / job.name / "scenes.json").read_text())["summary"]
        for setting, job in zip(settings, jobs, strict=True)
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    for axis, task in zip(axes, ("drawn", "edited"), strict=True):
        for scale in (1, 2, 3, 5):
            of = [setting for setting in settings if setting[0] == scale and setting[2:] == (900, 0.96)]
            axis.plot([t for _, t, *_ in of], [100 * found[each][task] for each in of], "o-", label=f"guidance {scale}")
        for mark, (top_k, top_p) in (("x", (50, 0.96)), ("+", (900, 0.8))):
            of = [setting for setting in settings if setting[2:] == (top_k, top_p)]
            label = f"guidance 2, top-k {top_k}, top-p {top_p}"
            axis.plot(
                [t for _, t, *_ in of], [100 * found[each][task] for each in of], mark, color="black", label=label
            )
        axis.set(xlabel="temperature", ylabel="% right", title=task)
    axes[0].legend(fontsize=7)
    figure.savefig(output / "sampling.png", dpi=110)
    rows = [
        [*map(str, setting), *(spread([scores[task]]) for task in ("drawn", "edited"))]
        for setting, scores in found.items()
    ]
    return table(["guidance", "temperature", "top-k", "top-p", "drawn, %", "edited, %"], rows)


def no_variants(_: argparse.Namespace) -> Variants:
    return {}


KINDS: dict[str, tuple[Callable[[argparse.Namespace], Variants], Callable[[argparse.Namespace, Results], str]]] = {
    "claim": (claim_variants, claim),
    "fp8": (fp8_variants, fp8),
    "sizes": (size_variants, sizes),
    "optimizers": (optimizer_variants, optimizers),
    "sampling": (no_variants, sampling),
}


def folder_of(kind: str, args: argparse.Namespace) -> Path:
    folder: Path = args.output / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="KIND|key=value", help=f"{', '.join(KINDS)}; keys of llm.yaml")
    parser.add_argument("--output", type=Path, default=RUN / "benchmark", help="default: %(default)s")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1)
    parser.add_argument("--each", type=int, default=1, help="jobs at a time on each GPU")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="as the stages before were run with")
    parser.add_argument("--steps", type=int, default=2500, help="of each variant")
    parser.add_argument("--scenes", type=int, default=200, help="held-out samples of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["small", "middle", "recipe"], choices=SIZES)
    parser.add_argument("--adamw", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3], metavar="RATE")
    parser.add_argument("--muon", nargs="+", type=float, default=[1.2e-3, 2.5e-3, 5e-3], metavar="RATE")
    parser.add_argument("--model", type=Path, default=RUN / "hf", help="exported folder, for sampling")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [each for each in args.what if "=" in each]
    kinds = [each for each in args.what if "=" not in each]
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"{' '.join(kinds) or 'nothing'}: give one or more of {', '.join(KINDS)}")
    variants: Variants = {}
    for kind in kinds:
        variants |= KINDS[kind][0](args)
    results = train(variants, args) if variants else {}
    for kind in kinds:
        report = KINDS[kind][1](args, results)
        (folder_of(kind, args) / "table.md").write_text(report)
        print(f"{kind}\n\n{report}", flush=True)


if __name__ == "__main__":
    main()
