"""`sbatch slurm/pretrain_7b.sh` on two nodes: what it trains, and what it survives."""

import re
import signal
import subprocess
import sys
import time

import pytest
from cluster import run as run_command
from cluster import wait_for
from conftest import MODEL, ROOT, losses, steps

from megadual.run.wandb_file import steps_in_wandb_files

STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The losses of one process here, without Slurm."""
    run = tmp_path_factory.mktemp("local") / "run"
    paths = [f"model.dualtoken={inputs}/dualtoken", f"model.text_tokenizer={inputs}/text_tokenizer"]
    done = subprocess.run(
        [sys.executable, "pretrain/pretrain.py", "--config", "pretrain/configs/tiny.yaml", *paths,
         f"data.sets=[{inputs}/shards]", *MODEL, f"train.steps={STEPS}", f"run.dir={run}", "run.wandb=disabled",
         "run.ranks=1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(run)


def test_two_nodes_of_two_tasks_train_as_one_process(lab, undisturbed, tmp_path):
    job = lab.pretrain(tmp_path / "run", "train.steps=5", "parallel.pipeline=2", options=["--ntasks-per-node=2"])
    lab.finish(job)
    assert losses(tmp_path / "run") == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in undisturbed[:5]]
    for rank in range(4):
        assert (tmp_path / "run" / "logs" / f"{job}.0" / f"rank{rank}.log").is_file()


def test_survives(lab, cluster, undisturbed, tmp_path):
    """Preemption, a killed rank, one that hangs, and a node's death: each step once, with the undisturbed losses."""
    run = tmp_path / "run"
    job = lab.pretrain(
        run, f"train.steps={STEPS}", "checkpoint.every=4", "run.hang_timeout=20", "run.wandb=offline", MAX_RESTARTS="2"
    )

    lab.wait_step(run, 3)
    urgent = lab.sbatch(run, "--partition=urgent", "--nodes=2", "--mem=100", "--output=/dev/null", "--wrap=sleep 1")
    lab.hurry(job)
    assert "stopped by a signal after step" in (run / "logs" / f"{job}.0" / "rank0.log").read_text()
    lab.finish(urgent)

    lab.wait_step(run, 10)
    cluster.on_node("n2", "kill", "-KILL", str(lab.trainer("n2")))
    killed = time.monotonic()
    lab.wait_state(job, "PENDING")
    assert time.monotonic() - killed < 60
    assert "restart 1 of 2" in lab.output(job)
    lab.hurry(job)

    lab.wait_step(run, 18)
    cluster.on_node("n2", "kill", f"-{int(signal.SIGSTOP)}", str(lab.trainer("n2")))
    lab.wait_state(job, "PENDING")
    assert "failed with exit code 77; restart 2 of 2" in lab.output(job)
    for rank, node in enumerate(("n1", "n2")):
        stacks = (run / "logs" / f"hang-rank{rank}.txt").read_text()
        assert f"rank {rank} on {node}" in stacks and re.search(r'loop\.py", line \d+ in train\n', stacks)
    lab.hurry(job)

    lab.wait_step(run, 26)
    cluster.kill_node("n1")  # where the job's script and rank 0 run
    lab.wait_state(job, "PENDING")
    cluster.start_node("n1")
    lab.hurry(job)
    lab.finish(job)

    assert losses(run) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in undisturbed]
    assert len({path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}) == 1
    assert sorted(steps_in_wandb_files(run)) == list(range(1, STEPS + 1))
    told = subprocess.run(
        [sys.executable, "-m", "megadual.runs", run], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"state +finished at", told) and re.search(r"restarts +4", told)
    assert f"step             {STEPS} of {STEPS}" in told and f"checkpoints/{STEPS:08d}" in told


def test_time_limit(lab, undisturbed, tmp_path):
    run = tmp_path / "run"
    arguments = ["train.steps=100000", "checkpoint.every=100000"]
    job = lab.pretrain(run, *arguments, options=["--time=2", "--signal=USR1@75"])
    lab.wait_step(run, 1)
    lab.wait_state(job, "PENDING")
    assert "stopped by a signal; back into the queue" in lab.output(job)
    assert (run / "checkpoints" / "latest").read_text() == f"{len(steps(run)):08d}"
    warm_up = losses(run)[:10]  # does not depend on train.steps
    assert warm_up == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in undisturbed[: len(warm_up)]]


