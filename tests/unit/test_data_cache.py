"""Sets at URLs: what is trained is what a disk gives, and files come into the cache once, whole or not at all."""

import hashlib
import multiprocessing
import os
import time
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
import torch
from s3fs import S3FileSystem

from megadual import steady_file
from megadual.config import load_config
from megadual.data import cache as cache_module
from megadual.data.cache import Cache, StoreError
from megadual.data.dataset import PackedDataset
from megadual.data.mds_reader import ShardSet
from megadual.data.source import Source
from megadual.errors import UserError
from megadual.steady_file import SteadyFile
from megadual.testing.shards import SPECIAL, random_conversations, write_shard_set
from megadual.train.config import PretrainConfig, SetConfig

SHARD = 4096  # bytes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_shard_set(tmp_path_factory.mktemp("sets") / "set", random_conversations(120), shard_bytes=SHARD)
    assert len(list(root.glob("part/*.mds"))) >= 8
    return root


@pytest.fixture
def url(root):
    """The set in a store of this process."""
    store = fsspec.filesystem("memory")
    for path in root.rglob("*.*"):
        store.pipe_file(f"/sets/set/{path.relative_to(root)}", path.read_bytes())
    yield "memory://sets/set"
    store.rm("/sets", recursive=True)


@pytest.fixture
def opened(monkeypatch):
    """How often each file was opened at its store, by its name."""
    counts, original = Counter(), fsspec.open
    monkeypatch.setattr(
        fsspec, "open", lambda url, mode: counts.update([url.rpartition("/")[2]]) or original(url, mode)
    )
    return counts


def data_of(path, cache=None, rank=0, ranks=1):
    source = Source(ShardSet(path, cache=cache), SetConfig(str(path)))
    return PackedDataset([source], SPECIAL, 128, 1, 4, 0, rank, ranks)


def assert_same_steps(data, expected, steps, after=lambda: None):
    for s, (batches, position), (others, other) in zip(range(steps), data.iterate(), expected.iterate(), strict=False):
        assert position["row"] == other["row"] and position["windows"] == other["windows"]
        for batch, known in zip(batches, others, strict=True):
            assert batch.keys == known.keys and torch.equal(batch.tokens, known.tokens), s
            assert all(torch.equal(codes, known.codes[stream]) for stream, codes in batch.codes.items())
        after()


def test_a_url_gives_the_rows_that_a_disk_does_each_file_fetched_once(root, url, opened, tmp_path):
    data = data_of(url, Cache(tmp_path / "cache"))
    assert not any(name.endswith(".mds") for name in opened)  # rows are packed without the documents
    assert_same_steps(data, data_of(root), 30)
    shards = [name for name in opened if name.endswith(".mds")]
    assert len(shards) == len(list(root.glob("part/*.mds"))) and set(opened.values()) == {1}
    again = data_of(url, Cache(tmp_path / "cache"))
    assert torch.equal(again.step(3)[0].tokens, data_of(root).step(3)[0].tokens)
    assert all(opened[name] == 1 for name in shards)  # another start finds them there
    whole = {hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("part/*.*[sy]")}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {*whole, cache_module.LOCK}


