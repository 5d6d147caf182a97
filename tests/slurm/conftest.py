"""The cluster, and runs submitted to it as a user does."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, wait_for  # noqa: E402

from megadual.testing.models import write_run  # noqa: E402
from megadual.testing.vision import tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip  # noqa: E402

ROOT = Path(__file__).parents[2]
MODEL = [
    "model.layers=2", "model.hidden=64", "model.ffn=96", "model.heads=4", "model.kv_heads=2", "model.head.width=32",
    "model.head.layers=2", "model.head.heads=2", "model.head.ffn=48", "train.seq_len=64", "train.lr=1e-2",
    "train.global_batch_tokens=1024", "train.micro_batch_size=1", "train.optimizer=adamw", "parallel.pipeline=1",
]  # fmt: skip
ENDS = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"}
TASKS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=2000"]


@pytest.fixture(scope="session")
def cluster():
    cluster = Cluster()
    cluster.down()
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A DualToken, a text tokenizer and a shard set."""
    folder = tmp_path_factory.mktemp("inputs")
    write_run(folder)
    return folder


@pytest.fixture
def tokenizer_config(tmp_path) -> Path:
    """A config of pretrain/train_tokenizer.py, with the SigLIP and the pairs that it names beside it."""
    model = {k: v for k, v in dataclasses.asdict(tiny_dualtoken_config()).items() if k != "siglip"}
    config = {
        "siglip": str(write_tiny_siglip(tmp_path / "siglip")), "model": model,
        "data": {"train": write_tiny_pairs(tmp_path / "corpus"), "batch_size": 4, "shuffle": 16},
        "train": {"steps": 2, "loss": {"lpips": 0}}, "checkpoint": {"every": 2},
        "gan": {"start_step": 5, "channels": [8, 8, 8], "norm_groups": 4},
    }  # fmt: skip
    path = tmp_path / "tokenizer.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Lab:
    """Submits a checkout's scripts and looks at what becomes of them."""

    def __init__(self, cluster: Cluster, inputs: Path, folder: Path):
        self.cluster, self.inputs, self.folder = cluster, inputs, folder
        self.jobs: list[str] = []

    def environment(self, run: Path) -> dict[str, str]:
        inputs = {name: str(self.inputs / name.lower()) for name in ("DUALTOKEN", "TEXT_TOKENIZER", "SHARDS")}
        return self.cluster.environment() | inputs | {
            "VENV": sys.prefix, "DEVICE": "cpu", "CONFIG": "tiny", "RUN_DIR": str(run), "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
        }  # fmt: skip

    def pretrain(self, run: Path, *overrides: str, options: tuple = (), **environment: str) -> str:
        """sbatch slurm/pretrain_7b.sh; returns the job's number."""
        output = f"--output={self.folder}/%j.out"
        return self.sbatch(run, *TASKS, output, *options, "slurm/pretrain_7b.sh", *MODEL, *overrides, **environment)

    def train_tokenizer(self, run: Path, config: Path, *overrides: str, **environment: str) -> str:
        """sbatch slurm/train_tokenizer.sh; returns the job's number."""
        arguments = ["slurm/train_tokenizer.sh", "--config", str(config), *overrides]
        return self.sbatch(run, *TASKS, f"--output={self.folder}/%j.out", *arguments, **environment)

    def sbatch(self, run: Path, *arguments: str, **environment: str) -> str:
        from cluster import run as command

        done = command("sbatch", "--parsable", f"--chdir={ROOT}", *arguments, env=self.environment(run) | environment)
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def job(self, job: str) -> dict[str, str]:
        fields = self.cluster.output("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_state(self, job: str, *states: str, seconds: float = 120) -> str:
        try:
            state = wait_for(lambda: (now := self.state(job)) in {*states, *ENDS} and now, seconds)
        except TimeoutError:
            state = self.state(job)
        assert state in states, f"job {job} is {state}, not {states}:\n{self.output(job)}"
        return state

    def hurry(self, job: str) -> None:
        """A requeued job would wait two minutes."""
        self.wait_state(job, "PENDING")
        wait_for(lambda: "CG" not in self.cluster.output("squeue", "-h", "-o", "%t").split(), 90, "the old start's end")
        time.sleep(2)  # Slurm refuses a start in the second of the requeue: "job credential revoked"
        self.cluster.output("scontrol", "update", f"JobId={job}", "StartTime=now")

    def output(self, job: str) -> str:
        """The job's own output, then its ranks'."""
        patterns = (f"{job}.out", f"*/logs/{job}.*/*.log", f"logs/{job}_*_log.*")
        files = [file for pattern in patterns for file in sorted(self.folder.glob(pattern))]
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)

    def wait_step(self, run: Path, step: int, seconds: float = 120) -> None:
        """Until the run has done `step` steps."""
        try:
            wait_for(lambda: len(steps(run)) >= step, seconds)
        except TimeoutError:
            raise AssertionError(f"{len(steps(run))} of {step} steps\n{self.output('*')}") from None

    def finish(self, job: str, seconds: float = 120) -> None:
        self.wait_state(job, "COMPLETED", seconds=seconds)

    def trainer(self, node: str) -> int:
        """The process id, in its node, of the rank there; waits until it has started."""
        try:
            pgrep = ("sh", "-c", "pgrep --full 'python -u [p]retrain/pretrain.py' || true")
            return int(wait_for(lambda: self.cluster.on_node(node, *pgrep), 240).split()[0])
        except TimeoutError:
            raise AssertionError(f"no rank on {node}\n{self.output('*')}") from None


@pytest.fixture
def lab(cluster, inputs, tmp_path):
    lab = Lab(cluster, inputs, tmp_path)
    yield lab
    for job in lab.jobs:
        cluster.output("scancel", "--quiet", job)
    wait_for(lambda: not cluster.output("squeue", "-h"), 240, "an empty queue")


def steps(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in steps(run)]


os.environ.setdefault("OMP_NUM_THREADS", "1")
