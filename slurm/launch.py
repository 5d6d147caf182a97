"""Submit a training to Slurm through submitit; preempted or out of time, it saves, is requeued and goes on.

    source slurm/env.sh
    python slurm/launch.py pretrain --config pretrain/configs/7b.yaml --nodes 4 run.dir=runs/mine key=value ...
    python slurm/launch.py pretrain --config FILE --sweep train.lr=1e-3,1e-4 --sweep train.seed=0,1 run.dir=runs/sweep

A sweep becomes one array, with a task per combination in a folder of its own under run.dir.
"""

import argparse
import itertools
import os
import select
import subprocess
import sys
from pathlib import Path

os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # what training answers; submitit reads it when it is imported

import submitit  # noqa: E402
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment  # noqa: E402
from submitit.slurm import slurm as submitit_slurm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megadual.errors import UserError, command  # noqa: E402

SCRIPTS = {"pretrain": "pretrain/pretrain.py", "train_tokenizer": "pretrain/train_tokenizer.py"}
FOREVER = 1_000_000  # how often a time limit may interrupt a run


class Training:
    """What each task runs: the script as a child, with torch.distributed's environment for it."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def __call__(self) -> int:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        # Slurm signals the child too: that waits until it can answer.
        waiting = ["env", "--block-signal=USR1", sys.executable, "-u"]
        self.child = subprocess.Popen([*waiting, *self.arguments], cwd=ROOT)
        code = self._wait()
        from megadual.run import exits

        if code not in (0, exits.STOPPED):
            raise RuntimeError(f"{self.arguments[0]} ended with exit code {code}")
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit in rank 0's task when the signal comes; the children get it from Slurm too, and save."""
        self._wait()
        return DelayedSubmission(Training(self.arguments))

    def _wait(self) -> int:
        # Not Popen.wait: the signal's handler interrupts one such wait with another, and they would share a lock.
        select.select([os.pidfd_open(self.child.pid)], [], [])
        return self.child.wait()


def combinations(sweeps: list[str]) -> list[list[str]]:
    """["a=1,2", "b=3"] -> [["a=1", "b=3"], ["a=2", "b=3"]]"""
    choices = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep '{sweep}' is not of the form key=value,value")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [list(chosen) for chosen in itertools.product(*choices)]


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The script's command line for each combination of the sweep."""
    fixed = [SCRIPTS[args.script], "--config", args.config]
    if not args.sweep:
        return [[*fixed, *args.overrides]]
    folder = next((o.partition("=")[2] for o in args.overrides if o.startswith("run.dir=")), None)
    if folder is None:
        raise UserError("--sweep needs run.dir=FOLDER, under which each combination gets its own")
    others = [override for override in args.overrides if not override.startswith("run.dir=")]
    return [
        [*fixed, *others, *chosen, f"run.dir={folder}/{','.join(chosen)}", f"run.name={','.join(chosen)}"]
        for chosen in combinations(args.sweep)
    ]


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--config", required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks-per-node", type=int, default=8, help="ranks of a node, one for each GPU")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--cpus-per-task", type=int, default=12)
    parser.add_argument("--mem", default="0", help="memory of a node; 0: all")
    parser.add_argument("--hours", type=float, default=24, help="time limit of one start")
    parser.add_argument("--save-seconds", type=int, default=600, help="warning before the time limit, to save in")
    parser.add_argument("--logs", default="runs/submitit", type=Path, help="folder for submitit's files and outputs")
    parser.add_argument("--sweep", action="append", default=[], metavar="key=a,b,...", help="may be given again")
    parser.add_argument("--dry-run", action="store_true", help="print the job's script, submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the training")
    args = parser.parse_intermixed_args(argv)

    jobs = commands(args)
    parameters = {
        "job_name": args.script,
        "nodes": args.nodes,
        "ntasks_per_node": args.tasks_per_node,
        "gpus_per_node": args.gpus_per_node,
        "cpus_per_task": args.cpus_per_task,
        "mem": args.mem,
        "time": round(args.hours * 60),
        "signal_delay_s": args.save_seconds,
        "srun_args": [f"--cpus-per-task={args.cpus_per_task}", "--kill-on-bad-exit=0", "--wait=40"],
        "additional_parameters": {"requeue": True},
    }
    if args.dry_run:
        placeholder = f"{sys.executable} -u -m submitit.core._submit {args.logs}"
        count = {"map_count": len(jobs)} if args.sweep else {}
        print(submitit_slurm._make_sbatch_string(placeholder, folder=args.logs, **count, **parameters))
        for job in jobs:
            print("# each task runs: " + " ".join(job))
        return
    executor = submitit.SlurmExecutor(args.logs, max_num_timeout=FOREVER)
    executor.update_parameters(**parameters)
    if args.sweep:
        with executor.batch():  # one array
            submitted = [executor.submit(Training(job)) for job in jobs]
    else:
        submitted = [executor.submit(Training(job)) for job in jobs]
    for job in submitted:
        print(f"{job.job_id}: {job.paths.stdout}")


if __name__ == "__main__":
    main()
