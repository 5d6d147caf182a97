"""Checkpoints of a pretraining run: sharded, atomic, loadable under another layout.

RUN/checkpoints/00000100/ holds megatron-core's torch_dist shards and the run's config.yaml; RUN/checkpoints/latest
names the newest complete one and moves only after every rank has written.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megadual.config import PretrainConfig, load_config, to_yaml
from megadual.errors import UserError

LATEST = "latest"
CONFIG = "config.yaml"
PROGRESS = "progress.json"
CHECKSUMS = "checksums.json"


class Checkpointer:
    """Writes and reads a run's checkpoints."""

    def __init__(self, run: PretrainConfig):
        self.run = run
        self.folder = Path(run.run.dir) / "checkpoints"

    def save(self, engine, step: int) -> Path:
        """Write the state after `step` optimizer steps; every rank calls it. Prunes the oldest checkpoints."""
        final = self.folder / f"{step:08d}"
        partial = self.folder / f".partial-{step:08d}"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save(partial)
        dist.barrier()
        checksums = _checksums(partial)
        if dist.get_rank() == 0:
            (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
            (partial / CONFIG).write_text(to_yaml(self.run))
            (partial / PROGRESS).write_text(json.dumps({"step": step}))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            pointer = self.folder / f".{LATEST}"
            pointer.write_text(final.name)
            os.replace(pointer, self.folder / LATEST)
            self._prune(final)
        dist.barrier()
        return final

    def _prune(self, newest: Path) -> None:
        complete = sorted(p for p in self.folder.iterdir() if p.name.isdigit())
        for old in complete[: -self.run.checkpoint.keep]:
            if old != newest:
                shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None where the run has none."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def load(self, engine, checkpoint: Path) -> int:
        """Fill the engine from a checkpoint of any layout; returns the number of steps it had done.

        UserError names the files that are not what was written.
        """
        written, found = json.loads((checkpoint / CHECKSUMS).read_text()), _checksums(checkpoint)
        damaged = sorted(name for name in written if found.get(name) != written[name])
        if damaged:
            raise UserError(
                f"checkpoint '{checkpoint}' is damaged: {', '.join(damaged)}; remove the folder and write the name of "
                f"an older one to '{self.folder / LATEST}'"
            )
        engine.load(checkpoint)
        return json.loads((checkpoint / PROGRESS).read_text())["step"]


def _checksums(folder: Path) -> dict[str, str]:
    """xxh3 of the engine's files by name; ranks share the files out (collective)."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    for name in [n for n in names if n not in (CONFIG, PROGRESS, CHECKSUMS)][dist.get_rank() :: dist.get_world_size()]:
        digest = xxhash.xxh3_128()
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        mine[name] = digest.hexdigest()
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {name: digest for part in parts for name, digest in part.items()}


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from itself, a run's folder, or its `checkpoints` folder (the latest one there)."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text().strip()
    if not (path / CONFIG).is_file() or not (path / ".metadata").is_file():
        raise UserError(f"'{path}' is not a checkpoint: expected RUN, RUN/checkpoints or RUN/checkpoints/STEP")
    return path


def load_run_config(checkpoint: Path) -> PretrainConfig:
    """The resolved config that the checkpoint was written with."""
    return load_config(PretrainConfig, checkpoint / CONFIG)


def load_full_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's full, unsharded tensors by their global names, read in one process without a GPU."""
    metadata = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(str(checkpoint)), no_dist=True)
    return state
