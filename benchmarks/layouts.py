"""Train a tiny model under every layout and compare it with one process, step by step.

python benchmarks/layouts.py [--only TP2 PP2 ...] [--precision fp32 bf16] [--optimizer muon] [--device cuda]
    [--output layouts.json]

Four layers, the real data path, gloo processes on this machine's CPU, or NCCL with a GPU for each process. Prints a
Markdown table: over the steps, the largest difference of the total's or a stream's loss and, relative, of the gradient
norm. Ends with 1 where one is larger than the tolerance (1e-5 in fp32, 3e-3 in bf16). With --output, layouts that the
file holds are not run again.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from megadual.errors import command
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.layouts import LAYOUTS, TOLERANCE, differences


def table(results: dict[str, dict], precisions: list[str]) -> str:
    heads = [f"{p}: loss | {p}: gradient norm" for p in precisions]
    lines = [f"| layout | processes | {' | '.join(heads)} | s |", "| --- " * (3 + 2 * len(precisions)) + "|"]
    for name, result in results.items():
        shown = [f"{x:.1e}" for p in precisions for x in result.get(p, ())]
        if len(shown) == 2 * len(precisions):
            lines.append(f"| {name} | {LAYOUTS[name][0]} | {' | '.join(shown)} | {result['seconds']:.0f} |")
    return "\n".join(lines)


def batches(to_do: list[tuple[str, str]], together: bool) -> list[list[tuple[str, str]]]:
    """What runs in the same processes: one layout and precision, or all of one world size and engine."""
    if not together:
        return [[one] for one in to_do]
    kind = lambda one: (LAYOUTS[one[0]][0], "DeepSpeed" in one[0])
    return [list(some) for _, some in itertools.groupby(sorted(to_do, key=kind), kind)]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=list(LAYOUTS),
        metavar="LAYOUT",
        help="default: all, on GPUs those that have enough",
    )
    parser.add_argument("--precision", nargs="*", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: under the megatron engine's layouts"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON of one optimizer's differences, kept up while it runs")
    args = parser.parse_args()
    gpus = args.device == "cuda"
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    most = torch.cuda.device_count() if gpus else max(processes for processes, _ in LAYOUTS.values())
    takes_all = args.optimizer == "adamw"
    names = args.only or [
        name for name, (processes, _) in LAYOUTS.items() if processes <= most and (takes_all or "DeepSpeed" not in name)
    ]
    results = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {}
    to_do = [(name, p) for name in names for p in args.precision if p not in results.get(name, {})]

    with tempfile.TemporaryDirectory() as folder:
        shards = tiny.write_tiny_set(Path(folder) / "set", conversations=100)

        def train(processes: int, runs: list[tuple[str, list[str]]]) -> list[list[dict]]:
            configs = [
                tiny.tiny_run(
                    Path(folder),
                    shards,
                    f"train.steps={args.steps}",
                    f"train.precision={precision}",
                    f"train.optimizer={args.optimizer}",
                    *overrides,
                )  # fmt: skip
                for precision, overrides in runs
            ]
            backend = "nccl" if gpus else "gloo"
            return run_distributed(tiny.losses_of, processes, configs, timeout_s=600, backend=backend)[0]

        expected = dict(zip(args.precision, train(1, [(p, []) for p in args.precision]), strict=True))
        for some in tqdm(batches(to_do, together=gpus), unit="start", mininterval=1 if sys.stderr.isatty() else 10):
            begun = time.perf_counter()
            runs = train(LAYOUTS[some[0][0]][0], [(precision, LAYOUTS[name][1]) for name, precision in some])
            seconds = (time.perf_counter() - begun) / len(some)
            for (name, precision), got in zip(some, runs, strict=True):
                result = results.setdefault(name, {"seconds": 0.0})
                result[precision] = differences(got, expected[precision])
                result["seconds"] = max(result["seconds"], seconds)
            if args.output:
                args.output.write_text(json.dumps(results, indent=1))

    where = torch.cuda.get_device_name() if gpus else "CPU"
    print(f"{where}, megatron-core {version('megatron-core')}, deepspeed {version('deepspeed')}, {args.steps} steps")
    print(table({name: results[name] for name in names}, args.precision))
    wrong = [(name, p) for name in names for p in args.precision if max(results[name][p]) > TOLERANCE[p]]
    for name, precision in wrong:
        print(f"{name} in {precision} differs by more than {TOLERANCE[precision]}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