@pytest.fixture
def small_disk(cluster, tmp_path):
    """A folder of 64 MB that both nodes see, as one file system."""
    folder, image = tmp_path / "run" / "checkpoints", tmp_path / "disk.img"
    folder.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run_command("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
    device = run_command("losetup", "--find", "--show", image).stdout.strip()
    for node in cluster.nodes:
        cluster.on_node(node, "mount", device, folder)
    yield folder
    for node in cluster.nodes:
        cluster.on_node(node, "umount", "--lazy", folder)
    run_command("losetup", "--detach", device)


def test_a_full_disk_keeps_the_last_good_checkpoint(lab, cluster, small_disk, undisturbed, tmp_path):
    run, arguments = tmp_path / "run", [f"train.steps={STEPS}", "checkpoint.every=4"]
    job = lab.pretrain(run, *arguments)
    wait_for(lambda: "latest" in cluster.on_node("n1", "ls", str(small_disk)), 300, "a checkpoint")
    cluster.on_node("n1", "sh", "-c", f"dd if=/dev/zero of={small_disk}/ballast bs=1M; test -s {small_disk}/ballast")
    lab.wait_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "2:0" and lab.job(job)["Restarts"] == "0"
    told = re.search(
        r"checkpoint '\S+' could not be written \(.*No space left.*\); the last good one is '(\S+)'", lab.output(job)
    )
    latest = cluster.on_node("n1", "cat", str(small_disk / "latest"))
    assert told and told[1].endswith(latest)

    cluster.on_node("n1", "rm", str(small_disk / "ballast"))
    job = lab.pretrain(run, *arguments)
    lab.finish(job)
    assert f"resumed from {small_disk}/{latest}" in lab.output(job)
    assert losses(run) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in undisturbed]


def test_a_second_start_refuses(lab, tmp_path):
    run = tmp_path / "run"
    job = lab.pretrain(run, "train.steps=100000", "checkpoint.every=100000")
    lab.wait_step(run, 2)
    command = [sys.executable, "pretrain/pretrain.py", "--config", run / "config.yaml"]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert second.returncode == 2
    assert re.search(rf"error: run.dir '{run}' is in use by process \d+ on n1, Slurm job {job};", second.stderr)
    assert lab.state(job) == "RUNNING"


def test_a_bad_node_is_named(lab, cluster, tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    bad_disk = f"""mount --bind {run}/logs /mnt && mount -t tmpfs tmpfs {run} && mkdir {run}/logs &&
        mount --bind /mnt {run}/logs && mount -o remount,ro {run}"""
    cluster.on_node("n2", "sh", "-c", bad_disk)
    job = lab.pretrain(run, "train.steps=2", MAX_RESTARTS="0")
    lab.wait_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "78:0"
    assert f"error: bad nodes: n2: run.dir '{run}' can't be written: Read-only file system" in lab.output(job)


def test_a_missing_gpu_is_named(lab, tmp_path):
    job = lab.pretrain(tmp_path / "run", "train.steps=2", MAX_RESTARTS="0", DEVICE="cuda")
    lab.wait_state(job, "FAILED")
    assert "bad nodes: n1: rank 0 needs GPU 0, 0 are visible (run.device=cuda); n2: rank 1" in lab.output(job)


def test_gives_up_after_max_restarts(lab, cluster, tmp_path):
    job = lab.pretrain(tmp_path / "run", "train.steps=2", options=["--nodes=1"], MAX_RESTARTS="2")
    for restart in ("1 of 2", "2 of 2"):
        cluster.on_node("n1", "kill", "-KILL", str(lab.trainer("n1")))
        lab.wait_state(job, "PENDING")
        assert f"failed with exit code 137; restart {restart}" in lab.output(job)
        lab.hurry(job)
    cluster.on_node("n1", "kill", "-KILL", str(lab.trainer("n1")))
    lab.wait_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "137:0" and lab.job(job)["Restarts"] == "2"
    assert "failed 3 times, the last time with exit code 137; giving up" in lab.output(job)


def test_wrong_input_is_not_tried_again(lab, tmp_path):
    job = lab.pretrain(tmp_path / "run", "train.stepz=2")
    lab.wait_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "2:0" and lab.job(job)["Restarts"] == "0"
    assert lab.output(job).count("did you mean 'train.steps'") >= 1


@pytest.mark.parametrize("script", ["pretrain_7b", "pretrain_3b", "train_tokenizer"])
def test_headers_fit_nodes_of_eight_gpus(lab, script):
    told = run_command("sbatch", "--test-only", "--nodes=2", f"slurm/{script}.sh", env=lab.environment(ROOT)).stderr
    assert re.search(r"to start at .* on nodes n\[1-2\]", told)
