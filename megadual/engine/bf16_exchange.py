"""Gradients of data-parallel ranks exchanged in bf16 and summed in fp32: half the bytes of a reduce-scatter in fp32.

Each rank sends the others its part of their shares, rounded, and adds what it gets to its own part of its own, which is
not. So a gradient is rounded once a rank, however many there are; a ring that sums in bf16 rounds at every hop.
"""

from typing import Any

import torch
import torch.distributed as dist


class Exchange:
    """One bucket's exchange, under way."""

    def __init__(self, own: torch.Tensor, gradients: torch.Tensor, group: dist.ProcessGroup):
        rank, ranks, share = group.rank(), group.size(), own.numel()
        before = rank * share
        sent = gradients.new_empty(gradients.numel() - share, dtype=torch.bfloat16)
        sent[:before] = gradients[:before]
        sent[before:] = gradients[before + share :]
        self.own, self.received = own, torch.empty_like(sent)
        splits = [share if other != rank else 0 for other in range(ranks)]
        self.work = dist.all_to_all_single(self.received, sent, splits, splits, group=group, async_op=True)

    def wait(self) -> None:
        """Add what came to this rank's share, once."""
        if self.work is None:
            return
        self.work.wait()
        parts = self.received.view(-1, self.own.numel())
        self.own.add_(parts[0] if len(parts) == 1 else parts.sum(0, dtype=torch.float32))
        self.work = self.received = None


class ReduceScatter:
    """In place of `dist.reduce_scatter_tensor`, for gradients (ranks x share) in fp32 and a share of them."""

    def __init__(self) -> None:
        self.last: Exchange | None = None

    def __call__(
        self, own: torch.Tensor, gradients: torch.Tensor, op: Any, group: dist.ProcessGroup, async_op: bool
    ) -> Exchange:
        assert op == dist.ReduceOp.SUM
        if self.last:
            self.last.wait()  # so that one bucket's copies are held at a time
        self.last = Exchange(own, gradients, group)
        if not async_op:
            self.last.wait()
        return self.last
