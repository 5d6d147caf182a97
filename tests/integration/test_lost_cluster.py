"""A Ray that was started here and loses its only node: the command ends."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, time
from types import SimpleNamespace
import psutil, ray
from megadual import cluster
from megadual.errors import UserError, command

cluster.SECONDS_BEFORE_WORD = 1
workers = SimpleNamespace(address="local", count=1, cpus=1.0, gpus=0.0, attempts=3, object_store_mb=100)

class Worker:
    def work(self, task):
        while True:
            time.sleep(0.1)
            yield

class Board:
    failed = 0
    start = restart = finish = lambda *_: None
    def update(self, task, progress):  # the worker works: kill the node's raylet, and with it the worker
        for process in psutil.Process().children(recursive=True):
            if process.name() == "raylet":
                os.kill(process.pid, signal.SIGKILL)
    def message(self, message):
        print(message)

@command
def main():
    assert cluster.connect(workers)
    worker = ray.remote(Worker)
    begin = lambda actor, task: actor.work.options(num_returns="streaming").remote(task)
    pool = cluster.WorkerPool(workers, worker.remote, begin, ["a", "b"], Board(), can_grow=False)
    try:
        pool.start_worker()
        while pool.unfinished:
            pool.take_answers()
    finally:
        pool.close()
        ray.shutdown()

main()
"""


def test_a_killed_raylet_ends_the_command():
    notice = {"period_ms": 200, "timeout_ms": 500, "failure_threshold": 2, "initial_delay_ms": 0}
    environment = {**os.environ, **{f"RAY_health_check_{name}": str(value) for name, value in notice.items()}}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "a: attempt 1 failed: the worker died" in done.stdout
    assert "error: workers: the cluster has lost its nodes: one needs 1.0 CPUs" in done.stderr.splitlines()[-1]
