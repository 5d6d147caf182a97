"""Data, training, resuming and the commands."""

import json
import os
import random
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megadual import steady_file
from megadual.config import load_config
from megadual.errors import UserError
from megadual.run.ranks import Ranks
from megadual.testing.distributed import run_distributed
from megadual.testing.vision import tiny_dualtoken_config, write_tiny_pairs, write_tiny_siglip
from megadual.vision import DualToken, data
from megadual.vision.data import DataConfig, TrainingImages, random_crop, read_pairs, training_batches
from megadual.vision.train import TokenizerTrainer, TrainTokenizerConfig, train

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return write_tiny_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture
def config(corpus, siglip, tmp_path):
    """Eight steps of eight images, without LPIPS."""
    config = load_config(
        TrainTokenizerConfig,
        None,
        [
            f"data.train={corpus}", f"siglip={siglip}", f"run.dir={tmp_path / 'run'}", "data.batch_size=8",
            "train.steps=8", "checkpoint.every=4",
            "train.lr=3e-3", "train.warmup_steps=2", "train.loss.lpips=0", "gan.start_step=5",
            "gan.channels=[8,8,8]", "gan.norm_groups=4", "data.shuffle=16",
        ],
    )  # fmt: skip
    config.model = tiny_dualtoken_config(siglip={})
    return config


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def first_keys(dataset, batches):
    stream = training_batches(dataset)
    return [next(stream) for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_repeat_and_resume_anywhere(corpus, workers):
    config = DataConfig(corpus, batch_size=5, workers=workers, shuffle=8)
    whole = first_keys(TrainingImages(config, 16, seed=3), 11)
    positions = {str(batch.stream): batch.position for batch in whole[:5]}
    rest = first_keys(TrainingImages(config, 16, seed=3, state={"batches": 5, "positions": positions}), 6)
    for a, b in zip(whole[5:], rest, strict=True):
        assert a.captions == b.captions and torch.equal(a.images, b.images)
    other = first_keys(TrainingImages(config, 16, seed=4), 1)
    assert not torch.equal(other[0].images, whole[0].images)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_an_epoch_without_overlap(corpus, ranks):
    """With 2 shards: by shard for 2 ranks, by sample for 4."""
    config = DataConfig(corpus, batch_size=32 // ranks, shuffle=8, min_crop=1.0)
    batches = [first_keys(TrainingImages(config, 20, 0, rank, ranks), 1)[0] for rank in range(ranks)]
    images = torch.cat([batch.pixels(torch.device("cpu")) for batch in batches])
    everything = read_pairs(corpus, 20)[0]
    assert sorted(x.sum().item() for x in images) == pytest.approx(sorted(x.sum().item() for x in everything))


def test_an_unreadable_image_is_skipped_and_named(tmp_path):
    pattern = write_tiny_pairs(tmp_path, shards=1, pairs=3)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "pairs-00000.tar", "a") as tar:
        tar.add(tmp_path / "bad.png", "bad.png")
    with pytest.warns(UserWarning, match="sample 'bad'"):
        images, _ = read_pairs(pattern, 16)
    assert len(images) == 3


@pytest.fixture
def server(corpus):
    """The corpus' folder over loopback HTTP; how often each file was asked for."""
    asked = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    folder = partial(Handler, directory=str(Path(corpus).parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), folder) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_remote_shards_equal_local_ones(corpus, server):
    url, asked = server
    local, _ = read_pairs(corpus, 16)
    folder = Path(corpus).parent
    for pattern in (
        url + "/pairs-{00000..00001}.tar",
        f"file://{folder}/pairs-*.tar",
        f"pipe:cat {folder}/pairs-*.tar",
    ):
        torch.testing.assert_close(read_pairs(pattern, 16)[0][:16], local[:16], rtol=0, atol=0)
    assert set(asked) == {"/pairs-00000.tar", "/pairs-00001.tar"}
    config = DataConfig(url + "/pairs-{00000..00001}.tar", batch_size=4, shuffle=8)
    remote = first_keys(TrainingImages(config, 16, seed=1), 3)
    config.train = corpus
    for a, b in zip(remote, first_keys(TrainingImages(config, 16, seed=1), 3), strict=True):
        assert torch.equal(a.images, b.images)


def test_shards_that_cannot_be_read_are_named(server, monkeypatch):
    """What the store does not have is a mistake, at once; a store that is away may come back for a later start."""
    monkeypatch.setattr(steady_file, "RETRY_PAUSES", (0, 0))
    url, _ = server
    with warnings.catch_warnings(), pytest.raises(UserError, match=f"'{url}/none.tar' can't be read: .*404"):
        warnings.simplefilter("error")  # no further try
        read_pairs(f"{url}/none.tar", 16)
    with pytest.warns(UserWarning, match="next try"), pytest.raises(OSError, match="127.0.0.1:1/x.tar' can't be read"):
        read_pairs("http://127.0.0.1:1/x.tar", 16)
    with pytest.raises(UserError, match="'nowhere://bucket/x.tar' can't be listed: ValueError: Protocol not known"):
        read_pairs("nowhere://bucket/x.tar", 16)


class Store:
    """Files behind fsspec.open whose store fails now and then: in opening, and after every so many bytes."""

    def __init__(self, monkeypatch, openings: int, every: int, seekable: bool):
        self.openings, self.every, self.seekable, self.failures, self.served = openings, every, seekable, 0, 0
        self.waits = []
        monkeypatch.setattr(steady_file.fsspec, "open", lambda url, mode: SimpleNamespace(open=partial(self.open, url)))
        monkeypatch.setattr(steady_file.time, "sleep", self.waits.append)

    def fail(self):
        self.failures += 1
        raise TimeoutError("the store is busy")

    def open(self, url):
        if self.openings:
            self.openings -= 1
            self.fail()
        return StoredFile(self, url)


class StoredFile:
    def __init__(self, store, url):
        self.store, self.file = store, open(url, "rb")
        self.close = self.file.close

    def seek(self, position):
        if not self.store.seekable:
            raise ValueError("cannot seek")
        self.file.seek(position)

    def read(self, size):
        if self.store.served > self.store.every:
            self.store.served = 0
            self.store.fail()
        piece = self.file.read(size)
        self.store.served += len(piece)
        return piece


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two shards of some 100 kB, more than a tar's reader takes at once."""
    return write_tiny_pairs(tmp_path_factory.mktemp("large"), shards=2, pairs=48)


@pytest.mark.parametrize("seekable", [True, False])
def test_a_store_that_fails_now_and_then_changes_no_batch(large, monkeypatch, seekable):
    config = DataConfig(large, batch_size=8, shuffle=8)
    whole = first_keys(TrainingImages(config, 16, seed=3), 14)
    with monkeypatch.context() as patch:
        store = Store(patch, openings=2, every=60_000 if seekable else 150_000, seekable=seekable)
        with pytest.warns(UserWarning, match="pairs-0000.*TimeoutError: the store is busy; the next try is in"):
            again = first_keys(TrainingImages(config, 16, seed=3), 14)
    assert store.failures > 2 and store.waits[:2] == [1, 5]
    for a, b in zip(whole, again, strict=True):
        assert a.captions == b.captions and torch.equal(a.images, b.images) and a.position == b.position


def test_a_listed_shard_is_asked_for_for_minutes_then_the_run_may_start_again(corpus, monkeypatch):
    store = Store(monkeypatch, openings=1000, every=0, seekable=True)
    with pytest.warns(UserWarning), pytest.raises(OSError, match="pairs-0000.*can't be read: TimeoutError"):
        first_keys(TrainingImages(DataConfig(corpus, batch_size=8), 16, seed=3), 1)
    assert 120 < sum(store.waits) < 600 and store.waits == sorted(store.waits)


def test_a_command_that_fails_is_run_again(large, tmp_path, monkeypatch):
    monkeypatch.setattr(steady_file.time, "sleep", lambda seconds: None)
    shard = large.replace("*", "00000")
    local, captions = read_pairs(shard, 16)
    command = f"test -e {tmp_path}/tried && cat {shard} || (touch {tmp_path}/tried; head -c 40000 {shard}; exit 3)"
    with pytest.warns(UserWarning, match="exit 3"):
        images, found = read_pairs(f"pipe:{command}", 16)
    assert found == captions and torch.equal(images, local)


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_shard_is_read_to_its_damage_and_the_next_one_whole(large, tmp_path, damage):
    whole = [Path(large.replace("*", f"0000{i}")).read_bytes() for i in (0, 1)]
    half = len(whole[0]) // 1024 * 512
    first = whole[0][:half] if damage == "cut" else whole[0].replace(b"000030.png", b"\xff00030.png", 1)
    (tmp_path / "0.tar").write_bytes(first)
    (tmp_path / "1.tar").write_bytes(whole[1])
    with pytest.warns(UserWarning, match="0.tar' is damaged, the rest of it is left out"):
        keys = [sample["__key__"] for sample in data.shard_samples(data.list_shards(f"{tmp_path}/*.tar"))]
    second = [key for key in keys if key.startswith("01")]
    assert len(second) == 48 and 10 < len(keys) - 48 < 48


@pytest.mark.parametrize("shape, kept", [((40, 40), 0.9), ((400, 40), 40 * 160 / 3 / 16000)])
def test_training_crops_keep_what_the_published_augmentation_keeps(shape, kept):
    """Each pixel holds its own place, so a crop tells its box: area, aspect, and the fallback of long images."""
    x, y = np.meshgrid(np.linspace(0, 255, shape[0]), np.linspace(0, 255, shape[1]))
    image = Image.fromarray(np.stack([x, y, y], axis=-1).round().astype(np.uint8))
    for seed in range(20):
        crop = np.asarray(random_crop(image, 32, 0.9, random.Random(seed)), dtype=float)
        width, height = (np.ptp(crop[..., i], axis=1 - i).mean() / 255 * 32 / 31 * shape[i] for i in (0, 1))
        assert 0.93 * kept < width * height / (shape[0] * shape[1]) < 1.1
        assert 0.7 < width / height < 1.45


def test_training_lowers_the_losses_and_writes_a_loadable_tokenizer(config):
    config.train.steps, config.checkpoint.every, config.gan.start_step = 40, 40, 36
    config.run.wandb = "offline"
    train(config)
    lines = losses(config.run.dir)
    assert [line["step"] for line in lines] == list(range(1, 41))
    for name in ("reconstruction", "feature_mse", "pooled_mse"):
        start, end = (sum(line[name] for line in part) / 4 for part in (lines[:4], lines[-4:]))
        assert end < 0.7 * start, name
    assert "gan" in lines[-1] and "gan" not in lines[0]
    model = DualToken.from_pretrained(Path(config.run.dir) / "dualtoken")
    assert model.encode(torch.zeros(1, 3, 16, 16)).codes["pixel"].shape == (1, 4, 4, 3)


def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path):
    train(config)
    whole = losses(config.run.dir)
    (Path(config.run.dir) / "checkpoints" / "latest").write_text("00000004")
    train(config)
    assert losses(config.run.dir) == whole


