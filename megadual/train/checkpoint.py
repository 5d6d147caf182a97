"""Checkpoints of a pretraining run: sharded, atomic, loadable under another layout and by the other engine.

RUN/checkpoints/00000100/ holds torch_dist shards (megadual/engine/sharded.py) and the run's config.yaml;
RUN/checkpoints/latest names the newest complete one and moves only after every rank has written.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megadual.config import PretrainConfig, load_config, to_yaml
from megadual.engine.sharded import ShardedWrite, checksum
from megadual.errors import UserError

LATEST = "latest"
CONFIG = "config.yaml"
PROGRESS = "progress.json"
CHECKSUMS = "checksums.json"
PARTIAL = ".partial-"
# What a disk says that may be well again when training starts anew, which jobs do by themselves.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR}


class _Saving(threading.Thread):
    """One checkpoint on its way to disk."""

    def __init__(self, write: ShardedWrite, partial: Path, final: Path, progress: dict):
        super().__init__(name="checkpoint", daemon=True)
        self.write, self.partial, self.final, self.progress = write, partial, final, progress
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.write.write()
        except Exception as error:  # whatever it is, every rank has to hear of it
            self.error = error


def _cause(error: BaseException) -> BaseException:
    """The disk's own words, where an error of torch's archive writer hides them."""
    while error.__context__ and not isinstance(error, OSError):
        error = error.__context__
    return error


def _told(error: BaseException) -> tuple[str, int | None]:
    return str(error), getattr(error, "errno", None)


class Checkpointer:
    """Writes and reads a run's checkpoints. Every rank calls its methods, `latest` excepted."""

    def __init__(self, run: PretrainConfig, completed: Callable[[Path], None] = lambda checkpoint: None):
        """`completed` is called with each checkpoint that is whole, on rank 0."""
        self.run, self.completed = run, completed
        self.folder = Path(run.run.dir) / "checkpoints"
        self.saving: _Saving | None = None

    def save(self, engine, step: int, data: dict | None = None) -> None:
        """Write the state after `step` steps, with `checkpoint.background` while training goes on.

        `data` is the data's position then, of rank 0.

        `poll` and `finish` complete it and prune the oldest ones. UserError on every rank where it can't be written,
        RuntimeError where that may pass (PASSING); `latest` is then as it was.
        """
        self.finish()
        final, partial = self.folder / f"{step:08d}", self.folder / f"{PARTIAL}{step:08d}"
        self._on_first_rank(final, lambda: (self.clean(), partial.mkdir(parents=True)))
        try:
            write = engine.save(partial)
        except OSError as error:
            raise self._unwritable(final, *_told(error)) from error
        updates = torch.tensor([engine.updates], device=torch.cuda.current_device())
        dist.all_reduce(updates, op=dist.ReduceOp.MAX)  # a stage without trained parts has made none
        self.saving = _Saving(write, partial, final, {"step": step, "updates": updates.item(), "data": data})
        if self.run.checkpoint.background:
            self.saving.start()
        else:
            self.saving.run()
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their part."""
        if self.saving:
            busy = torch.tensor([float(self.saving.is_alive())], device=torch.cuda.current_device())
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
            if not busy.item():
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and complete it."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        if saving.is_alive():
            saving.join()
        errors: list[tuple[str, int | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, _told(_cause(saving.error)) if saving.error else None)
        for rank, error in enumerate(errors):
            if error:
                raise self._unwritable(saving.final, f"rank {rank}: {error[0]}", error[1])
        try:
            saving.write.finish()
        except (OSError, CheckpointException) as error:
            raise self._unwritable(saving.final, *_told(_cause(error))) from error
        parts: list[dict[str, str]] = [{} for _ in errors]
        dist.all_gather_object(parts, saving.write.checksums)
        checksums = {name: value for part in parts for name, value in part.items()}
        self._on_first_rank(saving.final, lambda: self._complete(saving, checksums))

    def _complete(self, saving: _Saving, checksums: dict[str, str]) -> None:
        partial, final = saving.partial, saving.final
        others = [path.name for path in partial.iterdir() if path.name not in checksums]
        checksums |= {name: checksum(partial / name) for name in others}
        _describe(partial, self.run, saving.progress, checksums)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = self.folder / f".{LATEST}"
        pointer.write_text(final.name)
        os.replace(pointer, self.folder / LATEST)
        complete = sorted(path for path in self.folder.iterdir() if path.name.isdigit())
        for old in complete[: -self.run.checkpoint.keep]:
            if old != final:
                shutil.rmtree(old)
        self.completed(final)

    def _on_first_rank(self, final: Path, action: Callable[[], object]) -> None:
        """Do something to the files on rank 0; every rank hears whether it worked."""
        error: list[tuple[str, int | None] | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as failure:
                error = [_told(failure)]
        dist.broadcast_object_list(error, src=0)
        if error[0]:
            raise self._unwritable(final, *error[0])

    def _unwritable(self, final: Path, error: str, number: int | None) -> Exception:
        latest = self.latest()
        kept = f"the last good one is '{latest}'" if latest else "the run has none yet"
        told = f"checkpoint '{final}' could not be written ({error}); {kept}"
        if number in PASSING:
            return RuntimeError(told)
        return UserError(f"{told}; make room there, or give another run.dir, and start again")

    def clean(self) -> None:
        """Remove what a save that was cut short has left behind (rank 0)."""
        for partial in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None where the run has none."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def to_resume(self) -> Path | None:
        """The checkpoint that the run goes on from, the one that rank 0 sees: shared disks answer late (collective)."""
        found = [self.latest() if self.run.checkpoint.resume else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def load(self, engine, checkpoint: Path) -> dict:
        """Fill the engine from a checkpoint of any layout; returns the `step` it was made after and `data`.

        UserError names the files that are not what was written.
        """
        verify(checkpoint)
        progress = json.loads((checkpoint / PROGRESS).read_text())
        engine.load(checkpoint, progress["step"], progress["updates"])
        return progress


def verify(checkpoint: Path) -> None:
    """UserError if a file is not what was written; ranks share the files out (collective)."""
    written = json.loads((checkpoint / CHECKSUMS).read_text())
    names = sorted(written)[dist.get_rank() :: dist.get_world_size()]
    wrong = [n for n in names if not (checkpoint / n).is_file() or checksum(checkpoint / n) != written[n]]
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, wrong)
    if damaged := sorted(name for part in parts for name in part):
        raise UserError(
            f"checkpoint '{checkpoint}' is damaged: {', '.join(damaged)}; remove the folder and write the name of "
            f"an older one to '{checkpoint.parent / LATEST}'"
        )


def _describe(folder: Path, run: PretrainConfig, progress: dict, checksums: dict[str, str]) -> None:
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    (folder / CONFIG).write_text(to_yaml(run))
    (folder / PROGRESS).write_text(json.dumps(progress))


def seal_weights(folder: Path, run: PretrainConfig) -> None:
    """Make a checkpoint for `checkpoint.start` of a folder with torch.distributed.checkpoint's files of the weights.

    Their entries have the names that `load_full_state` returns. For tools: needs no process group.
    """
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    torch.save({}, folder / "common.pt")  # megatron-core before 0.17 looks for it
    _describe(folder, run, {"step": 0, "updates": 0}, {path.name: checksum(path) for path in folder.iterdir()})


def starting_weights(run: PretrainConfig) -> Path | None:
    """The checkpoint whose weights the run starts from; None to start from its own latest, or from its seed.

    Verified (collective).
    """
    if not run.checkpoint.start or Checkpointer(run).to_resume():
        return None
    checkpoint = resolve_checkpoint(run.checkpoint.start)
    verify(checkpoint)
    return checkpoint


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
