"""Stopping before the last step, once a checkpoint is written."""

import signal

import torch
import torch.distributed as dist

from megadual.run.local import STOP_SIGNALS


class StopSignal:
    """SIGTERM or SIGUSR1, seen by every rank at the same step whichever of them got it.

    A second one changes nothing, so that a save is never cut short by it. Where these signals were held back before
    (`hold_stop_signals`, slurm/rank.sh), one that came then is seen now, and they are held back again afterwards, so
    that none kills a rank that is ending.
    """

    def __init__(self):
        self.got = False
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        self.mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def close(self) -> None:
        """Signals do again what they did before."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, *_) -> None:
        self.got = True

    def agreed(self) -> bool:
        """Has any rank been asked to stop (collective)?"""
        flag = torch.tensor([float(self.got)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
