"""The megatron engine: tensor, pipeline and data parallel training on megatron-core's own schedules."""

import queue
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megadual.config import PretrainConfig
from megadual.data.dataset import MicroBatch
from megadual.engine.groups import destroy_groups, initialize_groups
from megadual.engine.step import GlobalLosses, StepResult, schedule
from megadual.engine.topology import Topology
from megadual.model.dual_lm import DualLM, StreamLosses, Vocabulary
from megadual.model.init import initialize
from megadual.model.parts import train_only

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}


def build_chunks(run: PretrainConfig, vocabulary: Vocabulary) -> list[DualLM]:
    """This rank's model chunks (one, or one per virtual pipeline stage), initialised from the run's seed."""
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
        self.scheduler = schedule(run, self.optimizer)
        no_sync = [wrapped.no_sync for wrapped in self.model]
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
            if ddp.overlap_grad_reduce:
                chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.forward_backward = get_forward_backward_func()

    def train_step(self, batches: list[MicroBatch]) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        batches = [batch.to(torch.cuda.current_device()) for batch in batches]
        for wrapped in self.model:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = GlobalLosses(self.run, batches, self.vocabulary)
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
            seq_length=batches[0].tokens.size(0),
            micro_batch_size=1,
        )
        _, grad_norm, _ = self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=1)
        return losses.result(grad_norm, lr)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and schedule as torch_dist shards; every rank calls it."""
        # megatron-core otherwise starts a manager process on every rank only to hold this queue.
        filesystem_async._results_queue = queue.Queue()
        state = self._sharded_state(is_loading=False) | {"scheduler": self.scheduler.state_dict()}
        dist_checkpointing.save(state, str(folder), sharded_strategy=("torch_dist", 1))

    def load(self, folder: Path) -> None:
        """Fill from what `save` wrote under any layout."""
        torch_adam = distrib_optimizer.Adam.__module__.startswith("torch.")
        if torch_adam:
            _keep_step_out_of_sharded_state()
            for optimizer in self.optimizer.chained_optimizers:
                optimizer._init_optimizer_states_with_dummy_values()
        state = dist_checkpointing.load(self._sharded_state(is_loading=True) | {"scheduler": None}, str(folder))
        for name, chunk in zip(self._chunk_names(), self.chunks):
            chunk.load_state_dict(state[name])
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])
        if torch_adam:
            for optimizer in self.optimizer.chained_optimizers:
                for moments in optimizer.optimizer.state.values():
                    # The loaded state shares one step tensor, which AdamW would advance once per parameter.
                    moments["step"] = moments["step"].clone()
        self.scheduler.load_state_dict(state["scheduler"])

    def _chunk_names(self) -> list[str]:
        return ["model"] if len(self.chunks) == 1 else [f"model{i}" for i in range(len(self.chunks))]

    def _sharded_state(self, is_loading: bool) -> dict:
        model = {
            name: chunk.sharded_state_dict(metadata=dict(_SHARDING))
            for name, chunk in zip(self._chunk_names(), self.chunks)
        }
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_SHARDING))
        return {**model, "optimizer": optimizer}

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
