"""The pipeline end to end on Ray: counts, bytes, restarts, refusals, and what reads the set afterwards."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from data_pipeline.cluster import connect
from data_pipeline.config import PipelineConfig, WorkersConfig
from data_pipeline.plan import make_plan
from data_pipeline.run import main, tokenize
from megadual.config import load_config
from megadual.data.mds import StreamingDataset
from megadual.errors import UserError
from megadual.streams import SpecialIds
from megadual.testing.corpus import make_corpus
from megadual.testing.models import write_dualtoken
from megadual.text import load_text_tokenizer, read_captions, save_text_tokenizer, train_text_tokenizer
from megadual.vision import DualToken

ROOT = Path(__file__).resolve().parents[2]
TRAIN, HELDOUT, BROKEN, BAD = 600, 60, 20, 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A corpus of three tars, one of them with broken samples, and both tokenizers."""
    folder = tmp_path_factory.mktemp("inputs")
    make_corpus(folder / "corpus", train=TRAIN, heldout=HELDOUT, size=32)
    write_dualtoken(folder / "dualtoken")
    captions = read_captions(f"{folder}/corpus/train-*.tar")
    save_text_tokenizer(train_text_tokenizer(captions, 400), folder / "text_tokenizer")
    return folder


def make_config(inputs: Path, output: Path, *overrides: str) -> PipelineConfig:
    return load_config(
        PipelineConfig,
        None,
        [
            f"inputs=['{inputs}/corpus/*.tar']",
            f"output={output}",
            f"dualtoken={inputs}/dualtoken",
            f"text_tokenizer={inputs}/text_tokenizer",
            "encode.batch_size=16",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def cluster():
    """One Ray for the module; the pipeline joins a Ray that is there."""
    assert connect(WorkersConfig(address="local", count=2))
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def shards(inputs, cluster, tmp_path_factory) -> Path:
    """The set made by two undisturbed workers."""
    output = tmp_path_factory.mktemp("set") / "shards"
    tokenize(make_config(inputs, output, "workers.count=2"))
    return output


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_image_has_one_outcome(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    bad = [json.loads(line) for line in (shards / "quarantine.jsonl").read_text().splitlines()]
    assert manifest["samples"] == TRAIN + HELDOUT + BROKEN
    assert manifest["quarantined"] == len(bad) == BAD
    assert manifest["documents"] == manifest["images"] == manifest["samples"] - BAD
    assert manifest["positions"] == 16 * manifest["images"]
    assert [shard["folder"] for shard in manifest["shards"]] == ["broken-00000", "heldout-00000", "train-00000"]
    assert all(line["key"].startswith("broken-00000/") and line["reason"] for line in bad)
    for shard in manifest["shards"]:
        for file in shard["files"]:
            assert hashlib.sha256((shards / shard["folder"] / file["file"]).read_bytes()).hexdigest() == file["sha256"]


def test_streaming_dataset_reads_the_documents(inputs, shards):
    """A plain StreamingDataset opens the root, manifest and all, and every row is its sample."""
    dualtoken = DualToken.from_pretrained(inputs / "dualtoken")
    tokenizer = load_text_tokenizer(inputs / "text_tokenizer")
    image = SpecialIds.of(tokenizer).image
    rows = {row["key"]: row for row in StreamingDataset(local=str(shards), batch_size=1, shuffle=False)}
    assert len(rows) == TRAIN + HELDOUT + BROKEN - BAD
    with tarfile.open(inputs / "corpus" / "train-00000.tar") as tar:
        for index in (0, 17, TRAIN - 1):
            row = rows[f"train-00000/train-{index:06d}"]
            caption = tar.extractfile(f"train-{index:06d}.txt").read().decode()
            picture = Image.open(io.BytesIO(tar.extractfile(f"train-{index:06d}.png").read()))
            codes = dualtoken.encode(dualtoken.preprocess(picture)[None])
            assert row["text_ids"][0] == image
            assert tokenizer.decode(row["text_ids"][1:]) == caption
            assert row["grids"].tolist() == [[4, 4]]
            assert row["semantic"].dtype == np.uint16
            assert torch.equal(torch.from_numpy(row["semantic"].astype(np.int64)), codes.semantic[0].flatten(0, 1))
            assert torch.equal(torch.from_numpy(row["pixel"].astype(np.int64)), codes.pixel[0].flatten(0, 1))
            assert row["meta"]["size"] == [32, 32]


def test_running_again_changes_no_byte(inputs, shards):
    before = hashes(shards)
    tokenize(make_config(inputs, shards, "workers.count=1"))
    assert hashes(shards) == before


def test_killed_worker_changes_no_byte(inputs, shards, tmp_path):
    """One worker instead of two, and it is killed while it writes: the set is the same."""
    output, killed = tmp_path / "shards", []

    def kill_first_writer_of_train() -> None:
        while not killed:
            for folder in (output / "_tmp").glob(f"train-00000.{socket.gethostname()}.*"):
                pid = int(folder.name.split(".")[-2])
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break
            time.sleep(0.002)

    killer = threading.Thread(target=kill_first_writer_of_train, daemon=True)
    killer.start()
    tokenize(make_config(inputs, output, "workers.count=1"))
    killer.join(timeout=5)
    assert killed
    assert hashes(output) == hashes(shards)


def test_started_in_its_own_folder_on_a_running_cluster(inputs, shards, cluster, tmp_path):
    """There `tokenize.py` hides the standard library's `tokenize`, from the driver and from its workers."""
    broken = inputs / "corpus" / "broken-00000.tar"
    done = subprocess.run(
        [
            sys.executable, "tokenize.py", f"inputs=['{broken}']", f"output={tmp_path}/out", "max_bad_fraction=1",
            f"dualtoken={inputs}/dualtoken", f"text_tokenizer={inputs}/text_tokenizer", "encode.batch_size=16",
            "workers.count=1",
        ],
        cwd=ROOT / "data_pipeline",
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "20 images in: 12 written, 8 quarantined" in done.stdout
    name = "broken-00000/shard.00000.mds"
    assert (tmp_path / "out" / name).read_bytes() == (shards / name).read_bytes()


def test_more_inputs_extend_the_set(inputs, shards, cluster, tmp_path):
    """A shard that cannot be read is tried again, then named; the set goes on from there once it can be."""
    corpus, output = tmp_path / "corpus", tmp_path / "shards"
    corpus.mkdir()
    shutil.copy(inputs / "corpus" / "heldout-00000.tar", corpus)
    (corpus / "locked.tar").mkdir()  # a folder cannot be read as a file
    config = make_config(tmp_path, output, f"dualtoken={inputs}/dualtoken", f"text_tokenizer={inputs}/text_tokenizer")
    with pytest.raises(UserError, match=r"1 input shards failed 3 times(.|\n)*locked.tar: IsADirectoryError"):
        tokenize(config)
    assert not (output / "manifest.json").exists()
    assert (output / "heldout-00000" / "_SUCCESS").exists()

    (corpus / "locked.tar").rmdir()
    shutil.copy(inputs / "corpus" / "broken-00000.tar", corpus / "locked.tar")
    manifest = tokenize(dataclasses.replace(config, max_bad_fraction=0.2))
    assert [shard["folder"] for shard in manifest["shards"]] == ["heldout-00000", "locked"]
    assert manifest["images"] == HELDOUT + BROKEN - BAD


def test_too_many_unusable_samples_stop_the_run(inputs, shards):
    with pytest.raises(UserError, match=f"{BAD} of 680 samples are unusable.*quarantine.jsonl"):
        tokenize(make_config(inputs, shards, "max_bad_fraction=0.01"))


def test_other_tokenizers_are_refused(inputs, shards, tmp_path):
    made = json.loads((shards / "manifest.json").read_text())
    other = write_dualtoken(tmp_path / "dualtoken", seed=1).fingerprint()
    with pytest.raises(UserError) as refused:
        make_plan(make_config(inputs, shards, f"dualtoken={tmp_path}/dualtoken"))
    assert made["dualtoken"]["fingerprint"][:16] in str(refused.value) and other[:16] in str(refused.value)

    save_text_tokenizer(train_text_tokenizer(["a cat"], 280), tmp_path / "text_tokenizer")
    with pytest.raises(UserError) as refused:
        make_plan(make_config(inputs, shards, f"text_tokenizer={tmp_path}/text_tokenizer"))
    assert made["text_tokenizer"]["fingerprint"][:16] in str(refused.value)

    with pytest.raises(UserError, match="filters.min_side=16 .* this run has 20"):
        make_plan(make_config(inputs, shards, "filters.min_side=20"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("inputs=['nowhere/*.tar']", "matches no file"),
        ("dualtoken=nowhere", "folder 'nowhere' does not exist"),
        ("text_tokenizer=nowhere", "no text tokenizer in 'nowhere'"),
        ("output=s3://bucket/set", "is a URL"),
        ("encode.batch_size=0", "encode.batch_size: 0"),
        ("encode.bath_size=1", "did you mean 'encode.batch_size'"),
    ],
)
def test_mistakes_are_told_before_work_starts(inputs, tmp_path, capsys, override, message):
    with pytest.raises(SystemExit) as stopped:
        main([f"inputs=['{inputs}/corpus/*.tar']", f"output={tmp_path}/out", f"dualtoken={inputs}/dualtoken",
              f"text_tokenizer={inputs}/text_tokenizer", override])  # fmt: skip
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_inputs_and_estimates(inputs, tmp_path, capsys):
    main(["--dry-run", f"inputs=['{inputs}/corpus/*.tar']", f"output={tmp_path}/out",
          f"dualtoken={inputs}/dualtoken", f"text_tokenizer={inputs}/text_tokenizer"])  # fmt: skip
    said = capsys.readouterr().out
    assert "3 input shards, 3 to do" in said
    estimate = int(said.split("about ")[1].split(" samples")[0])
    assert abs(estimate - (TRAIN + HELDOUT + BROKEN)) < 0.15 * estimate
    assert not (tmp_path / "out").exists()
