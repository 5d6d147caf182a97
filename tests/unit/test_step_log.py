"""metrics.jsonl on a disk that is full, and after a crash; and who reads it then."""

import contextlib
import json
import resource

import pytest

from megadual.config import to_yaml
from megadual.errors import UserError
from megadual.run import record
from megadual.run.step_log import METRICS, StepLog, read_metrics
from megadual.run.tensorboard import TensorBoard
from megadual.runs import describe
from megadual.testing import tiny


def open_log(folder, start_step=0):
    return StepLog(folder, start_step, "disabled", "project", "name", {})


def entry(step):
    return {"step": step, "loss": 1.0 / step, "tokens_per_s": 100.0}


@contextlib.contextmanager
def files_of_at_most(size):
    """As a full disk does, the system takes a part of what is written and then refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps_in(folder):
    entries, broken = read_metrics(folder / METRICS)
    assert not broken
    return [each["step"] for each in entries]


def test_lines_wait_for_room_on_a_full_disk(tmp_path, capsys):
    log = open_log(tmp_path)
    for step in (1, 2):
        log.write(entry(step))
    size = (tmp_path / METRICS).stat().st_size
    with files_of_at_most(size + 20):
        for step in (3, 4):
            log.write(entry(step))
        assert steps_in(tmp_path) == [1, 2] and (tmp_path / METRICS).stat().st_size == size
    assert capsys.readouterr().err.count("can't be written") == 1
    log.write(entry(5))
    assert "no line was lost" in capsys.readouterr().err
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_what_a_full_disk_never_took_is_counted(tmp_path, capsys):
    log = open_log(tmp_path)
    with files_of_at_most(10):
        for step in (1, 2):
            log.write(entry(step))
        log.close()
    assert "lacks the last 2 steps" in capsys.readouterr().err and steps_in(tmp_path) == []


def test_a_start_on_a_full_disk_leaves_the_lines_as_they_are(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.write(entry(step))
    log.close()
    with files_of_at_most(10), pytest.raises(UserError, match="metrics.jsonl' can't be written: .*; make room"):
        open_log(tmp_path, start_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def crashed(folder):
    """What a power cut may leave: NULs, a half line in the middle, what is no step, and an end that is cut off."""
    lines = [json.dumps(entry(step)).encode() for step in range(1, 7)]
    broken = [b"\0" * 40, lines[0][:9], b"3", b'{"loss": 1}', b'{"step": 2, "tokens": "x"}', b"\xff\xfe", b"[" * 99_999]
    whole = [*lines[:2], *broken, b"\0\0" + lines[2], *lines[3:5]]
    (folder / METRICS).write_bytes(b"\n".join(whole) + b"\n" + lines[5][:12])
    return len(broken)


def test_broken_lines_are_left_out_told_and_kept_aside(tmp_path, capsys):
    count = crashed(tmp_path)
    before = (tmp_path / METRICS).read_bytes()
    log = open_log(tmp_path, start_step=4)
    told = capsys.readouterr().err
    assert f"warning: {count} lines of '{tmp_path / METRICS}' can't be read" in told
    assert (tmp_path / f"{METRICS}.broken").read_bytes() == before
    log.write(entry(5))
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    open_log(tmp_path, start_step=5).close()
    assert capsys.readouterr().err == ""


def test_runs_are_described_whatever_a_crash_has_left(tmp_path):
    count = crashed(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(tiny.tiny_run(tmp_path, tmp_path)))
    record.add_start(tmp_path, record.describe_start(1))
    told = describe(tmp_path)
    assert told["step"] == "5 of 5" and told["tokens/s"] == "100 over 5 steps"
    assert told["broken"].startswith(f"{count} of the last lines")
    (tmp_path / METRICS).write_bytes(b"\0" * 4096)
    assert "step" not in describe(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\0" * 4096)
    with pytest.raises(UserError, match="config.yaml' is not valid YAML"):
        describe(tmp_path)


def test_tensorboard_can_fail(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.write(entry(1))
    board.close()
    assert capsys.readouterr().err.count("warning: training goes on without TensorBoard") == 1
