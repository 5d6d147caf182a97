"""What is around the steps of every training, from the check of the nodes to the last rank's end."""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megadual.config import to_yaml
from megadual.errors import UserError
from megadual.run import exits, nodes, record
from megadual.run.config import RunConfig
from megadual.run.files import write_whole
from megadual.run.gloo import keep_gloo_behind
from megadual.run.launch import Launch, launched
from megadual.run.lock import sole_trainer
from megadual.run.output import unbreakable_output
from megadual.run.ranks import Ranks
from megadual.run.signals import StopSignal
from megadual.run.watchdog import Watchdog, collective_timeout_s

CONFIG = "config.yaml"
ENDS = {exits.STOPPED: "stopped by a signal", exits.BAD_LOSS: "bad loss"}


class Session:
    """One start of a run, as one of its ranks has it. The default process group is there meanwhile."""

    def __init__(self, folder: Path, ranks: Ranks, stop: StopSignal, watchdog: Watchdog):
        self.folder, self.ranks, self.stop, self.watchdog = folder, ranks, stop, watchdog
        self._at_end = contextlib.ExitStack()

    def beat(self) -> None:
        """There is progress; to be called after everything that is done."""
        self.watchdog.beat()

    def at_end(self, function: Callable[[], object]) -> None:
        """Call `function` once all ranks are through, while the group is still there."""
        self._at_end.callback(function)

    def close(self) -> None:
        self._at_end.close()
        self.watchdog.close()
        dist.destroy_process_group()


@contextlib.contextmanager
def session(run: RunConfig, config) -> Iterator[Session]:
    """Everything that one start of a training needs around its steps; every rank enters it.

    Checks the nodes, locks `run.dir`, starts the watchdog, makes the default process group and tries it; notes the
    start and its end in run.json, and `config` in config.yaml. Stop signals are noted from the beginning to the end.
    Steps end it early by SystemExit with one of ENDS, on all ranks alike, which passes on once all is closed.
    UserError, on all ranks, where a node is not fit or the run is in use.
    """
    place, folder = launched() or Launch(0, 1), Path(run.dir)
    rank, world = place.rank, place.world
    with unbreakable_output(), contextlib.closing(StopSignal()) as stop:
        store = nodes.open_store(rank, world)
        peers = nodes.check_nodes(run, store, rank, world)
        with sole_trainer(folder, store, rank, world):
            watchdog = Watchdog(folder / "logs", rank, run.hang_timeout, peers)
            _join_group(run, store, rank, world)
            if rank == 0:
                _note_start(folder, config, world)
            opened, ended, early = Session(folder, Ranks.current(), stop, watchdog), "failed", None
            try:
                yield opened
                ended = "finished"
            except SystemExit as end:
                if end.code not in ENDS:
                    raise
                ended, early = ENDS[end.code], end
            finally:
                if rank == 0:
                    with contextlib.suppress(OSError):  # a full disk, which has been told already
                        record.end_start(folder, ended)
                if ended == "failed" and world == 1:  # of several, others may be waiting: only the process's end helps
                    opened.close()
            # Rank 0 may still have been sending to wandb, and launchers end ranks that others have left.
            dist.barrier()
            opened.close()
    if early:
        raise early


def _note_start(folder: Path, config, world: int) -> None:
    try:
        write_whole(folder / CONFIG, to_yaml(config))
        record.add_start(folder, record.describe_start(world))
    except OSError as error:
        raise UserError(f"run.dir '{folder}' can't be written: {error.strerror}; make room there") from error


def _join_group(run: RunConfig, store: dist.Store, rank: int, world: int) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(nodes.local_rank())
    timeout = datetime.timedelta(seconds=collective_timeout_s(run.hang_timeout))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    keep_gloo_behind()
    nodes.check_all_reduce(rank, world)
