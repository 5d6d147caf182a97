"""Stopping before the last step, once a checkpoint is written."""

import os
import signal

import torch
import torch.distributed as dist

EXIT_STOPPED = 75  # stopped after a checkpoint: start it again to go on
EXIT_BAD_LOSS = 76


class StopSignal:
    """SIGTERM or SIGUSR1, seen by every rank at the same step whichever of them got it.

    A launcher that does not hand signals on makes the file that MEGADUAL_STOP names instead; rank 0 looks for it.
    """

    def __init__(self):
        self.got = False
        self.file = os.environ.get("MEGADUAL_STOP") if os.environ.get("RANK", "0") == "0" else None
        self.before = {name: signal.signal(name, self._note) for name in (signal.SIGTERM, signal.SIGUSR1)}

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_) -> None:
        """Signals do again what they did before."""
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, *_) -> None:
        self.got = True

    def agreed(self) -> bool:
        """Collective: has any rank been asked to stop?"""
        asked = self.got or bool(self.file and os.path.exists(self.file))
        if not dist.is_initialized():
            return asked
        flag = torch.tensor([float(asked)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
