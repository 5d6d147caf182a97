"""wandb's offline files: records in LevelDB's log format, each a protobuf message."""

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 1 << 15, struct.Struct("<IHB")
START = 7  # bytes of wandb's own before the first record


def steps_in_wandb_files(run: Path) -> list[int]:
    """The steps that a run's folder holds for wandb, over all its starts."""
    return [step for path in _files(run) for step in _steps(path)]


def mend_wandb_files(run: Path) -> None:
    """Cut off the part of a record that a killed start's file may end in: `wandb sync` goes no further than that."""
    for path in _files(run):
        data = path.read_bytes()
        end = max((end for end, _ in _records(data)), default=0)
        if not end:
            shutil.rmtree(path.parent)
        elif end < len(data):
            os.truncate(path, end)


def _files(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/*.wandb"))


def _steps(path: Path) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2  # large

    for _, data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The whole ones, each with the position of its end; a file whose writer was killed may end in a part."""
    position, whole = START, b""
    while position + HEADER.size <= len(data):
        if BLOCK - position % BLOCK < HEADER.size:  # a block's tail, too short for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size
        part = data[position : position + length]
        position += length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4) and len(part) == length:  # full, or last part
            yield position, whole
