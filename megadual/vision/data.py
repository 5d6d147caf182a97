"""Images and captions out of webdataset shards: endless resumable training batches, one pass for evaluation.

Shape suffixes: B batch, T text length.
"""

import contextlib
import glob
import hashlib
import io
import math
import random
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from megadual.errors import UserError
from megadual.images import open_image
from megadual.keys import key
from megadual.steady_file import SteadyFile
from megadual.tars import Refused, tar_members

from .tokenizer import centre_crop, normalise_pixels, to_rgb, to_tensor

IMAGES = ("png", "jpg", "jpeg", "webp")
LOG_ASPECT = math.log(4 / 3)


@dataclass
class DataConfig:
    train: str = key(
        "runs/demo/corpus/train-*.tar",
        "webdataset shards: globs, {000..123} ranges, URLs of any store that fsspec reads, pipe:COMMAND",
    )
    heldout: str | None = key(None, "shards that are not trained on, to see how it goes; null: none")
    batch_size: int = key(32, "images per rank and forward pass", least=1)
    workers: int = key(0, "loading processes per rank", least=0)
    shuffle: int = key(2000, "samples that are mixed; the order of the shards is shuffled as a whole", least=0)
    min_crop: float = key(0.9, "least share of the image's area that a training crop keeps", over=0, most=1)

    def check(self) -> None:
        """UserError where a key names no shard."""
        for name in ("train", "heldout"):
            if pattern := getattr(self, name):
                try:
                    list_shards(pattern)
                except UserError as error:
                    raise UserError(f"data.{name}: {error}") from error


def list_shards(pattern: str) -> list[str]:
    """Shards of a glob pattern with optional {a..b} ranges, sorted; UserError if there is none.

    Besides paths: URLs of any store that fsspec reads (globbed where they have a *), and pipe:COMMAND.
    """
    shards = [shard for name in wds.shardlists.expand_urls(pattern) for shard in _matches(name)]
    if not shards:
        raise UserError(f"no shard matches '{pattern}'; give the pattern of existing webdataset .tar files")
    return shards


def _matches(name: str) -> list[str]:
    if name.startswith("pipe:"):
        return [name]
    if "://" not in name:
        return sorted(glob.glob(name))
    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        if "*" not in name:
            return [name]
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))
    except Exception as error:  # every store has errors of its own
        raise UserError(f"shards '{name}' can't be listed: {type(error).__name__}: {error}") from error


def random_crop(image: Image.Image, size: int, min_area: float, rng: random.Random) -> Image.Image:
    """A crop of `min_area` to all of the area and of aspect 3:4 to 4:3, resized to a square (bicubic), no flip.

    Where no such crop is found, the largest central one of these aspects: torchvision's RandomResizedCrop.
    """
    image = to_rgb(image)
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(-LOG_ASPECT, LOG_ASPECT))
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    left, top = (width - w) / 2, (height - h) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def _image_bytes(sample: dict) -> bytes:
    for extension in IMAGES:
        if extension in sample:
            return sample[extension]
    raise ValueError(f"no image, its members are {sorted(name for name in sample if not name.startswith('__'))}")


def _open(sample: dict, transform: Callable[[Image.Image], Image.Image]) -> tuple[Image.Image, str]:
    image = open_image(io.BytesIO(_image_bytes(sample)))
    return transform(image), sample.get("txt", b"").decode().strip()


def _skip(sample: dict, error: Exception | str) -> None:
    warnings.warn(f"skipped '{sample['__url__']}' sample '{sample['__key__']}': {error}", stacklevel=2)


def shard_samples(shards: list[str]) -> Iterator[dict]:
    """The samples of shards, in order: {"__key__", "__url__", member's suffix: its bytes}.

    A damaged shard is read to its damage, and a sample with a member that is refused is left out, with a warning.
    """
    for sample in group_by_keys(_members(shards), handler=wds.warn_and_continue):
        refused = [data.reason for data in sample.values() if isinstance(data, Refused)]
        if refused:
            _skip(sample, refused[0])
        else:
            yield sample


def _members(shards: list[str]) -> Iterator[dict]:
    for url in shards:
        try:
            with contextlib.closing(SteadyFile(url)) as stream:
                yield from tar_members(stream, url)
        except tarfile.TarError as error:
            warnings.warn(f"shard '{url}' is damaged, the rest of it is left out: {error}", stacklevel=2)
        yield {}  # to group_by_keys: the next shard's samples are others, whatever their keys


