"""mosaicml-streaming, and how a shard set's documents are written with it."""

import sys
import types
from collections.abc import Iterable
from pathlib import Path

# Importing `streaming` also imports its ready-made vision, text and multimodal datasets, and with them
# torchvision, which nothing here needs and whose wheels must match torch's build. Empty modules take their place.
for _name in ("streaming.vision", "streaming.text", "streaming.multimodal"):
    sys.modules.setdefault(_name, types.ModuleType(_name))

from streaming import MDSWriter, StreamingDataset  # noqa: E402

from megadual.streams import mds_columns  # noqa: E402

__all__ = ["MDSWriter", "StreamingDataset", "document_writer"]


def document_writer(folder: str | Path, streams: Iterable[str], size_limit: int = 1 << 26) -> MDSWriter:
    """An MDSWriter of documents with these streams (`Document.row()`) into a new local folder, in files of at most
    `size_limit` bytes.

    Not compressed: codes use nearly all of their bits, and a plain file can be memory-mapped.
    """
    columns = mds_columns(streams)
    return MDSWriter(columns=columns, out=str(folder), size_limit=size_limit, hashes=["sha256"], max_workers=1)
