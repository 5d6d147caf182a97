"""Stopping before the last step, once a checkpoint is written."""

import signal

import torch
import torch.distributed as dist

from megadual.run.local import STOP_SIGNALS


class StopSignal:
    """SIGTERM or SIGUSR1, seen by every rank at the same step whichever of them got it.

    A second one changes nothing, so that a save is never cut short by it. Launchers may start a rank with these signals
    blocked (megadual/run/local.py, slurm/rank.sh): one that came before now is then seen now.
    """

    def __init__(self):
        self.got = False
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def close(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, *_) -> None:
        self.got = True

    def agreed(self) -> bool:
        """Has any rank been asked to stop (collective)?"""
        flag = torch.tensor([float(self.got)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