@dataclass
class Batch:
    """Images as bytes (B, h, w, 3), their captions, and where their stream stands behind them."""

    images: Tensor
    captions: list[str]
    keys: list[str]  # each sample's SHARD/KEY
    stream: int
    position: list[int]  # [epoch, samples read in it]

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self

    def pixels(self, device: torch.device) -> Tensor:
        """(B, 3, h, w) in [-1, 1] on the device: bytes are a quarter of what loaders would hand over otherwise."""
        return normalise_pixels(self.images.to(device, non_blocking=True)).contiguous()


class TrainingImages(IterableDataset):
    """An endless stream of Batches, the same for the same seed, number of ranks and workers.

    Each rank's each worker is one `stream`, with its own share of the shards (or of the samples, where there
    are fewer shards than streams). Shards are reshuffled every epoch; a sample's crop depends only on
    (seed, epoch, key). `state` continues: {"batches": taken so far, "positions": {stream: Batch.position}}.
    """

    def __init__(
        self, config: DataConfig, size: int, seed: int, rank: int = 0, ranks: int = 1, state: dict | None = None
    ):
        super().__init__()
        self.config, self.size, self.seed, self.rank, self.ranks = config, size, seed, rank, ranks
        self.shards = list_shards(config.train)
        self.state = state or {"batches": 0, "positions": {}}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        # The loader takes batches from its workers in turn, starting with worker 0; the next one due comes first.
        local = ((worker.id if worker else 0) + self.state["batches"]) % workers
        stream, streams = self.rank * workers + local, self.ranks * workers
        epoch, done = self.state["positions"].get(str(stream), (0, 0))
        images, captions, keys = [], [], []
        while True:
            read = 0
            for sample in self._epoch(epoch, stream, streams):
                read += 1
                if read <= done:
                    continue
                try:
                    rng = random.Random(f"{self.seed}/{epoch}/{sample['__key__']}")
                    crop = partial(random_crop, size=self.size, min_area=self.config.min_crop, rng=rng)
                    image, caption = _open(sample, crop)
                except Exception as error:  # of PIL's decoders: whatever unpacking wrong bytes leads to
                    _skip(sample, error)
                    continue
                images.append(np.asarray(image))
                captions.append(caption)
                keys.append(f"{sample['__url__'].rpartition('/')[2]}/{sample['__key__']}")
                if len(images) == self.config.batch_size:
                    yield Batch(torch.from_numpy(np.stack(images)), captions, keys, stream, [epoch, read])
                    images, captions, keys = [], [], []
            if read == 0:
                raise UserError(f"stream {stream} of {streams} finds no samples in '{self.config.train}'")
            epoch, done = epoch + 1, 0

    def _epoch(self, epoch: int, stream: int, streams: int) -> Iterator[dict]:
        shards = list(self.shards)
        random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        by_shard = len(shards) >= streams
        samples = shard_samples(shards[stream::streams] if by_shard else shards)
        if not by_shard:
            samples = (sample for i, sample in enumerate(samples) if i % streams == stream)
        digest = hashlib.sha256(f"{self.seed}/{epoch}/{stream}".encode()).digest()
        buffer = self.config.shuffle
        return wds.shuffle(buffer, initial=buffer, rng=random.Random(digest))(samples)


def training_batches(dataset: TrainingImages) -> Iterator[Batch]:
    """The dataset through `config.workers` loading processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=dataset.config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global one, which a resume has just restored
    )
    return iter(loader)


def read_pairs(pattern: str, size: int, limit: int | None = None) -> tuple[Tensor, list[str]]:
    """All image-caption pairs of the shards, centre-cropped: images (n, 3, size, size) and n captions.

    Unreadable images are skipped with a warning; UserError if none is left.
    """
    images, captions = [], []
    for sample in shard_samples(list_shards(pattern)):
        if limit is not None and len(images) >= limit:
            break
        try:
            image, caption = _open(sample, partial(centre_crop, size=size))
        except Exception as error:  # see TrainingImages
            _skip(sample, error)
            continue
        images.append(to_tensor(image))
        captions.append(caption)
    if not images:
        raise UserError(f"the shards of '{pattern}' hold no readable image")
    return torch.stack(images), captions


def tokenize_captions(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    """Captions -> (B, length) ids, padded as SigLIP is trained: it reads the last position, padding or not."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
