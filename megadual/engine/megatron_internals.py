"""What MegaDual uses of megatron-core that its documentation does not promise: all of it, but for engine/cpu.py.

`check` asks for all of that when an engine is built, not hours later at a checkpoint.
"""

import functools
import inspect
import itertools
import logging
import queue
import types
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers

from megadual.engine.bf16_exchange import ReduceScatter
from megadual.engine.internals import reach
from megadual.model.fp8 import Weight
from megadual.model.main_grad import add_product

_reach = functools.partial(reach, "megatron-core", "0.16.1 to 0.19.x")


def check(optimizer=None) -> None:
    """UserError that names what this version lacks; `optimizer` is megatron's, of a rank that trains something."""
    _reach(filesystem_async, "_results_queue")
    _reach(filesystem_async, "FileSystemWriterAsync", "write_preloaded_data")
    if optimizer:
        (chained,) = _reach(optimizer, "chained_optimizers")
        for name in ("optimizer", "model_param_gbuf_map", "gbuf_ranges", "model_param_group_index_map"):
            _reach(chained, name)


def adamw(optimizer) -> torch.optim.Optimizer:
    """The AdamW inside megatron's optimizer."""
    (chained,) = _reach(optimizer, "chained_optimizers")
    return _reach(chained, "optimizer")


def replace_adamw(optimizer, made: torch.optim.Optimizer) -> None:
    """Put `made`, which has the AdamW's own parameter groups, in the place of the AdamW inside megatron's optimizer."""
    (chained,) = _reach(optimizer, "chained_optimizers")
    chained.optimizer = made


def held(optimizer, parameter: torch.nn.Parameter) -> tuple[slice, dict[str, torch.Tensor]] | None:
    """This rank's share of a parameter's optimizer state, if it has one.

    Its place in the flat parameter, and the fp32 weights (`param`) and moments there, which may be written to.
    """
    (chained,) = _reach(optimizer, "chained_optimizers")
    place = _reach(chained, "model_param_gbuf_map").get(parameter)
    if place is None:
        return None
    buffer, dtype, bucket = place
    share = _reach(chained, "gbuf_ranges")[buffer][dtype][bucket]["param_map"][parameter]["param"]
    group, index = _reach(chained, "model_param_group_index_map")[parameter]
    main = chained.optimizer.param_groups[group]["params"][index]
    return slice(share.start, share.end), {"param": main, **chained.optimizer.state[main]}


def reduce_in_bf16() -> None:
    """Have models made from now on exchange gradients in bf16 where `reduce_scatter_with_fp32_accumulation` is set.

    megatron-core's own way for that has no fp32 sums of a rank's micro-batches. Where it is not set they are exchanged
    as they are, also after a model of the same process for which it was.
    """
    _reach(param_and_grad_buffer, "reduce_scatter_with_fp32_accumulation")
    _reach(param_and_grad_buffer, "dist_reduce_scatter_func")
    param_and_grad_buffer.reduce_scatter_with_fp32_accumulation = ReduceScatter()
    param_and_grad_buffer.dist_reduce_scatter_func = dist.reduce_scatter_tensor


def sum_gradients(wrapped: DistributedDataParallel) -> None:
    """Have data-parallel ranks' gradients summed, not averaged: dividing would read and write all of them once more.

    The loss has to be global already.
    """
    for group in _reach(wrapped, "bucket_groups"):
        for bucket in group.buckets:
            _reach(bucket, "gradient_scaling_factor")
            bucket.gradient_scaling_factor = 1.0


def wait_for_weights(wrapped: DistributedDataParallel) -> None:
    """Have the weights that a module reads of another be waited for too, when they are gathered beside its forward."""
    chunk, wait = wrapped.module, _reach(wrapped, "_make_forward_pre_hook")()
    if chunk.pre_process:
        chunk.embedding.register_forward_pre_hook(lambda *_: wait(chunk.embedding.word_embeddings))
    if chunk.post_process:
        chunk.decoder.register_forward_hook(lambda *_: wait(chunk.output_layer))


