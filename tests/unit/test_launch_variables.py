"""What launchers say in the environment, half, wrongly or not at all."""

import socket
import warnings

import pytest

from megadual.errors import command
from megadual.run import exits, launch
from megadual.run.launch import Launch, LaunchError, hush_libraries, launched
from megadual.run.nodes import MeetingError, open_store

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(variables):
        for name in (*WHOLE, "MEGADUAL_STORE", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize("changed, message", [
    ({"RANK": None}, "RANK is not in the environment, but WORLD_SIZE=4: a launcher"),
    ({"WORLD_SIZE": None}, "WORLD_SIZE is not in the environment, but RANK=1: a launcher"),
    ({"RANK": "first"}, "RANK='first' in the environment must be a whole number, 0 or more"),
    ({"RANK": ""}, "RANK='' in the environment"),
    ({"RANK": "-1"}, "RANK='-1' in the environment"),
    ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number, 1 or more"),
    ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0' in the environment"),
    ({"LOCAL_RANK": None}, "LOCAL_RANK is not in the environment, but RANK=1, WORLD_SIZE=4"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ({"MASTER_ADDR": None}, "WORLD_SIZE=4 needs MASTER_ADDR, the host of rank 0"),
    ({"MASTER_PORT": None}, "MASTER_PORT is not in the environment"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' in the environment must be a whole number, 1 to 65535"),
    ({"RANK": None, "WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 tasks"),
])  # fmt: skip
def test_what_can_not_be_right_is_told_by_every_rank(environment, capsys, changed, message):
    environment({name: value for name, value in (WHOLE | changed).items() if value is not None})
    with pytest.raises(SystemExit) as end:
        command(launched)()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == exits.WRONG_INPUT and line.startswith("error: ") and message in line


def test_what_is_right(environment):
    environment(WHOLE)
    assert launched() == launched(dry_run=True) == Launch(1, 4)
    environment({"WORLD_SIZE": "512"})
    assert launched(dry_run=True) == Launch(0, 512)
    environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert launched() == Launch(0, 1)
    environment({"RANK": "1", "WORLD_SIZE": "2", "MEGADUAL_STORE": "file"})
    assert launched() == Launch(1, 2)
    environment({})
    assert launched() is None and launched(dry_run=True) is None
    environment({"WORLD_SIZE": "many"})
    with pytest.raises(LaunchError, match="WORLD_SIZE='many'"):
        launched(dry_run=True)


def test_a_port_that_is_taken_and_a_host_that_is_not_there(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment(WHOLE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        with pytest.raises(
            MeetingError, match=f"rank 0 can't listen at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: .*use"
        ):
            open_store(0, 2)
    with pytest.raises(MeetingError, match="rank 1 does not reach rank 0 at MASTER_ADDR=127.0.0.1"):
        open_store(1, 2, timeout_s=0.2)


@pytest.mark.parametrize("rank, heard", [("0", ["FutureWarning", "UserWarning"]), ("1", ["UserWarning"])])
def test_one_rank_tells_what_libraries_say(monkeypatch, rank, heard):
    """What is said of a rank's own data is a UserWarning: every rank tells it."""
    environment = {"RANK": rank}
    monkeypatch.setattr(launch.os, "environ", environment)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush_libraries()
        warnings.warn("is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("skipped 'shard' sample 'key'", stacklevel=1)
        warnings.warn_explicit("not installed", UserWarning, "backends.py", 1, module="megatron.core.models.backends")
    assert [each.category.__name__ for each in caught if "not installed" not in str(each.message)] == heard
    assert any("not installed" in str(each.message) for each in caught) == (rank == "0")
    assert environment.get("TRANSFORMERS_VERBOSITY") == (None if rank == "0" else "error")