def test_accumulated_batches_and_lpips_on_part_of_the_steps(config):
    config.train.accumulate, config.train.loss.lpips = 2, 1.0
    config.lpips.every, config.lpips.images = 2, 2
    trainer = TokenizerTrainer(config, Ranks.current())
    trainer.open_data()
    first, second = trainer.step(), trainer.step()
    assert "lpips" in first and "lpips" not in second
    assert trainer.data_state["batches"] == 4


def test_frozen_modules_do_not_move(config):
    config.train.freeze = ["quantizers.pixel", "siglip_model.vision_model.embeddings"]
    trainer = TokenizerTrainer(config, Ranks.current())
    trainer.open_data()
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.step()
    moved = {name for name, x in trainer.model.state_dict().items() if not torch.equal(x, before[name])}
    assert not any(name.startswith(tuple(config.train.freeze)) for name in moved)
    assert "quantizers.semantic.codebooks.0.weight" in moved and "prequant.pixel.0.proj.weight" in moved


def _train_steps(config):
    trainer = TokenizerTrainer(config, Ranks.current())
    trainer.open_data()
    metrics = [trainer.step() for _ in range(3)]
    return [m["loss"] for m in metrics], trainer.model.fingerprint(), trainer.model.decoder.conv_out.weight.detach()


