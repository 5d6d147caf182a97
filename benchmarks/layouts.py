"""Train a tiny model under every layout and compare it with one process, step by step.

python benchmarks/layouts.py [--only TP2 PP2 ...] [--precision fp32 bf16] [--output layouts.json]

Four layers, the real data path, gloo processes on this machine's CPU. Prints a Markdown table: over the steps, the
largest difference of the total's or a stream's loss and, relative, of the gradient norm. Ends with 1 where one is
larger than the tolerance (1e-5 in fp32, 3e-3 in bf16). With --output, layouts that the file holds are not run again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--precision", nargs="*", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON of all differences, kept up while it runs")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {}
    to_do = [(name, p) for p in args.precision for name in args.only if p not in results.get(name, {})]

    with tempfile.TemporaryDirectory() as folder:
        shards = tiny.write_tiny_set(Path(folder) / "set")

        def train(processes: int, precision: str, overrides: list[str]) -> list[dict]:
            run = tiny.tiny_run(
                Path(folder), shards, f"train.steps={args.steps}", f"train.precision={precision}", *overrides
            )
            return run_distributed(tiny.losses, processes, run, timeout_s=600)[0]

        expected = {precision: train(1, precision, []) for precision in {p for _, p in to_do}}
        for name, precision in tqdm(to_do, unit="layout", mininterval=1 if sys.stderr.isatty() else 10):
            begun = time.perf_counter()
            got = train(LAYOUTS[name][0], precision, LAYOUTS[name][1])
            result = results.setdefault(name, {"seconds": 0.0})
            result[precision] = differences(got, expected[precision])
            result["seconds"] = max(result["seconds"], time.perf_counter() - begun)
            if args.output:
                args.output.write_text(json.dumps(results, indent=1))

    print(f"megatron-core {version('megatron-core')}, deepspeed {version('deepspeed')}, {args.steps} steps")
    print(table({name: results[name] for name in args.only}, args.precision))
    wrong = [(name, p) for name in args.only for p in args.precision if max(results[name][p]) > TOLERANCE[p]]
    for name, precision in wrong:
        print(f"{name} in {precision} differs by more than {TOLERANCE[precision]}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
