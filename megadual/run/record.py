"""RUN/run.json: every start of a run, with what it ran on and how it ended."""

import datetime
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from megadual.errors import UserError
from megadual.run.files import write_whole

FILE = "run.json"
NEEDED = {"time", "world", "git", "slurm"}  # of a start
PACKAGES = [
    "torch", "triton", "megatron-core", "deepspeed", "transformer-engine", "apex", "flash-attn", "flash-attn-4",
    "transformers", "numpy", "wandb",
]  # fmt: skip
VARIABLES = ("SLURM_", "NCCL_", "CUDA_", "TORCH_", "OMP_NUM_THREADS", "PYTORCH_")
SLURM = {
    "job": "SLURM_JOB_ID", "array_job": "SLURM_ARRAY_JOB_ID", "array_task": "SLURM_ARRAY_TASK_ID",
    "restart": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION",
}  # fmt: skip


def describe_start(world: int) -> dict:
    """What this process runs: time, command, git revision, versions, Slurm ids, environment."""
    return {
        "time": _now(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "world": world,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "slurm": {name: os.environ[variable] for name, variable in SLURM.items() if variable in os.environ},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def git_revision() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def read_starts(folder: Path) -> list[dict]:
    """Every start, the first one first; UserError where the record is broken."""
    path = Path(folder) / FILE
    try:
        starts = json.loads(path.read_bytes())["starts"] if path.is_file() else []
        if not all(each.keys() >= NEEDED for each in starts):
            raise ValueError(f"a start has not all of {', '.join(sorted(NEEDED))}")
        return starts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is broken ({error}); remove it: the next start begins a new record") from error


def add_start(folder: Path, start: dict) -> None:
    """Append a start; one that never said how it ended was killed."""
    _write(folder, [*read_starts(folder), start])


def end_start(folder: Path, ended: str) -> None:
    """Say how the last start ended."""
    starts = read_starts(folder)
    starts[-1] |= {"ended": ended, "ended_at": _now()}
    _write(folder, starts)


def _write(folder: Path, starts: list[dict]) -> None:
    write_whole(Path(folder) / FILE, json.dumps({"starts": starts}, indent=1))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
