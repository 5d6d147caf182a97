"""The scenes recipe in many variants on the same shards, several GPUs at a time: tables and figures of docs/scenes.md.

    python -m megadual.demo.scenes                                     # first: corpus, tokenizers, shards, one model
    python benchmarks/scenes.py claim --seeds 3                        # one kind of codes against both
    python benchmarks/scenes.py sizes                                  # how the loss falls with the LLM's size
    python benchmarks/scenes.py optimizers --seeds 3                   # Muon and AdamW, as many rates of each
    python benchmarks/scenes.py sampling --model runs/scenes/hf        # guidance, temperature, top-k, top-p

Every variant has the same steps (--steps) and positions. Trainings that are done are reused; an interrupted call goes
on when it is repeated. Prints a table and writes it, and a figure where there is one, to --output.
"""

import argparse
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
from tqdm import tqdm  # noqa: E402

from megadual.demo.scenes import CORPUS, DETECTOR, RUN  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402
from megadual.run.step_log import METRICS, read_metrics  # noqa: E402

LAST = 100  # steps whose mean is a run's final loss
LOSSES = ("loss_text", "loss_semantic", "loss_pixel")


@dataclass
class Job:
    """A command of Python's."""

    name: str
    arguments: list[str]


def run_jobs(jobs: list[Job], gpus: int, logs: Path) -> None:
    """All jobs, `gpus` at a time, each with a GPU of its own; UserError with the end of the log of one that fails."""
    logs.mkdir(parents=True, exist_ok=True)
    free: queue.Queue[int] = queue.Queue()
    for gpu in range(gpus):
        free.put(gpu)

    def run(job: Job) -> str | None:
        gpu, log = free.get(), logs / f"{job.name}.log"
        try:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.is_available() else {})
            with log.open("w") as file:
                code = subprocess.run([sys.executable, *job.arguments], stdout=file, stderr=file, env=environment)
        finally:
            free.put(gpu)
        return f"'{job.name}' failed, see {log}: {log.read_text()[-1500:]}" if code.returncode else None

    with ThreadPoolExecutor(gpus) as pool:
        running = [pool.submit(run, job) for job in jobs]
        for done in tqdm(as_completed(running), total=len(running), desc="runs", unit="run", mininterval=1):
            if done.result():
                pool.shutdown(cancel_futures=True)
                raise UserError(done.result())


def train(variants: dict[str, list[str]], args: argparse.Namespace) -> dict[str, dict]:
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
    run_jobs(jobs, args.gpus, args.output / "logs")
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


def claim(args: argparse.Namespace) -> str:
    """The paper's claim that two kinds of codes are better than either alone."""
    kinds = {"both": None, "semantic": "semantic", "pixel": "pixel"}
    variants = {
        f"claim-{kind}-{seed}": [f"train.seed={seed}", *([f"model.streams=[{alone}]"] if alone else [])]
        for seed in range(args.seeds)
        for kind, alone in kinds.items()
    }
    groups = {kind: [f"claim-{kind}-{seed}" for seed in range(args.seeds)] for kind in kinds}
    return scores_of(groups, train(variants, args))


def sizes(args: argparse.Namespace) -> str:
    """Final losses of LLMs of several sizes."""
    shapes = {  # layers, hidden, ffn, heads, KV heads; of the visual heads: width, layers, heads, ffn
        "small": (6, 256, 768, 4, 2, 160, 2, 5, 480),
        "middle": (9, 384, 1152, 6, 3, 256, 2, 4, 768),
        "recipe": (12, 512, 1536, 8, 4, 320, 3, 5, 960),
        "large": (16, 768, 2304, 12, 4, 448, 3, 7, 1344),
    }
    keys = ("layers", "hidden", "ffn", "heads", "kv_heads", "head.width", "head.layers", "head.heads", "head.ffn")
    variants = {
        f"size-{name}": [f"model.{key}={value}" for key, value in zip(keys, shapes[name], strict=True)]
        for name in args.sizes
    }
    results = train(variants, args)
    figure, axes = plt.subplots(1, len(LOSSES), figsize=(4 * len(LOSSES), 3.2), layout="constrained")
    for axis, loss in zip(axes, LOSSES, strict=True):
        flops = [results[name]["flops"] for name in variants]
        axis.plot(flops, [results[name]["final"][loss] for name in variants], "o-", color="black")
        for name, x in zip(variants, flops, strict=True):
            axis.annotate(name.removeprefix("size-"), (x, results[name]["final"][loss]), fontsize=8)
        axis.set(
            xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="nats", title=loss.removeprefix("loss_")
        )
    figure.savefig(args.output / "sizes.png", dpi=110)
    return scores_of({name: [name] for name in variants}, results)


