"""`pretrain/pretrain.py` as a user starts it: two processes, resume, and what wrong input gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadual.config import to_yaml
from megadual.testing.models import write_dualtoken, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The command line of a tiny run, with its DualToken, text tokenizer and shard set on disk."""
    folder = tmp_path_factory.mktemp("pretrain")
    run = write_run(folder, "checkpoint.every=2", "run.wandb=offline")
    (folder / "run.yaml").write_text(to_yaml(run))
    return ["--config", folder / "run.yaml"]


def pretrain(*arguments, ok=True):
    done = subprocess.run(
        [sys.executable, "pretrain/pretrain.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done


def test_trains_and_resumes(inputs, tmp_path):
    run = [*inputs, f"run.dir={tmp_path}", "parallel.pipeline=2"]
    pretrain(*run, "train.steps=2")
    pretrain(*run, "train.steps=4")
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss_text"] < steps[0]["loss_text"]
    assert steps[-1]["tokens"] == 4 * 256
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000004"
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_dry_run_prints_config_and_plan(inputs, tmp_path):
    done = pretrain(*inputs, f"run.dir={tmp_path / 'run'}", "train.steps=2", "parallel.pipeline=2", "--dry-run")
    assert "seq_len: 64" in done.stdout
    assert "pipeline=2" in done.stdout and "60 documents" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["train.stepz=3"], "did you mean 'train.steps'"),
    (["parallel.tensor=3"], "model.heads=4 does not divide by parallel.tensor=3"),
    (["data.sets=[nowhere]"], "no finished shard set in 'nowhere'"),
    (["model.text_tokenizer=nowhere"], "no text tokenizer in 'nowhere'"),
    (["model.dualtoken=nowhere"], "no DualToken in 'nowhere'"),
])  # fmt: skip
def test_wrong_input(inputs, tmp_path, arguments, message):
    done = pretrain(*inputs, f"run.dir={tmp_path}", "train.steps=2", *arguments, ok=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr


def test_set_of_another_tokenizer(inputs, tmp_path):
    other = write_dualtoken(tmp_path / "other", seed=1)
    done = pretrain(*inputs, f"run.dir={tmp_path}", "train.steps=2", f"model.dualtoken={tmp_path / 'other'}", ok=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert other.fingerprint()[:12] in done.stderr and "was made with the dualtoken of" in done.stderr