def test_the_oldest_are_evicted_under_the_bound_and_rows_stay_the_same(root, url, opened, tmp_path):
    folder = tmp_path / "cache"
    data = data_of(url, Cache(folder, 3 * SHARD / 1e9))

    def within_bound():
        assert sum(size for path in folder.iterdir() if (size := _size(path))) <= 3 * SHARD

    assert_same_steps(data, data_of(root), 12, within_bound)
    assert opened["shard.00000.mds"] > 1  # a cache smaller than the set: it came again


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_what_is_about_to_be_mapped_is_not_evicted(tmp_path):
    store, cache = fsspec.filesystem("memory"), Cache(tmp_path / "cache", 250 / 1e9)
    contents = [bytes([i]) * 100 for i in range(3)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    for content, name in zip(contents, names, strict=True):
        store.pipe_file(f"/evicted/{name}", content)
    with cache.held(f"memory://evicted/{names[0]}", names[0], 100) as first:
        os.utime(first, (0, 0))  # the oldest
        for name in names[1:]:
            with cache.held(f"memory://evicted/{name}", name, 100):
                pass
        assert cache.evicted(names) == {names[1]}
    with pytest.raises(UserError, match="data.cache_gb=.* is less than"):
        with cache.held("memory://evicted/large", "0" * 64, 300):
            pass


class Flaky:
    """Opens files whose reads fail or come damaged the first so many times."""

    def __init__(self, monkeypatch, failures=0, damaged=0):
        self.failures, self.damaged, self.waits = failures, damaged, []
        self.original = fsspec.open
        monkeypatch.setattr(fsspec, "open", self.open)
        monkeypatch.setattr(steady_file.time, "sleep", self.waits.append)

    def open(self, url, mode):
        if url.endswith(".mds") and self.failures:
            self.failures -= 1
            raise TimeoutError("the store is busy")
        if url.endswith(".mds") and self.damaged:
            self.damaged -= 1
            fsspec.filesystem("memory").pipe_file("/damaged", b"\0" * SHARD)
            url = "memory://damaged"
        return self.original(url, mode)


def test_a_store_that_fails_is_asked_again(root, url, tmp_path, monkeypatch):
    shards = ShardSet(url, cache=Cache(tmp_path / "cache"))
    flaky = Flaky(monkeypatch, failures=2)
    with pytest.warns(UserWarning, match="set/part/shard.00000.mds' can't be read: TimeoutError.*the next try is in"):
        document = shards[0]
    assert flaky.waits == [1, 5] and np.array_equal(document.text_ids, ShardSet(root)[0].text_ids)
    flaky.failures = 1000
    with pytest.warns(UserWarning), pytest.raises(StoreError, match="can't be read: TimeoutError") as told:
        shards[len(shards) - 1]
    assert told.value.exit_code == 1  # another start may go well
    assert not list((tmp_path / "cache").glob("*.part"))


def test_wrong_credentials_are_told_at_once_and_expired_ones_waited_for(root, url, tmp_path, monkeypatch):
    def refuse(url, mode):
        raise PermissionError("Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(steady_file, "_answered", set())
        patch.setattr(fsspec, "open", refuse)
        with pytest.raises(UserError, match="Forbidden: check the credentials for memory://sets"):
            ShardSet(url, cache=Cache(tmp_path / "cache"))
    shards, waits = ShardSet(url, cache=Cache(tmp_path / "cache")), []
    monkeypatch.setattr(fsspec, "open", refuse)
    monkeypatch.setattr(steady_file.time, "sleep", waits.append)
    with pytest.warns(UserWarning), pytest.raises(StoreError, match="can't be read: PermissionError"):
        shards[0]
    assert sum(waits) > 120


@pytest.mark.parametrize("keys", [("wrong", "wrong"), ()])
def test_an_s3_that_refuses_is_told_at_once(tmp_path, monkeypatch, keys):
    """By the error a real client raises for a real answer: 403 to wrong keys, and none are sent without keys."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, key in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), keys, strict=False):
        monkeypatch.setenv(name, key)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(S3FileSystem, "cachable", False)  # other tests' know other servers
    with warnings.catch_warnings(), pytest.raises(UserError, match="check the credentials for s3://refusing"):
        warnings.simplefilter("error", UserWarning)  # no further try
        SteadyFile("s3://refusing/set/manifest.json").read(1)
    server.shutdown()


class Refusing(BaseHTTPRequestHandler):
    """S3 to somebody it doesn't know."""

    def do_GET(self):
        self.send_response(403)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_what_comes_damaged_is_fetched_again_then_told(root, url, tmp_path, monkeypatch):
    shards = ShardSet(url, cache=Cache(tmp_path / "cache"))
    flaky = Flaky(monkeypatch, damaged=1)
    assert np.array_equal(shards[0].text_ids, ShardSet(root)[0].text_ids) and not flaky.damaged
    flaky.damaged = 3
    with pytest.raises(UserError, match="set/part/shard.000...mds' is damaged: its SHA-256 is"):
        shards[len(shards) - 1]
    assert flaky.damaged == 1 and not list((tmp_path / "cache").glob("*.part"))
    fsspec.filesystem("memory").rm("/sets/set/part/shard.00003.mds")
    with pytest.raises(UserError, match="shard.00003.mds' can't be read: FileNotFoundError"):
        for i in range(len(shards)):
            shards[i]


FORK = multiprocessing.get_context("fork")


def test_killed_while_fetching_leaves_nothing_half_used(root, tmp_path, monkeypatch):
    url, folder = f"file://{root}", tmp_path / "cache"

    def fetch_some():
        shards = ShardSet(url, cache=Cache(folder))
        monkeypatch.setattr(cache_module, "PIECE", 1000)
        read = steady_file.SteadyFile.read

        def slow(self, size):
            if self.position >= 2000:
                time.sleep(600)
            return read(self, size)

        monkeypatch.setattr(steady_file.SteadyFile, "read", slow)
        shards[0]

    child = FORK.Process(target=fetch_some)
    child.start()
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.join()
    assert list(folder.glob("*.part"))
    assert_same_steps(data_of(url, Cache(folder)), data_of(root), 3)
    Path(folder, "0" * 64 + ".part").write_bytes(b"x" * 2 * SHARD)  # of a file that nobody fetches any more
    os.utime(Path(folder, "0" * 64 + ".part"), (0, 0))
    assert_same_steps(data_of(url, Cache(folder, 4 * SHARD / 1e9)), data_of(root), 3)
    assert not list(folder.glob("0000*.part"))


def test_two_processes_fetch_a_file_once(root, tmp_path, monkeypatch):
    log, original = tmp_path / "log", fsspec.open

    def noted(url, mode):
        with open(log, "a") as file:
            file.write(f"{url.rpartition('/')[2]}\n")
        time.sleep(0.01)  # so that the other one wants it too
        return original(url, mode)

    def read_all(rank):
        monkeypatch.setattr(fsspec, "open", noted)
        assert_same_steps(
            data_of(f"file://{root}", Cache(tmp_path / "cache"), rank, 2), data_of(root, None, rank, 2), 16
        )

    ranks = [FORK.Process(target=read_all, args=(rank,)) for rank in (0, 1)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert [each.exitcode for each in ranks] == [0, 0]
    counts = Counter(log.read_text().split())
    assert {counts.pop(name) for name in ("index.json", "manifest.json")} == {2}  # each process reads those
    assert len(counts) == 2 + len(list(root.glob("part/*.mds"))) and set(counts.values()) == {1}


def test_a_url_needs_a_cache_and_a_set(tmp_path):
    model = ["model.preset=tiny", "model.dualtoken=d", "model.text_tokenizer=t", "run.dir=r", "train.steps=1"]
    keys = [*model, "train.seq_len=64", "train.global_batch_tokens=64"]
    with pytest.raises(UserError, match="'s3://b/set' is a URL: give data.cache"):
        load_config(PretrainConfig, None, ["data.sets=[a,s3://b/set]", *keys])
    with pytest.raises(UserError, match="'s3://b/set' is a URL: give data.cache"):
        load_config(PretrainConfig, None, ["data.sets=[a]", "data.validation=[s3://b/set]", *keys])
    with pytest.raises(UserError, match="'nowhere://b/set' can't be opened: Protocol not known"):
        ShardSet("nowhere://b/set", cache=Cache(tmp_path))
    with pytest.raises(StoreError, match="'ftp://127.0.0.1:1/set' can't be opened: .*refused"):
        ShardSet("ftp://127.0.0.1:1/set", cache=Cache(tmp_path))
    with pytest.raises(UserError, match="manifest.json' can't be read: FileNotFoundError"):
        ShardSet("memory://none", cache=Cache(tmp_path))
    with pytest.raises(UserError, match="data.cache: '/proc/x' can't be written"):
        Cache("/proc/x")
