"""The megatron engine: tensor, pipeline and data parallel training on megatron-core's own schedules."""

from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megadual.config import PretrainConfig
from megadual.data.dataset import MicroBatch
from megadual.engine import sharded
from megadual.engine.groups import destroy_groups, initialize_groups
from megadual.engine.step import GlobalLosses, StepResult, schedule
from megadual.engine.topology import Topology
from megadual.model.context import context_share
from megadual.model.dual_lm import DualLM, StreamLosses, Vocabulary
from megadual.model.init import initialize
from megadual.model.parts import train_only

_TORCH_ADAM = distrib_optimizer.Adam.__module__.startswith("torch.")  # not Apex's or Transformer Engine's


def build_chunks(run: PretrainConfig, vocabulary: Vocabulary) -> list[DualLM]:
    """This rank's model chunks (one, or one per virtual pipeline stage), from the run's seed or `checkpoint.start`."""
    virtual = run.parallel.virtual_pipeline
    chunks = []
    for chunk in range(virtual):
        vp_stage = chunk if virtual > 1 else None
        chunks.append(
            DualLM(
                run,
                vocabulary,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=virtual == 1, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=virtual == 1, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    initialize(chunks, run.train.seed)
    if run.checkpoint.start:
        sharded.load_weights(chunks, Path(run.checkpoint.start))
    return chunks


class MegatronEngine:
    """Owns the model chunks, the optimizer and the schedule; `train_step` runs one global batch."""

    def __init__(self, run: PretrainConfig, topology: Topology, vocabulary: Vocabulary):
        initialize_groups(run)
        self.run, self.topology, self.vocabulary = run, topology, vocabulary
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.chunks = build_chunks(run, vocabulary)
        for chunk in self.chunks:
            train_only(chunk, run.train.parts)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=torch.cuda.is_available(),
            grad_reduce_in_fp32=True,
        )
        self.model = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        train = run.train
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.lr,
                min_lr=train.min_lr,
                weight_decay=train.weight_decay,
                adam_beta1=train.beta1,
                adam_beta2=train.beta2,
                clip_grad=train.clip_grad,
                bf16=train.precision == "bf16",
                params_dtype=self.chunks[0].config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.model,
        )
        if _TORCH_ADAM and self._adam():
            for group in self._adam().param_groups:
                group["fused"] = torch.cuda.is_available()  # one pass over weights, gradients and moments
            sharded.hold_moments(self._adam(), [p for group in self._adam().param_groups for p in group["params"]])
        self.scheduler = schedule(run, self.optimizer)
        no_sync = [wrapped.no_sync for wrapped in self.model]
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
            if ddp.overlap_grad_reduce:
                chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.forward_backward = get_forward_backward_func()

    def train_step(self, batches: list[MicroBatch], approve: Callable[[StepResult], bool] | None = None) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Where `approve` says no to the step's losses and gradient norm, weights and optimizer stay as they were; the
        schedule goes on.
        """
        losses = GlobalLosses(self.run, batches, self.vocabulary)
        positions = batches[0].tokens.size(0)
        context = parallel_state.get_context_parallel_rank(), self.run.parallel.context
        batches = [context_share(batch, *context).to(torch.cuda.current_device()) for batch in batches]
        for wrapped in self.model:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        # megatron divides by the micro-batches and averages over data-parallel ranks; the loss is global already.
        scale = len(batches) * self.topology.data

        def loss_func(output: StreamLosses):
            return losses.total(output) * scale, {}

        def forward_step(iterator, model):
            return model(next(iterator)), loss_func

        self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.model] if len(self.model) > 1 else iter(batches),
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=positions,  # before it is cut over context- and tensor-parallel ranks
            micro_batch_size=1,
        )
        lr = self.scheduler.get_lr({})
        if approve:
            self.optimizer.prepare_grads()
            result = losses.result(self.optimizer.get_grad_norm(), lr)
            if approve(result):
                self.optimizer.step()
        else:
            _, grad_norm, _ = self.optimizer.step()
            result = losses.result(grad_norm, lr)
        self.scheduler.step(increment=1)
        return result

    @property
    def updates(self) -> int:
        """Optimizer steps taken; steps that were skipped don't count."""
        return sharded.updates(self._adam()) if self._adam() else 0

    def save(self, folder: Path, copy: bool) -> sharded.ShardedWrite:
        """Weights, fp32 weights and moments on their way to `folder`; every rank calls it."""
        state = self._sharded_model()
        if self._adam():
            state["optimizer"] = self._sharded_optimizer(state, is_loading=False)["param_state"]
        return sharded.ShardedWrite(state, folder, copy)

    def load(self, folder: Path, step: int, updates: int) -> None:
        """Fill from what either engine's `save` wrote under any layout after `step` steps."""
        if _TORCH_ADAM:
            _keep_step_out_of_sharded_state()
        state, optimizer = self._sharded_model(), None
        if self._adam():
            optimizer = self._sharded_optimizer(state, is_loading=True)
            state["optimizer"] = optimizer["param_state"]
        loaded = sharded.read(state, folder)
        for name, chunk in zip(self._chunk_names(), self.chunks, strict=True):
            missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
            assert not unexpected and all(
                key.endswith("._extra_state") for key in missing
            )  # these are always None here
        if optimizer:
            optimizer["param_state"] = loaded["optimizer"]
            for group in optimizer["optimizer"]["param_groups"]:
                group["step"] = updates
            with torch.no_grad():
                self.optimizer.load_state_dict(optimizer)
            if _TORCH_ADAM:
                # The loaded state shares one step tensor, which AdamW would advance once per parameter.
                sharded.set_updates(self._adam(), updates)
        self.scheduler.step(increment=step)

    def _adam(self) -> torch.optim.Optimizer | None:
        """The optimizer inside megatron's, None on a rank where nothing is trained."""
        trained = any(parameter.requires_grad for chunk in self.chunks for parameter in chunk.parameters())
        return self.optimizer.optimizer if trained else None

    def _chunk_names(self) -> list[str]:
        return ["model"] if len(self.chunks) == 1 else [f"model{i}" for i in range(len(self.chunks))]

    def _sharded_model(self) -> dict:
        return {
            name: {
                key: entry
                for key, entry in chunk.sharded_state_dict(metadata=dict(sharded.METADATA)).items()
                if not key.endswith("._extra_state")
            }
            for name, chunk in zip(self._chunk_names(), self.chunks, strict=True)
        }

    def _sharded_optimizer(self, model: dict, is_loading: bool) -> dict:
        return self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(sharded.METADATA))

    def shutdown(self) -> None:
        destroy_groups()


def _keep_step_out_of_sharded_state() -> None:
    """Let DistributedOptimizer load into torch's AdamW, which keeps `step` as a tensor in its state.

    megatron-core expects only the sharded tensors there and fails on `step`; it is common to all parameters
    and set from the common state.
    """
    cls = distrib_optimizer.DistributedOptimizer
    original = cls._set_main_param_and_optimizer_states
    if getattr(original, "keeps_step_out", False):
        return

    def without_step(self, parameter, tensors):
        group, index = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        step = state.pop("step", None)
        original(self, parameter, tensors)
        if step is not None:
            state["step"] = step

    without_step.keeps_step_out = True
    cls._set_main_param_and_optimizer_states = without_step
