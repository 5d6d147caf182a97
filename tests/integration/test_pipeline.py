"""The pipeline end to end on Ray: counts, bytes, restarts, refusals, and what reads the set afterwards."""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from PIL import Image
from ray.cluster_utils import Cluster

from data_pipeline import browse, verify
from data_pipeline.config import PipelineConfig
from data_pipeline.plan import make_plan
from data_pipeline.run import main, tokenize
from megadual.cluster import worker_count
from megadual.config import load_config
from megadual.data.cache import Cache
from megadual.data.mds import StreamingDataset
from megadual.data.mds_reader import ShardSet
from megadual.errors import UserError
from megadual.streams import ImageUse, Marks, Role, SpecialIds, TurnBit
from megadual.synthetic.corpus import make_corpus
from megadual.testing.models import write_dualtoken
from megadual.testing.raw import (
    image_structs,
    plain_image,
    write_entries,
    write_folder,
    write_img2dataset_parquet,
    write_json_lines,
    write_pages_tar,
    write_parquet,
)
from megadual.text import load_text_tokenizer, read_captions, save_text_tokenizer, train_text_tokenizer
from megadual.vision import DualToken

ROOT = Path(__file__).resolve().parents[2]
TRAIN, HELDOUT, BROKEN, BAD = 600, 60, 20, 8
PAGES = [["A cat", plain_image(1), "and a dog", plain_image(2)], ["text alone"], [plain_image(3), "one <image> here"]]
LINES = ["a text", "another text", "a text"]
ROWS, NOT_DOWNLOADED = 12, (3, 5)
CHAT = [
    {"image": "a/4.png", "conversations": [{"from": "human", "value": "<image>\nWhat <|im_end|>?"},
                                           {"from": "gpt", "value": "A plain picture."}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
]  # fmt: skip
EDITS = 3
SAMPLES = TRAIN + HELDOUT + BROKEN + len(PAGES) + len(LINES) + ROWS + len(CHAT) + EDITS
GOOD_IMAGES = TRAIN + HELDOUT + BROKEN + 3 + ROWS - len(NOT_DOWNLOADED) + 1 + 2 * EDITS
LEFT_OUT = {"duplicate": 1, "not_downloaded": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Input shards of every kind, one of them with broken samples, and both tokenizers."""
    folder = tmp_path_factory.mktemp("inputs")
    make_corpus(folder / "corpus", train=TRAIN, heldout=HELDOUT, size=32)
    write_pages_tar(folder / "corpus" / "pages.tar", PAGES)
    write_img2dataset_parquet(folder / "corpus" / "rows.parquet", ROWS, NOT_DOWNLOADED)
    write_json_lines(folder / "corpus" / "lines.jsonl.gz", LINES)
    write_entries(folder / "corpus" / "chat.json.gz", CHAT)
    write_folder(folder / "images", {"a/4.png": plain_image(4)})
    write_parquet(
        folder / "corpus" / "edits.parquet",
        original_image=image_structs([plain_image(i) for i in range(EDITS)]),
        edit_prompt=["make it green"] * EDITS,
        edited_image=image_structs([plain_image(i + 1) for i in range(EDITS)]),
    )
    write_dualtoken(folder / "dualtoken")
    captions = read_captions(f"{folder}/corpus/train-*.tar")
    save_text_tokenizer(train_text_tokenizer(captions, 400), folder / "text_tokenizer")
    return folder


def arguments(inputs: Path, output: Path | str, *overrides: str) -> list[str]:
    return [
        f"inputs=['{inputs}/corpus/*.*[rtz]']",
        f"output={output}",
        f"dualtoken={inputs}/dualtoken",
        f"text_tokenizer={inputs}/text_tokenizer",
        "encode.batch_size=16",
        f"read.image_root={inputs}/images",
        *overrides,
    ]


def make_config(inputs: Path, output: Path | str, *overrides: str) -> PipelineConfig:
    return load_config(PipelineConfig, None, arguments(inputs, output, *overrides))


@pytest.fixture(scope="module")
def s3():
    """A bucket on an S3 server of this machine, which this process and the cluster's workers find."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"):  # the second is StreamingDataset's
            patch.setenv(name, f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3):
    """One Ray of two CPUs for the module, with a dashboard; the pipeline joins a Ray that is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True})
        ray.init(address=started.address, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


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


def test_every_sample_has_one_outcome(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    bad = [json.loads(line) for line in (shards / "quarantine.jsonl").read_text().splitlines()]
    assert manifest["samples"] == SAMPLES
    assert manifest["quarantined"] == len(bad) == BAD
    assert manifest["left_out"] == LEFT_OUT and manifest["failed_inputs"] == {}
    assert manifest["documents"] == SAMPLES - BAD - sum(LEFT_OUT.values())
    assert manifest["images"] == GOOD_IMAGES - BAD
    assert manifest["positions"] == 16 * manifest["images"]
    names = [shard["folder"] for shard in manifest["shards"]]
    assert names == ["broken-00000", "chat", "edits", "heldout-00000", "lines", "pages", "rows", "train-00000"]
    assert all(line["key"].startswith("broken-00000/") and line["reason"] for line in bad)


def test_lengths_are_noted_beside_the_documents(inputs, shards):
    marks = Marks.of(load_text_tokenizer(inputs / "text_tokenizer"))
    documents, noted = ShardSet(shards), ShardSet(shards).lengths
    for i, document in enumerate(documents[i] for i in range(len(documents))):
        assert document.lengths(marks) == tuple(column[i] for column in noted)
    assert noted.positions.sum() == json.loads((shards / "manifest.json").read_text())["positions"]


def test_pages_and_texts_come_back(inputs, shards):
    """What the trainer reads: order of text and images, documents without images, a spelled-out special token."""
    tokenizer = load_text_tokenizer(inputs / "text_tokenizer")
    image = SpecialIds.of(tokenizer).image
    made = ShardSet(shards)
    documents = {document.key: document for document in (made[i] for i in range(len(made)))}

    def parts(key: str) -> list[str]:
        ids = documents[key].text_ids
        cuts = np.flatnonzero(ids == image)
        return [tokenizer.decode(piece[piece != image]) for piece in np.split(ids, cuts)]

    assert parts("pages/page-0000") == ["A cat", "and a dog", ""]
    assert documents["pages/page-0000"].grids.tolist() == [[4, 4], [4, 4]]
    assert documents["pages/page-0000"].codes["semantic"].shape == (32, 3)
    assert parts("pages/page-0001") == ["text alone"] and len(documents["pages/page-0001"].grids) == 0
    assert parts("pages/page-0002") == ["", "one <image> here"]
    assert parts("lines/00000001") == ["another text"] and "lines/00000002" not in documents
    assert parts("rows/000000004") == ["", "plain picture 4"]
    assert parts("chat/00000000") == ["", "What <|im_end|>?A plain picture."]
    assert documents["chat/00000000"].turns[:, 1:].tolist() == [[Role.USER, 0], [Role.ASSISTANT, TurnBit.LOSS]]
    assert documents["edits/00000002"].turns[:, 1:].tolist() == [
        [Role.USER, TurnBit.DROPPABLE], [Role.ASSISTANT, TurnBit.LOSS]
    ]  # fmt: skip
    assert documents["edits/00000002"].image_use.tolist() == [ImageUse.LOOKED_AT | ImageUse.DROPPABLE, ImageUse.DRAWN]


def test_streaming_dataset_reads_the_documents(inputs, shards):
    """A plain StreamingDataset opens the root, manifest and all, and every row is its sample."""
    dualtoken = DualToken.from_pretrained(inputs / "dualtoken")
    tokenizer = load_text_tokenizer(inputs / "text_tokenizer")
    image = SpecialIds.of(tokenizer).image
    rows = {row["key"]: row for row in StreamingDataset(local=str(shards), batch_size=1, shuffle=False)}
    assert len(rows) == SAMPLES - BAD - sum(LEFT_OUT.values())
    with tarfile.open(inputs / "corpus" / "train-00000.tar") as tar:
        for index in (0, 17, TRAIN - 1):
            row = rows[f"train-00000/train-{index:06d}"]
            caption = tar.extractfile(f"train-{index:06d}.txt").read().decode()
            picture = Image.open(io.BytesIO(tar.extractfile(f"train-{index:06d}.png").read()))
            codes = dualtoken.encode(dualtoken.preprocess(picture)[None])
            assert row["text_ids"][0] == image
            assert tokenizer.decode(row["text_ids"][1:]) == caption
            assert row["grids"].tolist() == [[4, 4]]
            for stream, expected in codes.codes.items():
                assert row[stream].dtype == np.uint16
                assert torch.equal(torch.from_numpy(row[stream].astype(np.int64)), expected[0].flatten(0, 1))
            assert row["meta"]["sizes"] == [[32, 32]]


def test_running_again_changes_no_byte(inputs, shards):
    before = hashes(shards)
    tokenize(make_config(inputs, shards, "workers.count=1"))
    assert hashes(shards) == before


def wait_for_writer(output: Path, shard: str) -> int:
    """The process that is now writing the shard, as soon as there is one."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for folder in (output / "_tmp").glob(f"{shard}.*"):
            return int(folder.name.split(".")[-2])
        time.sleep(0.002)
    raise TimeoutError(f"no worker writes {shard}")


class Disturbance(threading.Thread):
    """Calls `strike` with the id of the process that writes the shard, as soon as there is one."""

    def __init__(self, output: Path, shard: str, strike):
        super().__init__(daemon=True)
        self.output, self.shard, self.strike = output, shard, strike
        self.start()

    def run(self) -> None:
        self.strike(wait_for_writer(self.output, self.shard))


def test_killed_worker_changes_no_byte(inputs, shards, tmp_path):
    """One worker instead of two, and it is killed while it writes: the set is the same."""
    output = tmp_path / "shards"
    disturbance = Disturbance(output, "train-00000", lambda pid: os.kill(pid, signal.SIGKILL))
    tokenize(make_config(inputs, output, "workers.count=1"))
    disturbance.join(timeout=5)
    assert not disturbance.is_alive()
    assert hashes(output) == hashes(shards)


def test_lost_node_changes_no_byte(inputs, shards, cluster, tmp_path):
    """The node of the only worker is killed while it writes; another node takes over, and the set is the same."""
    output = tmp_path / "shards"
    nodes = {node.all_processes["raylet"][0].process.pid: node for node in (cluster.add_node(num_cpus=3) for _ in "ab")}

    def lose_node(pid: int) -> None:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        cluster.remove_node(nodes.pop(parent), allow_graceful=False)

    disturbance = Disturbance(output, "train-00000", lose_node)
    tokenize(make_config(inputs, output, "workers.count=1", "workers.cpus=3"))  # the head has room for two
    disturbance.join(timeout=20)
    assert len(nodes) == 1
    cluster.remove_node(*nodes.values())
    assert hashes(output) == hashes(shards)


def test_killed_driver_goes_on(inputs, shards, cluster, tmp_path):
    """Started in its own folder, where `tokenize.py` hides the standard library's from the driver and its workers."""
    output = tmp_path / "shards"
    command = [sys.executable, "tokenize.py", *arguments(inputs, output, "workers.count=1")]
    place = {"cwd": ROOT / "data_pipeline", "env": {**os.environ, "RAY_ADDRESS": cluster.address}}
    driver = subprocess.Popen(command, **place)
    wait_for_writer(output, "train-00000")
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert (output / "heldout-00000" / "_SUCCESS").exists() and not (output / "manifest.json").exists()
    again = subprocess.run(command, **place, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{SAMPLES} samples in: " in again.stdout
    assert hashes(output) == hashes(shards)


def test_ray_job_submit(inputs, shards, cluster, tmp_path):
    output = tmp_path / "shards"
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(ROOT), "--"]
    program = [sys.executable, "data_pipeline/tokenize.py", *arguments(inputs, output, "workers.count=1")]
    done = subprocess.run(
        [*submit, *program],
        env={**os.environ, "RAY_ADDRESS": f"http://{cluster.head_node.webui_url}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SAMPLES} samples in: " in done.stdout
    assert hashes(output) == hashes(shards)


def test_from_bucket_to_bucket(inputs, shards, cluster, s3, tmp_path):
    """Objects have the bytes that a local set has; a folder without its marker is not taken for done.

    An input that cannot be read is named and stops nothing while such are few.
    """
    files = fsspec.filesystem("s3")
    names = ("heldout-00000.tar", "pages.tar", "broken-00000.tar")
    for name in names:
        files.put_file(str(inputs / "corpus" / name), f"bucket/corpus/{name}")
    files.pipe_file("bucket/set/heldout-00000/shard.00000.mds", b"half written")
    locked = tmp_path / "locked.tar"
    locked.mkdir()  # a folder cannot be read as a file
    config = make_config(
        inputs, f"{s3}/set", "workers.count=1", "max_bad_fraction=0.4",
        f"inputs=[{s3}/corpus/*-00000.tar, {s3}/corpus/pages.tar, {locked}]",
    )  # fmt: skip
    manifest = tokenize(config)
    assert list(manifest["failed_inputs"]) == [str(locked)]
    assert str(locked) in files.cat_file("bucket/set/quarantine.jsonl").decode()
    assert manifest["documents"] == HELDOUT + BROKEN - BAD + len(PAGES)
    for shard in manifest["shards"]:
        for file in shard["files"]:
            data = files.cat_file(f"bucket/set/{shard['folder']}/{file['file']}")
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
    assert [shard.name for shard in make_plan(config).todo] == ["locked"]
    verify.main([f"{s3}/set"])

    remote = StreamingDataset(remote=f"{s3}/set", local=str(tmp_path / "cache"), batch_size=1, shuffle=False)
    rows = {row["key"]: row for row in remote}
    local = StreamingDataset(local=str(shards), batch_size=1, shuffle=False)
    expected = {row["key"]: row for row in local if row["key"] in rows}
    assert len(rows) == manifest["documents"] and rows.keys() == expected.keys()
    for key, row in rows.items():
        for column in ("text_ids", "semantic", "pixel", "grids"):
            assert np.array_equal(row[column], expected[key][column])

    in_store, on_disk = ShardSet(f"{s3}/set", cache=Cache(tmp_path / "trainer")), ShardSet(shards)
    known = {document.key: document for document in (on_disk[i] for i in range(len(on_disk)))}
    for document in (in_store[i] for i in range(len(in_store))):
        assert np.array_equal(document.codes["pixel"], known[document.key].codes["pixel"])
    browse.main([f"{s3}/set", "--output", str(tmp_path / "page.html"), "-n", "3"])
    assert (tmp_path / "page.html").read_text().count("<article>") == 3

    with pytest.raises(UserError, match="nowhere/set/manifest.json' can't be read: NoSuchBucket"):
        ShardSet("s3://nowhere/set", cache=Cache(tmp_path / "trainer"))
    with pytest.raises(UserError, match="cannot write to 's3://nowhere/set'"):
        tokenize(dataclasses.replace(config, output="s3://nowhere/set"))
    files.rm_file("bucket/set/pages/shard.00000.mds")
    with pytest.raises(SystemExit):
        verify.main([f"{s3}/set"])


def test_verify_names_what_does_not_hold(shards, tmp_path, capsys):
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    verify.main([str(damaged)])
    assert "all as written" in capsys.readouterr().out

    file = damaged / "heldout-00000" / "shard.00000.mds"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    shutil.rmtree(damaged / "lines")
    shutil.copytree(damaged / "rows", damaged / "stray")
    with pytest.raises(SystemExit) as stopped:
        verify.main([str(damaged)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    damage = ("heldout-00000/shard.00000.mds: its SHA-256 is", "lines/lengths.npy: does not exist")
    for words in (*damage, "stray: committed, but not in"):
        assert words in said


def test_browse_shows_the_set(shards, tmp_path, capsys):
    browse.main([str(shards), "--output", str(tmp_path / "page.html"), "-n", "700"])
    assert f"{SAMPLES:,}" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    images = json.loads((shards / "manifest.json").read_text())["images"]
    assert page.count("data:image/png") == images
    assert "one &lt;image&gt; here" in page and "another text" in page and "the image has 0 bytes" in page
    # An edit and a conversation as they are trained: who speaks, what has a loss, what may be dropped.
    picture = r'<img alt="" src="[^"]*">'
    asks = (
        rf'<section class="turn droppable"><b>user</b><figure class="looked droppable">{picture}<figcaption>looked at'
    )
    draws = rf'<section class="turn loss"><b>assistant</b><figure class="drawn">{picture}<figcaption>drawn</figcaption>'
    assert (
        len(re.findall(asks + ", may be dropped</figcaption></figure><div>make it green</div></section>" + draws, page))
        == EDITS
    )
    assert re.search(
        rf'<section class="turn"><b>user</b><figure class="looked">{picture}<figcaption>looked at</figcaption></figure>'
        r"<div>What &lt;\|im_end\|&gt;\?</div></section>"
        r'<section class="turn loss"><b>assistant</b><div>A plain picture.</div></section>',
        page,
    )


def test_more_inputs_extend_the_set(inputs, cluster, tmp_path):
    """A shard that cannot be read is tried again, then named; the set goes on from there once it can be."""
    corpus, output = tmp_path / "corpus", tmp_path / "shards"
    corpus.mkdir()
    shutil.copy(inputs / "corpus" / "heldout-00000.tar", corpus)
    (corpus / "locked.tar").mkdir()  # a folder cannot be read as a file
    config = make_config(inputs, output, f"inputs=['{corpus}/*.tar']", "workers.count=1")
    with pytest.raises(UserError, match=r"1 of 2 input shards failed 3 times(.|\n)*locked.tar: IsADirectoryError"):
        tokenize(config)
    assert not (output / "manifest.json").exists()
    assert (output / "heldout-00000" / "_SUCCESS").exists()

    (corpus / "locked.tar").rmdir()
    shutil.copy(inputs / "corpus" / "broken-00000.tar", corpus / "locked.tar")
    manifest = tokenize(dataclasses.replace(config, max_bad_fraction=0.2))
    assert [shard["folder"] for shard in manifest["shards"]] == ["heldout-00000", "locked"]
    assert manifest["images"] == HELDOUT + BROKEN - BAD


def test_too_many_unusable_samples_stop_the_run(inputs, shards):
    with pytest.raises(
        UserError, match=f'{BAD} of {SAMPLES} samples are unusable: once ".*".*quarantine.jsonl.*remove its folder'
    ):
        tokenize(make_config(inputs, shards, "max_bad_fraction=0.01"))


def test_early_stop_is_no_finished_set(inputs, cluster, tmp_path, monkeypatch):
    """The set as a whole is within the bound, but what was added is not: it stops, and inputs are missing."""
    monkeypatch.setattr("data_pipeline.cluster.SAMPLES_BEFORE_STOP", BROKEN)
    corpus, output = tmp_path / "corpus", tmp_path / "shards"
    corpus.mkdir()
    shutil.copy(inputs / "corpus" / "heldout-00000.tar", corpus)
    config = make_config(inputs, output, f"inputs=['{corpus}/*.tar']", "workers.count=1", "max_bad_fraction=0.15")
    tokenize(config)
    for name in "xyz":
        shutil.copy(inputs / "corpus" / "broken-00000.tar", corpus / f"{name}.tar")
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="stopped early, .* 2 of 4 input shards are not done; see .*quarantine.jsonl"):
        tokenize(config)
    assert (output / "manifest.json").read_bytes() == before
    assert len(tokenize(dataclasses.replace(config, max_bad_fraction=0.5))["shards"]) == 4


def test_waits_for_a_node_and_says_so(inputs, cluster, tmp_path, monkeypatch):
    """A cluster that was joined may grow; one that was started here cannot."""
    monkeypatch.setattr("megadual.cluster.SECONDS_BEFORE_WORD", 0.5)
    said, nodes = [], []

    def message(board, message: str) -> None:
        said.append(message)
        if not nodes:
            nodes.append(cluster.add_node(num_cpus=3))

    monkeypatch.setattr("data_pipeline.board.Board.message", message)
    inputs_and_workers = [f"inputs=['{inputs}/corpus/lines.jsonl.gz']", "workers.count=2", "workers.cpus=3"]
    config = make_config(inputs, tmp_path / "shards", *inputs_and_workers)
    with pytest.raises(UserError, match="workers: one needs 3.0 CPUs and 0.0 GPUs on one node, the cluster has 2.0"):
        worker_count(config.workers, 5, can_grow=False)
    assert tokenize(config)["documents"] == 2
    assert said[0].startswith("waiting for a worker: one needs 3.0 CPUs")
    cluster.remove_node(*nodes)


def test_own_cluster_without_room_is_an_error(inputs, tmp_path):
    overrides = ["workers.address=local", "workers.count=4", "workers.gpus=1000"]
    command = [sys.executable, "data_pipeline/tokenize.py", *arguments(inputs, tmp_path / "out", *overrides)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: workers: one needs 1.0 CPUs and 1000.0 GPUs on one node" in done.stderr


def test_other_precision_is_refused(inputs, shards):
    """CPU and GPU do not pick the same codes."""
    assert json.loads((shards / "manifest.json").read_text())["config"]["precision"] == "fp32"
    with pytest.raises(UserError, match=r"encoded in fp32 \(.*would encode in bf16; start it with workers.gpus=0"):
        make_plan(make_config(inputs, shards, "workers.gpus=0.5"))


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
        ("output=s4://bucket/set", "cannot be opened"),
        ("encode.batch_size=0", "encode.batch_size=0 must be at least 1"),
        ("encode.bath_size=1", "did you mean 'encode.batch_size'"),
    ],
)
def test_mistakes_are_told_before_work_starts(inputs, tmp_path, capsys, override, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(inputs, tmp_path / "out", override))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_estimates(inputs, shards, tmp_path, capsys):
    main(["--dry-run", *arguments(inputs, tmp_path / "out")])
    said = capsys.readouterr().out
    for name, format in (("chat.json.gz", "conversations"), ("edits.parquet", "edit"), ("train-00000.tar", "pair")):
        assert re.search(rf"{name} .* to do: {format}\n", said)
    assert "8 input shards, 8 to do" in said and "measured here" in said
    samples, size = (float(said.split(before)[1].split()[0]) for before in ("about ", " samples -> "))
    assert abs(samples - SAMPLES) < 0.15 * samples
    made = sum(path.stat().st_size for path in shards.rglob("*.mds")) / 1e6
    assert abs(size - made) < 0.25 * made
    assert not (tmp_path / "out").exists()
    main(["--dry-run", *arguments(inputs, tmp_path / "out", "workers.samples_per_second=0.5", "workers.count=2")])
    assert f"{samples / 60:.1f} min of encoding" in capsys.readouterr().out
