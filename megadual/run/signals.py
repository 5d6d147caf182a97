"""Stopping before the last step, once a checkpoint is written."""

import signal

from megadual.run.local import handled


class StopSignal:
    """SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, seen by every rank at the same step whichever of them got it.

    A second one changes nothing, so that a save is never cut short by it; but a second Ctrl-C ends the process. Where
    these signals were held back before (`hold_stop_signals`, slurm/rank.sh), one that came then is seen now, and they
    are held back again afterwards, so that none kills a rank that is ending.
    """

    def __init__(self):
        self.got = False
        self.before = {number: signal.signal(number, self._note) for number in handled()}
        self.mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.before)

    def close(self) -> None:
        """Signals do again what they did before."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.got = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Has any rank been asked to stop (collective)?"""
        import torch  # large: what comes before training does without
        import torch.distributed as dist

        flag = torch.tensor([float(self.got)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
