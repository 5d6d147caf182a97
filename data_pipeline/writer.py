"""One folder of the set for one input shard: MDS files with their index.json, the unusable samples, the marker."""

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Iterable

from data_pipeline.store import MARKER, Store
from megadual.data.mds import NotedLengths, document_writer
from megadual.streams import Document, Marks

QUARANTINE = "bad.jsonl"
REASON_CHARACTERS = 1000


def quarantine_line(key: str, reason: str) -> str:
    """A line that can be written whatever the two hold: names of files may be any bytes, JSON half a surrogate pair."""
    line = {"key": key, "reason": reason[:REASON_CHARACTERS]}
    line = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in line.items()}
    return json.dumps(line, ensure_ascii=False) + "\n"


class ShardWriter:
    """Takes every sample's outcome in the order of the input shard, then `commit()`.

    As a context manager it removes what was not committed.
    """

    def __init__(
        self, store: Store, source: dict, identity: dict, streams: Iterable[str], marks: Marks, size_limit: int
    ):
        """`source`: what is made into this folder, as `source_entry` says it."""
        self.store, self.source, self.identity = store, source, identity
        # Unique, since a worker whose driver was killed may still be writing the same shard.
        self.folder = store.new_folder(f"{source['folder']}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}")
        self.mds = document_writer(self.folder, streams, size_limit)
        self.bad = open(self.folder / QUARANTINE, "w", encoding="utf-8")
        self.counts = Counter(samples=0, documents=0, images=0, positions=0, text_ids=0, quarantined=0)
        self.lengths = NotedLengths(marks)
        self.left_out: Counter = Counter()
        self.left_out_images: Counter = Counter()  # of documents that were written without them
        self.left_out_captions: Counter = Counter()  # likewise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.bad.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, document: Document, left_out_images: Counter, left_out_captions: Counter) -> None:
        self.mds.write(document.row())
        self.left_out_images.update(left_out_images)
        self.left_out_captions.update(left_out_captions)
        text_ids, images, positions = len(document.text_ids), len(document.grids), document.positions
        self.lengths.add(document)
        self.counts.update(samples=1, documents=1, images=images, positions=positions, text_ids=text_ids)

    def quarantine(self, key: str, reason: str) -> None:
        self.bad.write(quarantine_line(key, reason))
        self.counts.update(samples=1, quarantined=1)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1
        self.counts["samples"] += 1

    def commit(self) -> None:
        """Finish the files and hand the folder to the store."""
        self.mds.finish()
        self.bad.close()
        files = [
            {"file": file["raw_data"]["basename"], "sha256": file["raw_data"]["hashes"]["sha256"]}
            for file in self.mds.shards
        ]
        files += [
            {"file": name, "sha256": hashlib.sha256((self.folder / name).read_bytes()).hexdigest()}
            for name in self.lengths.save(self.folder)
        ]
        marker = {
            **self.source,
            **self.counts,
            "left_out": dict(sorted(self.left_out.items())),
            "left_out_images": dict(sorted(self.left_out_images.items())),
            "left_out_captions": dict(sorted(self.left_out_captions.items())),
            "files": files,
            "identity": self.identity,
        }
        (self.folder / MARKER).write_text(json.dumps(marker, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.store.commit(self.folder, self.source["folder"])
