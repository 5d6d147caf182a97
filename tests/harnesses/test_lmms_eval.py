"""The real lmms-eval on an exported folder, offline, in its own environment: `make test-lmms-eval`."""

import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from megadual.hf.folder import open_folder
from megadual.testing.answering import balance, teach, write_trained_export
from megadual.testing.benchmarks import (
    ROWS,
    mmbench_score,
    mme_scores,
    pope_scores,
    scenes,
    write_tasks,
)

PYTHON = os.environ.get("MEGADUAL_LMMS_EVAL_PYTHON")
if not PYTHON:
    pytest.skip("make test-lmms-eval runs these", allow_module_level=True)
HERE, SIZE = Path(__file__).parent, 32
SHORT = "\nAnswer the question using a single word or phrase."


def asked(benchmark: str, row: dict) -> str:
    """A question as the benchmark's task in lmms-eval puts it."""
    if benchmark != "mmbench":
        return row["question"].replace(" Please answer yes or no.", "") + SHORT
    hint = "" if row["hint"] == "nan" else f"{row['hint']} "
    options = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
    after = "\n\nAnswer with the option's letter from the given choices directly."
    return f"{hint}{row['question']} There are several options:\n{options}{after}"


def picture(row: dict) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


def run(folder: Path, *command: object, **environment: object) -> str:
    """What a command in lmms-eval's environment prints."""
    settings = os.environ | {
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        [PYTHON, *map(str, command)],
        cwd=folder,
        env=settings | {name: str(value) for name, value in environment.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export that has learned to answer a little, rows of each benchmark and lmms-eval's tasks on them."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    export = write_trained_export(folder)
    samples = {}
    for benchmark, rows in ROWS.items():
        taught = rows(scenes(40, seed=1), SIZE, seed=1)
        samples[benchmark] = [(picture(row), asked(benchmark, row), row["answer"]) for row in taught]
    samples["yes or no"] = [(*each[:2], each[2].lower()) for each in samples.pop("pope") + samples.pop("mme")]
    teach(export, [each for of in samples.values() for each in of], steps=30)
    for of in samples.values():
        balance(export, of)
    return folder


@pytest.fixture(scope="module")
def rows():
    return {benchmark: rows(scenes(24, seed=2), SIZE, seed=2) for benchmark, rows in ROWS.items()}


@pytest.fixture(scope="module")
def tasks(folder, rows):
    found = run(folder, "-c", "from importlib.util import find_spec; print(find_spec('lmms_eval').origin)")
    return write_tasks(folder, Path(found.strip()).parent / "tasks", rows)


@pytest.fixture(scope="module")
def answers(folder, rows):
    """Ours: what the model of the folder, opened with the installed classes, says to each row."""
    model = open_folder(folder / "hf", "cpu")
    return {
        benchmark: model.ask([picture(row) for row in of], [asked(benchmark, row) for row in of], max_new_tokens=16)
        for benchmark, of in rows.items()
    }


def evaluated(output: Path) -> tuple[dict, dict]:
    """The scores that lmms-eval wrote, and by benchmark the answers it scored."""
    (results,) = output.glob("*/[0-9]*_results.json")  # MMBench writes one of its own
    said = {}
    for path in output.glob("*/*_samples_*.jsonl"):
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        said[re.sub(".*_", "", path.stem)] = [sample["filtered_resps"] for sample in samples]
    return json.loads(results.read_text())["results"], said


def test_scores_are_ours(folder, rows, tasks, answers):
    """By two processes, which share the documents. Each start of lmms-eval takes seconds: one is enough."""
    run(
        folder, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", HERE / "lmms_eval_of_ours.py", "--include_path", folder,
        "--tasks", ",".join(tasks), "--batch_size", 3, "--log_samples", "--output_path", folder / "two",
        "--model", "megadual", "--model_args", f"pretrained={folder}/hf",
    )  # fmt: skip
    scores, said = evaluated(folder / "two")
    assert said == answers and set(scores) == set(tasks)
    expected = {
        "scenes_pope": pope_scores(rows["pope"], answers["pope"]),
        "scenes_mme": mme_scores(rows["mme"], answers["mme"]),
        "scenes_mmbench": {"gpt_eval_score": mmbench_score(rows["mmbench"], answers["mmbench"])},
    }
    for task, of in expected.items():
        for name, score in of.items():
            assert scores[task][f"{name},none"] == pytest.approx(score, abs=1e-9), (task, name)
    for benchmark, different in (("pope", 2), ("mme", 2), ("mmbench", 3)):
        assert len(set(answers[benchmark])) >= different, f"{benchmark}: a score of one answer alone says little"
    assert 0 < expected["scenes_pope"]["pope_accuracy"] < 1
    assert 0 < expected["scenes_mme"]["mme_perception_score"] < 600
    assert 0 < expected["scenes_mmbench"]["gpt_eval_score"] < 100


def test_requests_of_all_kinds(folder):
    """Tests that run inside lmms-eval's environment."""
    inside = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", HERE / "in_lmms_eval.py"]
    assert " passed" in run(folder, *inside, MEGADUAL_TEST_EXPORT=folder / "hf")
