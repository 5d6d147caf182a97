"""`pretrain/pretrain.py` as a user starts it: two processes, resume, and what wrong input gets."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megadual.config import to_yaml
from megadual.evaluate.detector import Detector
from megadual.hf.draw_samples import main as main_of_samples
from megadual.run import exits
from megadual.synthetic.drawings import DRAWINGS
from megadual.testing.models import write_dualtoken, write_run
from megadual.testing.starts import Start
from pretrain.pretrain import main

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


def trained(folder, *arguments, ranks=1, code=0) -> Start:
    """A start that has ended with `code`, without the seconds that importing takes."""
    with Start(folder / "told", [*arguments, f"run.dir={folder}"], ranks) as start:
        assert start.wait() == [code] * ranks, start.stderr[-3000:]
    return start


def test_trains_and_resumes(inputs, tmp_path):
    run = [*inputs, f"run.dir={tmp_path}", "parallel.pipeline=2"]
    pretrain(*run, "train.steps=2")
    # Gone on with the same set at a URL: the same rows.
    at_url = f"data.sets=[file://{inputs[1].parent}/shards]", f"data.cache={tmp_path}/cache"
    resumed = pretrain(*run, "train.steps=4", *at_url)
    assert "not as in" not in resumed.stderr and len(list((tmp_path / "cache").iterdir())) >= 3
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss_text"] < steps[0]["loss_text"]
    assert steps[-1]["tokens"] == 4 * 256
    assert set(steps[0]) >= {
        "loss", "loss_text", "loss_semantic", "loss_pixel", "depth_semantic", "depth_pixel", "grad_norm", "lr",
        "tokens", "tokens_per_s", "model_tflops", "mfu", "fill", "data_wait_s", "checkpoint_wait_s",
    }  # fmt: skip
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000004"
    changed = "train.global_batch_tokens=512", "train.seed=7", "parallel.pipeline=1"
    again = trained(tmp_path, *run, "train.steps=5", *changed, "data.verify=true")
    assert "verified: " in again.stdout
    assert "not as in" in again.stderr and "goes on at row" in again.stderr
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == 4 * 256 + 512
    assert list(tmp_path.glob("wandb/offline-run-*"))


def dry_run(monkeypatch, capsys, *arguments, **environment) -> str:
    """What --dry-run prints, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["", "--dry-run", *map(str, arguments)])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main()
    return capsys.readouterr().out


def test_dry_run_prints_config_and_plan(inputs, tmp_path, monkeypatch, capsys):
    told = dry_run(monkeypatch, capsys, *inputs, f"run.dir={tmp_path / 'run'}", "train.steps=2", "parallel.pipeline=2")
    assert "seq_len: 64" in told
    assert "pipeline=2" in told and "60 documents" in told
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_inputs(inputs, monkeypatch, capsys):
    told = dry_run(monkeypatch, capsys, "--gpus=64", "--config=pretrain/configs/7b.yaml")
    for line in (
        r"assumed: not here: shard set 'not-given', model.dualtoken 'not-given', model.text_tokenizer 'not-given'",
        r"assumed: a text tokenizer of 151,936 ids",
        r"assumed: the DualToken siglip2-so400m-256-rvq4 \(model.dualtoken may name another: ",
        r"assumed: documents of a caption of 600 tokens and an image of 256 positions, of which 50% are drawn",
        r"in all: 209,715,200,000 positions, \d\.\d\de\+2\d model FLOPs$",
        r"parallel.layout=auto picks tensor=\d .*data=\d+ for 64 processes",
        r"expected on \w+: \d+\.\d\d s a step, [\d,]+ tokens/s a GPU, [\d,]+ in all, MFU \d\d\.\d%, \d+\.\d days for",
    ):
        assert re.search(f"^{line}", told, re.MULTILINE), line
    named = dry_run(monkeypatch, capsys, "--gpus=64", "--config=pretrain/configs/7b.yaml",
                    "model.dualtoken=siglip2-so400m-384-rvq8", "data.sets=[{path: nowhere, draw: 1.0}]")  # fmt: skip
    assert "shard set 'nowhere'" in named and "an image of 729 positions, of which 100% are drawn" in named
    assert "semantic: 8 codes among 16,384" in named
    given = OmegaConf.load(inputs[1])
    some = dry_run(monkeypatch, capsys, "--gpus=2", *inputs, "model.dualtoken=nowhere", "parallel.pipeline=2")
    assert "assumed: not here: model.dualtoken 'nowhere'\n" in some and "assumed: a text tokenizer" not in some
    assert "pipeline=2 data=1 on 2 processes" in some and given.data.sets[0].path in some


def test_a_plan_with_all_inputs_reads_them(inputs, monkeypatch, capsys):
    told = dry_run(monkeypatch, capsys, "--gpus=4", *inputs, "train.steps=1000", "parallel.layout=auto")
    assert "assumed" not in told and "60 documents" in told and "for 4 processes" in told
    assert re.search(r"remark: the 60 documents of '\S+' are read \d+ times", told)
    assert "remark" not in dry_run(monkeypatch, capsys, "--gpus=1", *inputs, "train.steps=1")
    assert dry_run(monkeypatch, capsys, *inputs, RANK="1", WORLD_SIZE="2") == ""