def optimizers(args: argparse.Namespace) -> str:
    """AdamW and Muon at as many rates each; then each one's best rate with other seeds."""
    rates = {"adamw": args.adamw, "muon": args.muon}

    def named(optimizer: str, rate: float, seed: int) -> tuple[str, list[str]]:
        overrides = [f"train.optimizer={optimizer}", f"train.lr={rate}", f"train.seed={seed}"]
        return f"{optimizer}-{rate:g}-{seed}", overrides

    def final(run: dict) -> float:
        return sum(run["final"].values())

    tried = dict(named(optimizer, rate, 0) for optimizer, of in rates.items() for rate in of)
    results = train(tried, args)
    best = {
        optimizer: min(of, key=lambda rate, optimizer=optimizer: final(results[named(optimizer, rate, 0)[0]]))
        for optimizer, of in rates.items()
    }
    seeds = dict(named(optimizer, rate, seed) for seed in range(1, args.seeds) for optimizer, rate in best.items())
    results |= train(seeds, args)
    groups = {name: [name] for name in tried}
    lines = []
    for seed in range(args.seeds):
        adamw, muon = (results[named(optimizer, rate, seed)[0]] for optimizer, rate in best.items())
        reached = steps_to(muon["curve"], final(adamw))
        after = f"after {reached} of" if reached else "not in"
        lines.append(f"seed {seed}: Muon reaches AdamW's final loss {after} {args.steps} steps")
    for optimizer, rate in best.items():
        groups[f"{optimizer} {rate:g}, all seeds"] = [named(optimizer, rate, seed)[0] for seed in range(args.seeds)]
    return scores_of(groups, results) + "\n" + "\n".join(lines) + "\n"


def steps_to(curve: list[tuple], loss: float) -> int | None:
    """The first step at whose end the mean of the last LAST total losses is no more than `loss`."""
    totals = [sum(value for value in losses if value is not None) for _, *losses in curve]
    for end in range(LAST, len(totals) + 1):
        if statistics.mean(totals[end - LAST : end]) <= loss:
            return curve[end - 1][0]
    return None


def sampling(args: argparse.Namespace) -> str:
    """Drawings and edits at several guidances and temperatures, and with fewer codes to draw from."""
    settings = [(scale, temperature, 900, 0.96) for scale in (1, 2, 3, 5) for temperature in (0.3, 0.5, 0.7, 1.0)]
    settings += [(2, 0.7, 50, 0.96), (2, 0.7, 900, 0.8), (2, 1.0, 50, 0.96), (2, 1.0, 900, 0.8)]
    jobs = []
    for scale, temperature, top_k, top_p in settings:
        name = f"cfg{scale}-t{temperature}-k{top_k}-p{top_p}"
        folder = args.output / name
        options = f"--cfg-scale {scale} --temperature {temperature} --top-k {top_k} --top-p {top_p}"
        arguments = (
            f"-m megadual.evaluate scenes --model {args.model} --detector {DETECTOR} --corpus {CORPUS} "
            f"--output {folder} --tasks draw edit --scenes {args.scenes} {options}"
        )
        jobs.append(Job(name, shlex.split(arguments)))
    run_jobs(jobs, args.gpus, args.output / "logs")
    found = {
        setting: json.loads((args.output / job.name / "scenes.json").read_text())["summary"]
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
    figure.savefig(args.output / "sampling.png", dpi=110)
    rows = [
        [*map(str, setting), *(spread([scores[task]]) for task in ("drawn", "edited"))]
        for setting, scores in found.items()
    ]
    return table(["guidance", "temperature", "top-k", "top-p", "drawn, %", "edited, %"], rows)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds: dict[str, Callable[[argparse.Namespace], str]] = {
        "claim": claim, "sizes": sizes, "optimizers": optimizers, "sampling": sampling,
    }  # fmt: skip
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of llm.yaml, for all variants")
    parser.add_argument("--output", type=Path, help="default: runs/scenes/KIND")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1, help="jobs at a time, one on each")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="as the stages before were run with")
    parser.add_argument("--steps", type=int, default=2500, help="of each variant")
    parser.add_argument("--scenes", type=int, default=200, help="held-out samples of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["small", "middle", "recipe"])
    parser.add_argument("--adamw", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3], metavar="RATE")
    parser.add_argument("--muon", nargs="+", type=float, default=[1.2e-3, 2.5e-3, 5e-3], metavar="RATE")
    parser.add_argument("--model", type=Path, default=RUN / "hf", help="exported folder, for sampling")
    args = parser.parse_intermixed_args(argv)
    args.output = args.output or RUN / args.kind
    args.output.mkdir(parents=True, exist_ok=True)
    report = kinds[args.kind](args)
    (args.output / "table.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
