"""`python slurm/launch.py`: the same trainings through submitit."""

import re
import subprocess
import sys

from cluster import wait_for
from conftest import MODEL, ROOT, losses, steps

from megadual.run.checkpoints import CheckpointFolder

SIZES = ["--nodes=2", "--tasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=2000"]


def launch(lab, run, script: str, *arguments: str) -> str:
    command = [sys.executable, "slurm/launch.py", script, *SIZES, f"--logs={lab.folder}/logs", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=lab.environment(run), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pretrain(lab, run, *arguments: str) -> str:
    inputs = lab.inputs
    paths = [f"model.dualtoken={inputs}/dualtoken", f"model.text_tokenizer={inputs}/text_tokenizer"]
    paths += [f"data.sets=[{inputs}/shards]", f"run.dir={run}"]
    return launch(lab, run, "pretrain", "--config", "pretrain/configs/tiny.yaml", *arguments, *MODEL, *paths)


def test_dry_run_prints_the_script(lab, tmp_path):
    script = pretrain(lab, tmp_path / "run", "--dry-run", "--sweep", "train.lr=1e-3,1e-4")
    for line in ("#SBATCH --nodes=2", "#SBATCH --signal=USR1@600", "#SBATCH --requeue", "#SBATCH --array=0-1%2"):
        assert line in script.splitlines()
    assert f"run.dir={tmp_path}/run/train.lr=1e-4" in script
    assert not (tmp_path / "logs").exists()


def test_preempted_it_saves_and_goes_on(lab, tmp_path):
    run = tmp_path / "run"
    (job,) = re.findall(r"^(\d+):", pretrain(lab, run, "train.steps=20", "checkpoint.every=1000"), re.MULTILINE)
    lab.jobs.append(job)
    lab.wait_step(run, 2)
    urgent = lab.sbatch(run, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    lab.wait_state(job, "PENDING")
    saved = len(steps(run))
    assert (run / "checkpoints" / "latest").read_text() == f"{saved:08d}"
    lab.finish(urgent)
    lab.hurry(job)
    lab.finish(job)
    assert [step for step, _ in losses(run)] == list(range(1, 21))
    assert saved < 20
    told = "".join(path.read_text() for path in (tmp_path / "logs").glob(f"{job}_0_log.*"))
    assert f"resumed from {run}/checkpoints/{saved:08d}" in told


def test_a_sweep_is_an_array(lab, tmp_path):
    run = tmp_path / "run"
    told = pretrain(lab, run, "--nodes=1", "--sweep", "train.lr=1e-2,1e-3", "train.steps=2")
    jobs = re.findall(r"^(\d+_\d):", told, re.MULTILINE)
    lab.jobs += jobs
    assert len(jobs) == 2
    for job in jobs:
        lab.finish(job)
    first, second = (losses(run / f"train.lr={lr}") for lr in ("1e-2", "1e-3"))
    assert len(first) == len(second) == 2 and first[0] == second[0] and first[1] != second[1]


def test_a_tokenizer_out_of_time_goes_on(lab, tokenizer_config, tmp_path):
    run, arguments = tmp_path / "run", ["--config", str(tokenizer_config), "train.steps=100000", "checkpoint.every=4"]
    told = launch(lab, run, "train_tokenizer", *arguments, f"run.dir={run}")
    (job,) = re.findall(r"^(\d+):", told, re.MULTILINE)
    lab.jobs.append(job)
    lab.wait_step(run, 6)
    lab.cluster.output("scancel", "--signal=USR1", job)  # what --signal sends before the time limit
    lab.wait_state(job, "PENDING", seconds=30)
    checkpoint = CheckpointFolder(run, keep=1).latest()
    lab.hurry(job)
    wait_for(lambda: f"resumed from {checkpoint}" in lab.output(job), 240, "the second start")
