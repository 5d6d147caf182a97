"""One folder of the set for one input shard, committed as a whole or not at all.

A folder holds MDS files with their index.json, `bad.jsonl` (the unusable samples) and `_SUCCESS` (what was done).
It is written under `_tmp` and renamed when everything in it is on the disk, so that a folder that can be seen is
complete, also when a machine stops or two workers do the same shard.
"""

import json
import os
import shutil
import socket
import uuid
from collections import Counter
from pathlib import Path

from data_pipeline.readers import InputShard
from megadual.data.mds import document_writer
from megadual.streams import Document

MARKER = "_SUCCESS"  # not *.json: streaming's merge_index takes every .json below a set for an index
QUARANTINE = "bad.jsonl"
TEMPORARY = "_tmp"


def sync(path: Path) -> None:
    """Have a file's or folder's content on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_marker(folder: Path) -> dict | None:
    """What a committed folder's marker says; None where there is none."""
    try:
        return json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        return None


class ShardWriter:
    """Takes every sample's outcome in the order of the input shard, then `commit()`.

    As a context manager it removes what was not committed.
    """

    def __init__(self, output: Path, shard: InputShard, identity: dict, size_limit: int):
        self.output, self.shard, self.identity = output, shard, identity
        # Unique, since a worker whose driver was killed may still be writing the same shard.
        self.folder = output / TEMPORARY / f"{shard.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        self.mds = document_writer(self.folder, size_limit)
        self.bad = open(self.folder / QUARANTINE, "w", encoding="utf-8")
        self.counts = Counter(samples=0, documents=0, images=0, positions=0, text_ids=0, quarantined=0)
        self.left_out: Counter = Counter()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.bad.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, document: Document) -> None:
        self.mds.write(document.row())
        self.counts.update(
            samples=1,
            documents=1,
            images=len(document.grids),
            positions=len(document.semantic),
            text_ids=len(document.text_ids),
        )

    def quarantine(self, key: str, reason: str) -> None:
        self.bad.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
        self.counts.update(samples=1, quarantined=1)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1
        self.counts["samples"] += 1

    def commit(self) -> None:
        """Finish the files and make the folder visible under the shard's name."""
        self.mds.finish()
        self.bad.close()
        files = [
            {"file": file["raw_data"]["basename"], "sha256": file["raw_data"]["hashes"]["sha256"]}
            for file in self.mds.shards
        ]
        marker = {
            "folder": self.shard.name,
            "source": self.shard.url,
            **self.counts,
            "left_out": dict(sorted(self.left_out.items())),
            "files": files,
            "identity": self.identity,
        }
        (self.folder / MARKER).write_text(json.dumps(marker, indent=2, ensure_ascii=False) + "\n")
        for path in [*self.folder.iterdir(), self.folder]:
            sync(path)
        target = self.output / self.shard.name
        try:
            self.folder.rename(target)
        except OSError:
            if read_marker(target) is None:  # else another worker did the same shard first, with the same bytes
                raise
        sync(self.output)
