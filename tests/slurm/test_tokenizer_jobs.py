"""`sbatch slurm/train_tokenizer.sh` on two nodes: what its ranks survive and what is not tried again."""

import subprocess
import sys

import pytest
from conftest import ROOT, TASKS, losses, steps


def test_preempted_it_saves_and_goes_on(lab, tokenizer_config, tmp_path):
    run, arguments = tmp_path / "run", ["train.steps=60", "checkpoint.every=1000", "gan.start_step=3"]
    job = lab.train_tokenizer(run, tokenizer_config, *arguments)
    lab.wait_step(run, 6)
    urgent = lab.sbatch(run, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    lab.wait_state(job, "PENDING")
    assert "stopped by a signal; back into the queue" in lab.output(job)
    done = len(steps(run))
    assert (run / "checkpoints" / "latest").read_text() == f"{done:08d}"  # nothing is done again
    lab.finish(urgent)
    lab.hurry(job)
    lab.finish(job)
    assert 6 <= done < 60 and f"resumed from {run}/checkpoints/{done:08d}" in lab.output(job)

    here = [sys.executable, "pretrain/train_tokenizer.py", "--config", tokenizer_config, "run.ranks=2"]
    subprocess.run([*here, *arguments, f"run.dir={tmp_path}/here"], cwd=ROOT, check=True, capture_output=True)
    assert losses(run) == losses(tmp_path / "here") and len(losses(run)) == 60


@pytest.mark.parametrize("mistake, told", [
    ("train.stepz=2", "did you mean 'train.steps'"),
    ("--confg=FILE", "train_tokenizer.py: error: unrecognized arguments"),
])  # fmt: skip
def test_wrong_input_is_not_tried_again(lab, tokenizer_config, tmp_path, mistake, told):
    job = lab.train_tokenizer(tmp_path / "run", tokenizer_config, mistake)
    lab.wait_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "2:0" and lab.job(job)["Restarts"] == "0"
    assert (lab.folder / f"{job}.out").read_text().count(told) == 1


def test_one_rank_s_wrong_input_is_enough(lab, tmp_path):
    """Others may be killed for it, and srun's code is then theirs."""
    (tmp_path / "ranks.py").write_text(
        "import os\n"
        "from megadual.errors import UserError, command\n"
        "@command\n"
        "def main():\n"
        "    if os.environ['RANK'] == '0':\n"
        "        os.abort()\n"
        "    raise UserError(f'seen by one; for children: {os.environ.get(\"MEGADUAL_EXITS\")}')\n"
        "main()\n"
    )
    step = f"run_step rank%t.log bash slurm/rank.sh python {tmp_path}/ranks.py"
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\nsource slurm/job.sh\n{step}\n")
    job = lab.sbatch(tmp_path / "run", *TASKS, f"--output={tmp_path}/%j.out", f"{tmp_path}/job.sh")
    lab.wait_state(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "2:0" and lab.job(job)["Restarts"] == "0"
    assert "\nerror: seen by one; for children: None\n" in (tmp_path / f"{job}.out").read_text()
