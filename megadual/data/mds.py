"""mosaicml-streaming, and how a shard set's documents are written with it."""

import sys
import types
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# Importing `streaming` also imports its ready-made vision, text and multimodal datasets, and with them
# torchvision, which nothing here needs and whose wheels must match torch's build. Empty modules take their place.
for _name in ("streaming.vision", "streaming.text", "streaming.multimodal"):
    sys.modules.setdefault(_name, types.ModuleType(_name))

from streaming import MDSWriter, StreamingDataset  # noqa: E402

from megadual.streams import CAPTIONS, LENGTHS, Document, Lengths, Marks, mds_columns  # noqa: E402

__all__ = ["MDSWriter", "NotedLengths", "StreamingDataset", "document_writer"]


def document_writer(folder: str | Path, streams: Iterable[str], size_limit: int = 1 << 26) -> MDSWriter:
    """An MDSWriter of documents with these streams (`Document.row()`) into a new local folder, in files of at most
    `size_limit` bytes.

    Not compressed: codes use nearly all of their bits, and a plain file can be memory-mapped.
    """
    columns = mds_columns(streams)
    return MDSWriter(columns=columns, out=str(folder), size_limit=size_limit, hashes=["sha256"], max_workers=1)


class NotedLengths:
    """What is noted of a folder's documents beside its MDS files, so that rows are packed without reading them."""

    def __init__(self, marks: Marks):
        self.marks = marks
        self.lengths: list[Lengths[int]] = []
        self.captions: list[int] = []

    def add(self, document: Document) -> None:
        self.lengths.append(document.lengths(self.marks))
        if self.lengths[-1].captions > 1:
            self.captions += map(len, document.captions())

    def save(self, folder: Path) -> list[str]:
        """The names of the files it wrote."""
        np.save(folder / LENGTHS, np.array(self.lengths, dtype=np.int32).reshape(-1, len(Lengths._fields)))
        if not self.captions:
            return [LENGTHS]
        np.save(folder / CAPTIONS, np.array(self.captions, dtype=np.int32))
        return [LENGTHS, CAPTIONS]