def begin_gathering(wrapped: DistributedDataParallel, everything: bool) -> None:
    """Have data-parallel ranks bring the last update's weights together, in the order in which forward reads them.

    `everything`, or the first alone: each time that a module waits for some, it then begins the next.
    """
    in_order = _reach(wrapped, "bucket_groups")[::-1]
    for group in in_order if everything else in_order[:1]:
        if not _reach(group, "param_gather_dispatched"):
            group.start_param_sync()


def gather_now(wrapped: DistributedDataParallel) -> None:
    """Make the weights whole on every data-parallel rank."""
    begin_gathering(wrapped, everything=True)
    for group in wrapped.bucket_groups:
        if _reach(group, "param_gather_handle"):
            group.start_param_sync(force_sync=True)  # which waits


def add_in_products(model: torch.nn.Module) -> None:
    """Have the products of megatron-core's linear layers add weight gradients to `main_grad`, as our own layers do.

    It would use an extension in CUDA of apex's, by this name; torch's product does as well.
    """

    def add(x: torch.Tensor, upstream: torch.Tensor, main_grad: torch.Tensor) -> None:
        add_product(main_grad, upstream, x)

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add)
    for module in model.modules():
        if isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            _reach(module, "gradient_accumulation_fusion")
            module.gradient_accumulation_fusion = True


def multiply_in_fp8(chunks: list[torch.nn.Module]) -> list[Weight]:
    """Have the linear layers of the chunks' transformers multiply in FP8, once their weights have been cast."""

    def product(held: Weight):
        def multiply(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group, **_):
            return held.multiply(input, bias, reduce=allreduce_dgrad, gather=sequence_parallel, group=tp_group)

        return multiply

    weights = []
    for module in itertools.chain.from_iterable(chunk.decoder.modules() for chunk in chunks):
        if isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            _reach(module, "_forward_impl")
            weights.append(Weight(module.weight))
            module._forward_impl = product(weights[-1])
    return weights


def clip_in_place() -> None:
    """Have gradients clipped by one kernel that reads and writes them once.

    Without an extension of apex's or Transformer Engine's, megatron-core multiplies them into new tensors and copies.
    """

    def multiply(_chunk, _overflow, lists: list[list[torch.Tensor]], factor: float) -> None:
        torch._foreach_mul_(lists[1], factor)  # lists[0] are the same

    _reach(clip_grads, "multi_tensor_scale_impl")
    clip_grads.multi_tensor_scale_impl = multiply


class Save:
    """A sharded state on its way to disk, as megatron-core's asynchronous saving plans it, but written by the caller.

    megatron-core's own driver starts processes, which is not safe beside CUDA and threads.
    """

    def __init__(self, state: dict, folder: Path):
        """Plan the files and bring this rank's tensors to the host (collective)."""
        filesystem_async._results_queue = queue.Queue()  # otherwise a manager process on every rank holds it
        # 0.19 deprecates all but one vendor's writer.
        logging.getLogger(torch_strategy.__name__).setLevel(logging.ERROR)
        options = {"sharded_strategy": ("torch_dist", 1), "async_sharded_save": True}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # since 0.17
            options["async_strategy"] = "mcore"
        self._request = dist_checkpointing.save(state, str(folder), **options)
        # This rank's files: (path, name, what is in it); none where it has nothing to write.
        self.files: list[tuple] = self._request.preload_fn() if self._request.async_fn else []
        self._written: dict[int, object] = {}

    def write(self, i: int) -> None:
        """Write file i, in any thread. Raises what the disk does."""
        results: queue.Queue = queue.Queue()
        count: queue.Queue = queue.Queue()
        count.put(i)
        write = _reach(filesystem_async, "FileSystemWriterAsync", "write_preloaded_data")
        write(self._request.async_fn.args[0], i, self.files[i], results, count, use_fsync=True)
        _, written = results.get()
        if isinstance(written, Exception):
            raise written
        self._written[i] = written

    def finish(self) -> None:
        """Write the index of all ranks' files, once all have written theirs (collective)."""
        if self.files:
            self._request.async_fn_args[2].put(self._written)
        for finalize in self._request.finalize_fns:
            finalize()
