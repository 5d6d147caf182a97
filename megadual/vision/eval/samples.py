"""Held-out images for evaluation, one pass, out of a folder of image files or out of webdataset tars."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from megadual.errors import UserError
from megadual.images import read_image

from ..data import IMAGES, list_shards, shard_samples
from ..tokenizer import centre_crop, to_tensor


@dataclass
class Samples:
    """images (B, 3, h, w) in [-1, 1]; each one's name, captions (one a line) and label, "" where there is none.

    A label that can't be read is None.
    """

    images: Tensor
    names: list[str]
    captions: list[str]
    labels: list[str | None]


class SampleReader(IterableDataset):
    """Decoded samples of `source`; each loading process decodes every so-manieth one.

    A folder is read recursively: a label is the name of the folder that an image lies in, captions stand in a .txt
    file beside it. In tars a label is the .cls member or the .json member's `label`, captions are the .txt member.
    """

    def __init__(self, source: str, size: int, limit: int | None = None):
        self.source, self.size, self.limit = source, size, limit
        self.folder = Path(source) if Path(source).is_dir() else None
        if self.folder:
            self.files = sorted(p for p in self.folder.rglob("*") if p.suffix[1:].lower() in IMAGES)
            if not self.files:
                raise UserError(f"the folder '{source}' holds no image ({', '.join(IMAGES)}); give one that does")
        else:
            self.shards = list_shards(source)

    def __iter__(self) -> Iterator[tuple[Tensor, str, str, str | None] | str]:
        """(image, name, caption, label) of each sample, and the errors of what can't be read."""
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        for i, (name, image, caption, label) in enumerate(self._files() if self.folder else self._members()):
            if self.limit is not None and i >= self.limit:
                return
            if i % of != number:
                continue
            try:
                if image == b"":
                    raise ValueError("no image")
                yield to_tensor(centre_crop(read_image(image), self.size)), name, caption, label
                if label is None:
                    yield f"{name}: its label can't be read"
            except Exception as error:  # of PIL's decoders: whatever unpacking wrong bytes leads to
                yield f"{name}: {error}"

    def _files(self) -> Iterator[tuple[str, Path, str, str]]:
        for path in self.files:
            caption = path.with_suffix(".txt")
            label = path.parent.name if path.parent != self.folder else ""
            text = _text(caption.read_bytes()) if caption.is_file() else ""
            yield str(path.relative_to(self.folder)), path, text, label

    def _members(self) -> Iterator[tuple[str, bytes, str, str | None]]:
        for sample in shard_samples(self.shards):
            image = next((sample[extension] for extension in IMAGES if extension in sample), b"")
            yield sample["__key__"], image, _text(sample.get("txt", b"")), _label(sample)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").strip()


def _label(sample: dict) -> str | None:
    try:
        if "cls" in sample:
            return sample["cls"].decode("utf-8").strip()
        label = json.loads(sample.get("json", b"{}")).get("label")
        return "" if label is None else str(label).strip()
    except (ValueError, AttributeError, RecursionError):  # no UTF-8, no JSON, or JSON that is no object
        return None


def _collate(samples: list) -> tuple[Samples | None, list[str]]:
    """(the readable samples as one batch, the errors)."""
    good, bad = [s for s in samples if not isinstance(s, str)], [s for s in samples if isinstance(s, str)]
    if not good:
        return None, bad
    images, names, captions, labels = zip(*good, strict=True)
    return Samples(torch.stack(images), list(names), list(captions), list(labels)), bad


def batches(
    source: str, size: int, batch_size: int, workers: int = 0, limit: int | None = None, progress: str = "images"
) -> Iterator[tuple[Samples | None, list[str]]]:
    """Batches of the samples with the errors of what can't be read; UserError where there is nothing to read.

    source: a folder, or the glob pattern of tars. workers: decoding processes. limit: samples that are read at most.
    """
    loader = DataLoader(SampleReader(source, size, limit), batch_size, num_workers=workers, collate_fn=_collate)
    with tqdm(desc=progress, unit="image", mininterval=1) as bar:
        for samples, bad in loader:
            yield samples, bad
            bar.update(len(samples.names) if samples else 0)
