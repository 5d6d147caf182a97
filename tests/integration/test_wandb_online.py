"""wandb's own client and a server on loopback: one run for all starts, each step once, whoever is killed or away."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megadual.config import to_yaml
from megadual.run import exits
from megadual.run.wandb_file import BLOCK, START, steps_in_wandb_files
from megadual.testing.models import write_run
from megadual.testing.starts import Start
from megadual.testing.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
# Logs the steps from FIRST to LAST without training, then waits to be killed or ends.
LOG_STEPS = """
import sys, time
from pathlib import Path
from megadual.config import load_config
from megadual.train.config import PretrainConfig
from megadual.run import record
from megadual.train.metrics import MetricsLog

config, first, last, end, *overrides = sys.argv[1:]
run = load_config(PretrainConfig, config, overrides)
record.add_start(Path(run.run.dir), record.describe_start(1))
log = MetricsLog(run, int(first) - 1)
for step in range(int(first), int(last) + 1):
    losses = {name: 1 / step for name in ("loss", "loss_text", "loss_semantic", "loss_pixel")}
    log.step({"step": step, **losses, "tokens": step})
time.sleep(0 if end == "close" else 60)
log.close()
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    run = write_run(folder, "run.wandb=online", "run.name=tiny", "checkpoint.every=1000")
    (folder / "run.yaml").write_text(to_yaml(run))
    return folder / "run.yaml"


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def environment(server) -> dict[str, str]:
    """That of a process that finds the server."""
    mine = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of a test in this process
    return mine | {
        "OMP_NUM_THREADS": "1",
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": 40 * "a",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",  # whole seconds between what it sends; otherwise 15
        "WANDB_INIT_TIMEOUT": "2",
        "WANDB_FINISH_TIMEOUT": "2",
    }


@contextmanager
def started(server, *command):
    """A process that finds the server; dead at the end."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(server),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def training(server, config, folder, steps) -> Start:
    arguments = ["--config", config, f"run.dir={folder}", f"train.steps={steps}"]
    return Start(folder / "told", arguments, environment=environment(server))


def warnings_of(errors: str) -> list[str]:
    """The warnings of a process, and what wandb says of steps that it has."""
    return [line for line in errors.splitlines() if line.startswith("warning: ") or "current step" in line]


def wait_for(condition, code) -> None:
    """Until `condition()`; `code` gives the exit code of the process that brings it about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert code() is None and time.monotonic() < deadline
        time.sleep(0.02)


def metrics(folder) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def received(server) -> list[dict]:
    return [row for run in list(server.runs.values()) for row in run.history]


def check(server, folder, steps, starts) -> None:
    """The server has one run, of all starts, with each step of metrics.jsonl once and in order."""
    (run,) = server.runs.values()
    assert (run.name, run.group, run.project) == ("tiny", "tiny", "megadual")
    assert [row["_step"] for row in run.history] == list(range(1, steps + 1))
    assert [losses(row) for row in run.history] == [losses(row) for row in metrics(folder)]
    assert {name for name in run.config if name.startswith("start_")} == {f"start_{n + 1}" for n in range(starts)}
    assert "config.yaml" in run.files


def losses(row: dict) -> dict:
    return {name: row[name] for name in ("step", "loss", "loss_text", "loss_semantic", "loss_pixel", "tokens")}


def test_stopped_and_killed(server, config, tmp_path):
    with training(server, config, tmp_path, 60) as start:
        wait_for(lambda: len(metrics(tmp_path)) > 3, lambda: start.codes[0])
        start.send_signal(signal.SIGTERM)
        assert start.wait() == [exits.STOPPED] and warnings_of(start.stderr) == []
    stopped = len(received(server))
    assert stopped == len(metrics(tmp_path)) < 50
    with training(server, config, tmp_path, 60) as start:
        # Steps that are trained once more.
        wait_for(lambda: len(received(server)) > stopped, lambda: start.codes[0])
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"{stopped:08d}"
    assert len(received(server)) < 60
    with training(server, config, tmp_path, 60) as start:
        assert start.wait() == [0] and warnings_of(start.stderr) == []
    check(server, tmp_path, steps=60, starts=3)


def test_server_goes_away(server, config, tmp_path):
    with training(server, config, tmp_path, 40) as start:
        wait_for(lambda: received(server), lambda: start.codes[0])
        server.stop()
        assert start.wait() == [0]
        (warning,) = warnings_of(start.stderr)
    assert "goes on without wandb" in warning
    assert len(received(server)) < len(metrics(tmp_path)) == 40
    server.start()
    with training(server, config, tmp_path, 40) as start:
        assert start.wait() == [0] and warnings_of(start.stderr) == []
    check(server, tmp_path, steps=40, starts=2)


def test_server_is_away_at_the_start(server, config, tmp_path):
    server.stop()
    with training(server, config, tmp_path, 5) as start:
        assert start.wait() == [0]
        (warning,) = warnings_of(start.stderr)
    assert "goes on without wandb" in warning and "connection refused" in warning
    assert len(metrics(tmp_path)) == 5
    server.start()
    with training(server, config, tmp_path, 5) as start:
        assert start.wait() == [0] and warnings_of(start.stderr) == []
    check(server, tmp_path, steps=5, starts=2)


def test_offline_killed_and_synced_later(server, config, tmp_path):
    def logger(first, last, end):
        overrides = [f"run.dir={tmp_path}", "run.wandb=offline", "train.steps=200"]
        return started(server, "-c", LOG_STEPS, config, first, last, end, *overrides)

    def killed(last, size):
        """Logs to `last` and leaves a file of `size`: whole blocks, the last with a part of a record, or none yet."""
        with logger(1, last, "be killed") as process:
            wait_for(lambda: len(metrics(tmp_path)) == last and newest().stat().st_size >= size, process.poll)
        os.truncate(newest(), size)

    def newest():
        return max(tmp_path.glob("wandb/offline-run-*/*.wandb"))

    killed(last=3, size=START)
    killed(last=200, size=2 * BLOCK)
    assert 50 < max(steps_in_wandb_files(tmp_path)) < 190
    with logger(191, 200, "close") as process:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and warnings_of(errors) == []
    with started(server, "-m", "wandb", "sync", *sorted(tmp_path.glob("wandb/offline-run-*"))) as process:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors
    check(server, tmp_path, steps=200, starts=3)
