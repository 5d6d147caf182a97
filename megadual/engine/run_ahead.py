"""A pipeline whose stages run ahead of each other: for micro-batches that take a stage unequal times.

megatron-core's stages send and receive in one exchange, so that neighbours meet at every micro-batch. How much of one
is drawn is chance, and the heads' stage has much or little to do: now the stages before wait for it, now it for them.
Here each direction between stages has a group of its own, on a GPU so a stream of its own: what is sent waits for
nobody, and a stage has one micro-batch more under way for each stage behind it. What is computed, and in which order,
is the same.

A GPU's kernel that waits for a neighbour must not wait for what this rank is still to start: loading a kernel that
runs for the first time waits for all that are running, and would hang. So a tensor is asked for only when it is
needed, and a stage is one micro-batch ahead, not more. With two, both neighbours could be loading, each with something
sent that the other has not asked for: the stage before in its forward pass j, at least two after the other's i, which
has asked for nothing later; and the other's newest gradient is asked for after forward pass i - 1 + ahead.
"""

import contextlib
import datetime
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megadual.data.dataset import MicroBatch
from megadual.model.dual_lm import StreamLosses

# Of a GPU's multiprocessors, which what has been sent and not been asked for yet keeps from computing. A stage has such
# only while it is ahead, and what is sent does not have to be quick.
MULTIPROCESSORS = 4


class _Link:
    """What goes from stage to stage in one direction."""

    def __init__(self, group: dist.ProcessGroup, to: int | None, of: int | None, under_way: int):
        """`to`, `of`: global ranks of the neighbours; as many as `under_way` are sent and not yet known to be there."""
        self.group, self.to, self.of, self.under_way = group, to, of, under_way
        self.sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        dist.irecv(tensor, self.of, group=self.group).wait()
        return tensor

    def send(self, tensor: torch.Tensor) -> None:
        tensor = tensor.contiguous()
        self.sent.append((dist.isend(tensor, self.to, group=self.group), tensor))
        if len(self.sent) > self.under_way:
            self.sent.popleft()[0].wait()

    def finish(self) -> None:
        while self.sent:
            self.sent.popleft()[0].wait()


class RunAhead:
    """One pipeline's stages, each of one chunk; every rank makes it and calls `run` together."""

    def __init__(self, timeout_s: float):
        own = parallel_state.get_pipeline_model_parallel_group()
        self.rank, self.size, ranks = own.rank(), own.size(), dist.get_process_group_ranks(own)
        before = ranks[self.rank - 1] if self.rank else None
        after = ranks[self.rank + 1] if self.rank + 1 < self.size else None
        all_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(all_ranks, ranks)
        options = None
        if "nccl" in dist.get_backend():
            options = dist.ProcessGroupNCCL.Options()
            options.config.max_ctas = MULTIPROCESSORS
        made, timeout = {}, datetime.timedelta(seconds=timeout_s)
        for each in sorted(set(map(tuple, all_ranks))):  # every rank takes part in making every group
            made[each] = [dist.new_group(each, timeout, pg_options=options) for _ in range(2)]
        self.groups = made[tuple(ranks)]
        self.warm_up = (self.size - 1 - self.rank) * 2
        self.activations = _Link(self.groups[0], after, before, self.warm_up + 1)
        self.gradients = _Link(self.groups[1], before, after, self.warm_up + 3)
        self._connect()

    def _connect(self) -> None:
        """Exchange something with each neighbour in turn: the first time takes both, which later would wait in vain."""
        nothing = torch.zeros(1, device=torch.cuda.current_device())
        for stage in range(self.size - 1):
            if self.rank == stage:
                dist.send(nothing, self.activations.to, group=self.activations.group)
                dist.recv(nothing, self.gradients.of, group=self.gradients.group)
            elif self.rank == stage + 1:
                dist.recv(nothing, self.activations.of, group=self.activations.group)
                dist.send(nothing, self.gradients.to, group=self.gradients.group)

    def run(
        self,
        model: DistributedDataParallel,
        batches: list[MicroBatch],
        loss: Callable[[StreamLosses], torch.Tensor],
        shape: tuple[int, ...],
    ) -> None:
        """All micro-batches forward and back; `shape` is that of what a stage passes on, `loss` the last stage's."""
        chunk, count = model.module, len(batches)
        passed = shape, chunk.config.pipeline_dtype
        under_way: deque[tuple[torch.Tensor | None, torch.Tensor]] = deque()
        coming = iter(batches)

        def forward() -> None:
            received = self.activations.receive(*passed).requires_grad_() if self.rank else None
            chunk.set_input_tensor(received)
            output = model(next(coming))
            if self.rank == self.size - 1:
                output = loss(output)
            else:
                self.activations.send(output.detach())
            under_way.append((received, output))

        def backward() -> None:
            received, output = under_way.popleft()
            gradient = None if self.rank == self.size - 1 else self.gradients.receive(*passed)
            if output.requires_grad:  # not where nothing up to here is trained
                output.backward(gradient)
            if received is not None:
                self.gradients.send(received.grad)

        with contextlib.ExitStack() as unsynchronised:
            unsynchronised.enter_context(model.no_sync())
            for i in range(count + self.warm_up):
                if i < count:
                    forward()
                if i >= self.warm_up:
                    if i == count + self.warm_up - 1:
                        unsynchronised.close()  # the last one's gradients are exchanged as they are made
                    backward()
        for link in self.activations, self.gradients:
            link.finish()

    def close(self) -> None:
        for group in self.groups:
            dist.destroy_process_group(group)