def test_auto_trains_and_picks_again_when_the_processes_change(inputs, tmp_path, monkeypatch, capsys):
    run = [*inputs, f"run.dir={tmp_path}", "parallel.layout=auto", "train.steps=2"]
    told = pretrain(*run, "run.ranks=2").stdout
    picked = re.search(r"parallel.layout=auto picks (.*) for 2 processes", told)
    assert picked and "anew" not in told and (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    recorded = OmegaConf.load(tmp_path / "config.yaml").parallel
    assert picked[1].startswith(f"tensor={recorded.tensor} pipeline={recorded.pipeline} ")
    assert recorded.layout == "auto" and recorded.stage_layers
    assert "anew" not in dry_run(monkeypatch, capsys, *run, "run.ranks=2")
    again = dry_run(monkeypatch, capsys, *run, "run.ranks=1")
    assert f"picked anew: the last start had {picked[1]} on 2 processes" in again


@pytest.mark.parametrize("model", ["3b", "7b", "3b_384", "7b_384"])
@pytest.mark.parametrize("stage, parts, draws, lr, rows", [
    ("1_projector", ["projector"], {0.0}, 1e-3, 64),
    ("2_projector_llm", ["projector", "llm"], {0.0, 0.5}, 2e-5, 256),
    ("3_heads", ["heads"], {1.0}, 1e-4, 128),
    ("4_all", ["projector", "llm", "heads"], {0.5, 1.0}, 1e-5, 512),
    ("5_instruct", ["projector", "llm", "heads"], {0.5, 1.0}, 2e-5, 128),
])  # fmt: skip
def test_stages_of_the_paper(inputs, tmp_path, monkeypatch, capsys, model, stage, parts, draws, lr, rows):
    """Each names its sets in the folder SETS; here they are all the tiny run's."""
    configs = [f"--config=pretrain/configs/{name}.yaml" for name in (model, f"stages/{stage}")]
    given = OmegaConf.load(inputs[1])
    own = [f"model.{key}={given.model[key]}" for key in ("dualtoken", "text_tokenizer")]
    named = re.findall(r"shards\}/([\w-]+)", (ROOT / f"pretrain/configs/stages/{stage}.yaml").read_text())
    for name in named:
        (tmp_path / name).symlink_to(given.data.sets[0].path)
    told = dry_run(monkeypatch, capsys, *configs, *own, "run.dir=nowhere", "--gpus=8", SETS=str(tmp_path))
    config, _, plan = told.partition("\n\n")
    run = OmegaConf.create(config)
    assert [each.path for each in run.data.sets] == [str(tmp_path / name) for name in named]
    assert (list(run.train.parts), {each.draw for each in run.data.sets}, run.train.lr) == (parts, draws, lr)
    assert run.train.global_batch_tokens == rows * 4096
    assert f"model: {36 if model.startswith('3b') else 28} layers" in plan
    assert f"{60 * len(named)} documents" in plan


@pytest.mark.parametrize("arguments, message", [
    (["parallel.tensor=3"], "model.heads=4 does not divide by parallel.tensor=3"),
    (["data.sets=[nowhere]"], "no finished shard set in 'nowhere'"),
    (["checkpoint.start=nowhere"], "'nowhere' is not a checkpoint"),
    (["model.text_tokenizer=nowhere"], "no text tokenizer in 'nowhere'"),
    (["model.dualtoken=nowhere"], "no DualToken in 'nowhere'"),
    (["run.samples_every=3", "run.samples=[a]"], "a multiple of checkpoint.every=2"),
    (["run.evaluate_every=2", "run.evaluate_detector=nowhere"], "run.evaluate_detector=nowhere is no file"),
    (["run.profile=[3]"], "run.profile=[3] must be two steps"),
    (["--gpus=8"], "--gpus 8 is for --dry-run alone"),
    (["--gpus=0", "--dry-run"], "--gpus 0 must be at least 1"),
    (["parallel.layout=auto", "parallel.tensor=2"], "parallel.tensor=2 is given, but parallel.layout=auto picks that"),
])  # fmt: skip
def test_wrong_input(inputs, tmp_path, monkeypatch, capsys, arguments, message):
    """In this process: it is refused before torch has anything to do with it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["", *map(str, inputs), f"run.dir={tmp_path}", "train.steps=2", *arguments])
    with pytest.raises(SystemExit, match=str(exits.WRONG_INPUT)):
        main()
    assert_one_error(capsys.readouterr().err, message)


def assert_one_error(told: str, message: str) -> None:
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in told


def test_a_start_with_wrong_input_ends_with_its_code(inputs, tmp_path):
    other = write_dualtoken(tmp_path / "other", seed=1)
    for argument, message in (
        ("train.stepz=3", "did you mean 'train.steps'"),
        (f"model.dualtoken={tmp_path / 'other'}", f"({other.fingerprint()[:12]}); tokenize the data again"),
    ):
        done = pretrain(*inputs, f"run.dir={tmp_path}", "train.steps=2", argument, ok=False)
        assert done.returncode == exits.WRONG_INPUT
        assert_one_error(done.stderr, message)


def test_draws_samples_from_checkpoints(inputs, tmp_path):
    run = [*inputs, "parallel.pipeline=2", "train.steps=4", "run.samples_every=2"]
    trained(tmp_path, *run, "run.samples=[a red square, blue]", ranks=2)
    checkpoint, picture = tmp_path / "checkpoints" / "00000004", tmp_path / "again.png"
    main_of_samples([str(checkpoint), "a red square", "blue", "--output", str(picture)])
    drawn = Image.open(tmp_path / "samples" / "00000004.png")
    assert drawn.tobytes() == Image.open(picture).tobytes() and drawn.width > drawn.height
    assert not list((tmp_path / "samples").glob("*export*"))
    # The last checkpoint came while the one before was still being drawn from.
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == ["00000002.png", "00000004.png"]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_4_*.png"))) == 2


def test_scores_checkpoints(inputs, tmp_path):
    detector, run = tmp_path / "detector.pt", [*inputs, "train.steps=2", "train.seq_len=128"]
    Detector(sorted(DRAWINGS), side=64, width=4).save(detector)
    trained(tmp_path, *run, "run.evaluate_every=2", f"run.evaluate_detector={detector}", "run.evaluate_scenes=3")
    report = json.loads((tmp_path / "evaluations/00000002/scenes.json").read_text())
    assert set(report["summary"]) == {"described", "answered", "drawn", "edited"} and report["scenes"] == 3
    assert report["model"]["path"] == str(tmp_path / "checkpoints/00000002")
    assert not list((tmp_path / "evaluations").glob("*export*"))
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"score_described" in written.read_bytes()


def test_profiles_steps_holds_out_and_writes_for_tensorboard(inputs, tmp_path):
    held_out = shutil.copytree(OmegaConf.load(inputs[1]).data.sets[0].path, tmp_path / "held_out")
    run = [
        *inputs,
        f"data.validation=[{held_out}]",
        "data.validation_every=3",
        "data.validation_rows=16",
        "run.wandb=disabled",
        "run.tensorboard=true",
        "train.steps=4",
    ]
    done = trained(tmp_path, *run, "run.profile=[2,3]")
    table = (tmp_path / "profile" / "steps-2-3.txt").read_text()
    assert table in done.stdout and "profile of 2 steps on CPU" in table and "aten::" in table
    shares = [float(line.split()[-1].rstrip("%")) for line in table.splitlines() if line.endswith("%")]
    assert len(shares) > 10 and max(shares) > 5
    with gzip.open(tmp_path / "profile" / "steps-2-3.json.gz") as file:
        assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    trained(tmp_path, *run, "train.steps=6")
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in written if "val_loss" in step] == [3, 4, 6]
    for tag, values in {
        "loss_text": [step["loss_text"] for step in written],
        "depth_pixel/1": [step["depth_pixel"][1] for step in written],
    }.items():
        found = scalars.Scalars(tag)
        assert [event.step for event in found] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in found] == pytest.approx(values)


def test_signal_saves_and_stops(inputs, tmp_path):
    """Two ranks, started here, of which both get each of two signals."""
    arguments = [*map(str, inputs), f"run.dir={tmp_path}", "train.steps=100000", "checkpoint.every=100000"]
    arguments.append("parallel.pipeline=2")
    process = subprocess.Popen([sys.executable, "pretrain/pretrain.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == exits.STOPPED
    finally:
        process.kill()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"{last:08d}"


def test_spikes_are_skipped_and_named_until_there_are_too_many(inputs, tmp_path):
    spikes = ["train.bad_loss=skip", "train.spike_factor=0.5", "train.spike_window=2", "train.max_skipped=3"]
    done = trained(tmp_path, *inputs, "train.steps=9", "checkpoint.every=3", *spikes, code=exits.BAD_LOSS)
    assert "warning: skipped: step 3: loss" in done.stderr and "error: step 5: loss" in done.stderr
    bad = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in bad] == [3, 4, 5] and all(step["documents"] for step in bad)
    progress = json.loads((tmp_path / "checkpoints" / "00000003" / "progress.json").read_text())
    assert (progress["step"], progress["updates"], progress["data"]["row"]) == (3, 2, 3 * 4)


def test_loss_that_is_not_finite_stops_and_names_documents(inputs, tmp_path):
    steep = "train.steps=8", "train.lr=1e30", "train.min_lr=1e29"
    done = trained(tmp_path, *inputs, *steep, code=exits.BAD_LOSS)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: step \d+: loss nan", line) and "random-0/0000" in line
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["loss"] is None
