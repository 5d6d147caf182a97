"""`bash slurm/pipeline.sh`: from pairs to a tried model, as jobs that wait for each other."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from cluster import run as command
from conftest import MODEL, ROOT

from megadual.testing.models import write_export
from megadual.text import save_text_tokenizer, train_text_tokenizer

SMALL = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=2 --mem=2000"


@pytest.fixture
def stages(tokenizer_config, tmp_path) -> dict[str, str]:
    """The environment that says what the stages are to do."""
    pairs = yaml.safe_load(tokenizer_config.read_text())["data"]["train"]
    save_text_tokenizer(train_text_tokenizer(["a red disc on blue", "a green disc on white"], 300), tmp_path / "text")
    shards = {"inputs": [pairs], "encode": {"batch_size": 16}, "workers": {"count": 1}}
    (tmp_path / "tokenize.yaml").write_text(yaml.safe_dump(shards))
    return {
        "TOKENIZER_CONFIG": str(tokenizer_config), "TOKENIZE_CONFIG": f"{tmp_path}/tokenize.yaml",
        "TEXT_TOKENIZER": f"{tmp_path}/text", "HELDOUT": pairs, "PRETRAIN": "3b",
        "TRY_ARGS": "--describe=1 --draw=1", "PRETRAIN_ARGS": " ".join([*MODEL, "train.steps=2"]),
        "SBATCH_ARGS": f"{SMALL} --output={tmp_path}/%j.out",
    }  # fmt: skip


def pipeline(lab, folder, stages) -> list[str]:
    environment = {k: v for k, v in lab.environment(folder).items() if k not in ("RUN_DIR", "DUALTOKEN", "SHARDS")}
    told = command("bash", ROOT / "slurm/pipeline.sh", folder, env=environment | stages).stdout
    jobs = re.findall(r"\d+", told.splitlines()[-1])
    lab.jobs += jobs
    return jobs


def test_from_pairs_to_a_tried_model(lab, stages, tmp_path):
    jobs = pipeline(lab, tmp_path / "out", stages)
    assert len(jobs) == 5
    for job in jobs:
        lab.finish(job, seconds=180)
    assert json.loads((tmp_path / "out" / "shards" / "manifest.json").read_text())["samples"] == 32
    assert (tmp_path / "out" / "evaluation" / "use" / "drawing-000.png").is_file()
    assert json.loads((tmp_path / "out" / "evaluation" / "scores.json").read_text())["scores"] == []


def test_what_waits_for_a_failed_stage_is_removed(lab, stages, tmp_path):
    first, *others = pipeline(lab, tmp_path / "out", stages | {"TOKENIZER_CONFIG": "nowhere.yaml"})
    lab.wait_state(first, "FAILED")
    for job in others:
        lab.wait_state(job, "CANCELLED")


def test_two_nodes_make_the_shards_that_one_process_does(lab, stages, inputs, tmp_path):
    arguments = [
        "--config", stages["TOKENIZE_CONFIG"], f"dualtoken={inputs}/dualtoken",
        f"text_tokenizer={inputs}/text_tokenizer", "workers.count=2", "workers.cpus=2",
    ]  # fmt: skip
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=2000", f"--output={tmp_path}/%j.out"]
    job = lab.sbatch(tmp_path, *options, "slurm/tokenize.sh", *arguments, f"output={tmp_path}/two")
    here = [sys.executable, ROOT / "data_pipeline/tokenize.py", *arguments, "workers.count=1", f"output={tmp_path}/one"]
    subprocess.run(here, cwd=ROOT, check=True, capture_output=True)
    lab.finish(job, seconds=180)
    one, two = (
        {path.relative_to(at): path.read_bytes() for path in at.rglob("*.mds")}
        for at in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) == 2 and one == two


def test_two_nodes_draw_what_one_process_does(lab, tmp_path):
    """Prompts of a benchmark, drawn on both nodes, then one report of all scores."""
    model = write_export(tmp_path)
    (tmp_path / "prompts").mkdir()
    lines = [json.dumps({"tag": "colors", "prompt": f"a photo of {what}"}) for what in ("a cat", "a dog", "an owl")]
    (tmp_path / "prompts/geneval.jsonl").write_text("\n".join(lines))
    given = {"PROMPTS": f"{tmp_path}/prompts", "DRAW_ARGS": "--workers=2 --cpus=2 --batch=4"}
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=2000", f"--output={tmp_path}/%j.out"]
    job = lab.sbatch(tmp_path, *options, "slurm/evaluate.sh", model, tmp_path / "out", **given)
    here = [
        "draw", "--benchmark", "geneval", "--prompts", tmp_path / "prompts/geneval.jsonl", "--model", model,
        "--output", tmp_path / "one", "--workers=0", "--batch=4",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "megadual.evaluate", *here], cwd=ROOT, check=True, capture_output=True)
    lab.finish(job, seconds=240)
    one, two = (
        {path.relative_to(at): path.read_bytes() for path in at.rglob("*.png")}
        for at in (tmp_path / "one", tmp_path / "out/geneval")
    )
    assert len(one) == 12 and one == two
    assert (tmp_path / "out" / "scores.html").is_file()