def test_two_ranks_keep_one_model(config):
    config.gan.start_step = 1
    (losses_0, fingerprint_0, weight_0), (losses_1, fingerprint_1, weight_1) = run_distributed(_train_steps, 2, config)
    assert losses_0 == losses_1 and fingerprint_0 == fingerprint_1
    assert torch.equal(weight_0, weight_1)


def test_mistakes_are_named_before_work_starts(config):
    config.train.freeze = ["prequant_pixel"]
    with pytest.raises(UserError, match="no module 'prequant_pixel'"):
        TokenizerTrainer(config, Ranks.current())
    config.train.freeze, config.model.streams["pixel"].code_dim = [], 7
    with pytest.raises(UserError, match=r"code_dim\(7\)"):
        TokenizerTrainer(config, Ranks.current())
    config.siglip = "/nowhere"
    with pytest.raises(UserError, match="no SigLIP in '/nowhere'"):
        TokenizerTrainer(config, Ranks.current())


def test_the_command_without_a_corpus_prints_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "pretrain/train_tokenizer.py"),
            "--config", str(ROOT / "pretrain/configs/tokenizer_tiny.yaml"), f"data.train={tmp_path}/none-*.tar",
        ],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert f"no shard matches '{tmp_path}/none-*.tar'" in done.stderr and "Traceback" not in done.stderr
