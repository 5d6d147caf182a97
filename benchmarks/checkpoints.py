"""Seconds for which a checkpoint holds training up, that it takes to reach the disk, and to be read again.

python benchmarks/checkpoints.py [--only "one GPU" DP2 ...] [--folder DIR]

Runs pretrain.py under layouts of benchmarks/scaling.py. The first start saves after every fourth step and is killed
once its first checkpoint is whole; the second goes on from it, with its files in the host's memory where that is large
enough, and with compiled kernels in their caches. Prints a Markdown table, in seconds: how long training waited for the
checkpoint, before the next one was due; from the checkpoint's beginning to its being whole; how long the second start
read it, with its checking; and the first step of either start, alone and since the process began.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scaling import LAYOUTS, ROOT, config_of, folder_of, overrides_of

from megadual.errors import UserError, command
from megadual.run.step_log import METRICS, read_metrics

SAVED, AFTER = 4, 2  # the step after which is saved, and how many the second start makes
HEADS = ("layout", "GPUs", "GiB", "waited", "until whole", "read", "first step", "second start's")


class Start:
    """A start of pretrain.py, in a process group of its own."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, *more: str):
        self.name, self.folder, self.limit = name, folder, args.limit
        self.positions = args.micro_batches * 4096 * args.gpus
        folder.mkdir(parents=True, exist_ok=True)
        own = [*overrides_of(name, args), f"run.dir={folder}", f"run.ranks={LAYOUTS[name][0]}", *more]
        command = [sys.executable, ROOT / "pretrain/pretrain.py", "--config", config_of(name), *own]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.begun = time.perf_counter()
        with open(folder / "output", "w") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": path}, stdout=output, stderr=output, start_new_session=True
            )

    def steps(self) -> dict[int, dict]:
        return {entry["step"]: entry for entry in read_metrics(self.folder / METRICS)[0]}

    def printed(self) -> str:
        return (self.folder / "output").read_text()

    def wait(self, until: Callable[[], object]) -> float:
        """Seconds since the start when `until()` came true; UserError with what was printed where it can't any more."""
        while not until():
            ended = self.process.poll() is not None and not until()
            if ended or time.perf_counter() - self.begun > self.limit:
                self.end()
                last = "\n".join(self.printed().strip().splitlines()[-30:])
                fate = "ended" if ended else f"took over {self.limit:.0f} s (--limit)"
                raise UserError(f"{self.name} {fate}:\n{last}")
            time.sleep(0.05)
        return time.perf_counter() - self.begun

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def shown(self, step: int, since_begun: float) -> str:
        """A first step's seconds."""
        return f"{self.positions / self.steps()[step]['tokens_per_s']:.1f} ({since_begun:.0f})"


def row(name: str, args: argparse.Namespace, folder: Path) -> str:
    checkpoints = folder / "checkpoints"
    partial, whole = checkpoints / f".partial-{SAVED:08d}", checkpoints / f"{SAVED:08d}"
    start = Start(name, args, folder, f"checkpoint.every={SAVED}", f"train.steps={args.steps}")
    first = start.wait(start.steps)
    try:
        begun = start.wait(lambda: partial.is_dir() or whole.is_dir())
        ended = start.wait(lambda: whole.is_dir() and max(start.steps()) > SAVED + AFTER)
        waited = sum(entry["checkpoint_wait_s"] for step, entry in start.steps().items() if step <= 2 * SAVED)
        shown = start.shown(1, first)
    finally:
        start.end()
    again = Start(name, args, folder, "checkpoint.every=null", f"train.steps={SAVED + AFTER}")
    # What the first start has logged after the checkpoint is cut off first.
    second = again.wait(lambda: max(again.steps()) in (SAVED + 1, SAVED + AFTER))
    again.wait(lambda: again.process.poll() is not None)
    read = again.printed().split(", read in ")[1].split()[0]
    size = sum(path.stat().st_size for path in whole.iterdir()) / 2**30
    cells = [
        name, str(LAYOUTS[name][0]), f"{size:.1f}", f"{waited:.1f}", f"{ended - begun:.0f}", read, shown,
        again.shown(SAVED + 1, second),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS), default=["one GPU"], metavar="LAYOUT")
    parser.add_argument("--micro-batches", type=int, default=8, help="rows of 4,096 a GPU of this machine and step")
    parser.add_argument("--inputs", type=Path, help="made before by megadual.synthetic.inputs; else made for this")
    parser.add_argument("--folder", type=Path, help="where runs are written: on the disk that is to be measured")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a start is given up")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every run")
    args = parser.parse_args()
    args.gpus, args.steps = max(torch.cuda.device_count(), 1), 1000
    print(f"| {' | '.join(HEADS)} |\n{'| --- ' * len(HEADS)}|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.inputs is None:
            args.inputs = Path(folder) / "inputs"
            subprocess.run([sys.executable, "-m", "megadual.synthetic.inputs", "--output", args.inputs], check=True)
        for name in args.only:
            print(row(name, args, folder_of(name, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
