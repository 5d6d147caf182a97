"""A training that gets a signal in the middle of what it does, as one and as two ranks; and on a set in a store."""

import json
import os
import pkgutil
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from megadual.config import to_yaml
from megadual.run import exits
from megadual.testing.models import write_run
from megadual.testing.starts import Start, nothing
from megadual.train import checkpoint

STEPS = 6
# Of metrics: other in each run.
TIMES = ("tokens_per_s", "model_tflops", "data_wait_s", "checkpoint_wait_s", "mfu", "peak_gib")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The command line of a run that holds out and saves at every second step, and its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "run.yaml").write_text(to_yaml(write_run(folder, "run.wandb=disabled")))
    shutil.copytree(folder / "shards", folder / "held_out")
    held_out = f"data.validation=[{folder}/held_out]", "data.validation_every=2", "data.validation_rows=8"
    return ["--config", str(folder / "run.yaml"), f"train.steps={STEPS}", "checkpoint.every=2", *held_out]


def train(folder: Path, ranks: int, arguments: list[str], at: int = 0, meddle: Callable[[], None] = nothing) -> list:
    """The exit codes of a start in `folder`, where the rank `at` does `meddle` before."""
    with Start(folder / "told", [*arguments, f"run.dir={folder}"], ranks, meddle=meddle, at=at) as start:
        return start.wait()


def steps_of(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The steps of the run by how many ranks it has."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [train(folder / str(ranks), ranks, inputs) for ranks in (1, 2)] == [[0], [0, 0]]
    return {ranks: steps_of(folder / str(ranks)) for ranks in (1, 2)}


class During:
    """Has a rank get signals as it begins `what` for the second time, from another thread while that runs."""

    def __init__(self, what: str, *numbers: signal.Signals):
        self.what, self.numbers = what, numbers

    def __call__(self) -> None:
        original, calls = pkgutil.resolve_name(self.what), []

        def disturbed(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                threading.Thread(target=self.send).start()
            return original(*arguments)

        pytest.MonkeyPatch().setattr(self.what, disturbed)

    def send(self) -> None:
        for i, number in enumerate(self.numbers):
            while number in self.numbers[:i] and signal.getsignal(number) != signal.SIG_DFL:
                time.sleep(1e-4)  # until the first one is seen
            os.kill(os.getpid(), number)


WRITE = "megadual.engine.sharded.ShardedWrite.write"
DESCRIBE = "megadual.train.checkpoint._describe"  # before a checkpoint is published
HOLD_OUT = "megadual.train.validation.Validation.losses"
STOPPED = exits.STOPPED


@pytest.mark.parametrize("codes, at, during, background", [
    ([STOPPED], 0, During(WRITE, signal.SIGTERM, signal.SIGUSR1), True),
    ([STOPPED], 0, During(DESCRIBE, signal.SIGINT), False),
    ([STOPPED], 0, During(HOLD_OUT, signal.SIGUSR1), True),
    ([-signal.SIGINT], 0, During(WRITE, signal.SIGINT, signal.SIGINT), False),
    ([STOPPED, STOPPED], 1, During(WRITE, signal.SIGINT), True),
    ([STOPPED, STOPPED], 0, During(DESCRIBE, signal.SIGTERM, signal.SIGHUP), False),
    ([STOPPED, STOPPED], 1, During(HOLD_OUT, signal.SIGTERM), True),
])  # fmt: skip
def test_a_signal_in_a_save_or_while_holding_out(inputs, undisturbed, tmp_path, codes, at, during, background):
    """The checkpoint is whole, and the next start ends with the numbers of a run that was never stopped."""
    folder, ranks = tmp_path / "run", len(codes)
    assert train(folder, ranks, [*inputs, f"checkpoint.background={background}"], at, during) == codes
    latest = checkpoint.resolve_checkpoint(folder)
    checkpoint.check(latest)
    if codes[0] == STOPPED:
        assert int(latest.name) == steps_of(folder)[-1]["step"] in (4, 5)
    assert train(folder, ranks, inputs) == [0] * ranks
    assert steps_of(folder) == undisturbed[ranks]
    assert not list(latest.parent.glob(".partial-*"))


def test_two_ranks_train_on_a_set_in_a_store_as_on_a_disk(inputs, undisturbed, tmp_path, monkeypatch):
    """The same rows, so the same numbers, to the bit."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    # Of this server: another test's may be remembered.
    store, shards = fsspec.filesystem("s3", skip_instance_cache=True), Path(inputs[1]).parent / "shards"
    store.mkdir("trained-on")  # servers of one process share their buckets
    store.put(str(shards), "trained-on/shards", recursive=True)
    at_url = "data.sets=[s3://trained-on/shards]", f"data.cache={tmp_path}/cache"
    assert train(tmp_path / "run", 2, [*inputs, *at_url]) == [0, 0]
    server.stop()
    assert steps_of(tmp_path / "run") == undisturbed[2] and len(list((tmp_path / "cache").iterdir())) >= 3
