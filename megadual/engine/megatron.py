"""The megatron engine: tensor, pipeline and data parallel training on megatron-core's own schedules."""

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megadual.config import PretrainConfig
from megadual.data.dataset import MicroBatch
from megadual.engine.topology import Topology
from megadual.model.dual_lm import DualLM, StreamLosses, Vocabulary
from megadual.model.init import initialize
from megadual.streams import STREAMS

@dataclasses.dataclass
class StepResult:
    """What one optimizer step did; equal on every rank. Per-depth losses are (D,) lists."""

    loss: float
    loss_text: float
    loss_semantic: float
    loss_pixel: float
    depth_semantic: list[float]
    depth_pixel: list[float]
    grad_norm: float
    lr: float


def initialize_parallel(run: PretrainConfig) -> None:
    """Create megatron-core's process groups over the initialised default group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.parallel.tensor,
        pipeline_model_parallel_size=run.parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            run.parallel.virtual_pipeline if run.parallel.virtual_pipeline > 1 else None
        ),
    )
    model_parallel_cuda_manual_seed(run.train.seed)


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
        initialize_parallel(run)
        self.run, self.topology, self.vocabulary = run, topology, vocabulary
        self.chunks = build_chunks(run, vocabulary)
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
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=train.lr / (train.warmup_steps + 1),
            max_lr=train.lr,
            min_lr=train.min_lr,
            lr_warmup_steps=train.warmup_steps,
            lr_decay_steps=max(train.steps, train.warmup_steps + 1),
            lr_decay_style="cosine",
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=train.steps,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        for chunk, wrapped in zip(self.chunks, self.model):
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
            if ddp.overlap_grad_reduce:
                chunk.config.no_sync_func = [m.no_sync for m in self.model] if len(self.model) > 1 else wrapped.no_sync
        self.forward_backward = get_forward_backward_func()

    @property
    def data_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def train_step(self, batches: list[MicroBatch]) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Every stream's loss is normalised by its count of targets in the whole global batch, so that how rows
        fall on micro-batches and ranks does not change it.
        """
        batches = [batch.to(torch.cuda.current_device()) for batch in batches]
        for wrapped in self.model:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

        counts = torch.tensor(
            [sum(len(b.text_positions) for b in batches), sum(len(b.draw_positions) for b in batches)],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        text_count, draw_count = counts.clamp(min=1).tolist()
        weights = self.run.train.loss
        # megatron divides by the micro-batches and averages over data-parallel ranks; undo both.
        scale = len(batches) * self.topology.data
        depth = self.vocabulary.depth

        def loss_func(losses: StreamLosses):
            total = (
                weights.text * losses.text / text_count
                + weights.semantic * losses.semantic.sum() / (draw_count * depth)
                + weights.pixel * losses.pixel.sum() / (draw_count * depth)
            )
            sums = torch.cat([losses.text.view(1), losses.semantic, losses.pixel]).detach()
            return total * scale, sums

        def forward_step(iterator, model):
            return model(next(iterator)), loss_func

        sums = self.forward_backward(
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
        return self._result(self._gather(sums), text_count, draw_count, grad_norm, lr)

    def _gather(self, sums: list[torch.Tensor]) -> torch.Tensor:
        """(1 + 2D,) summed losses of the global batch on every rank, from the last stages' micro-batches."""
        width = 1 + 2 * self.vocabulary.depth
        total = torch.zeros(width, dtype=torch.float64, device=torch.cuda.current_device())
        if sums:
            total += torch.stack(sums).double().sum(0)
            if self.run.parallel.sequence:  # the visual sums are each rank's part, the text sum is whole
                visual = total[1:].clone()
                dist.all_reduce(visual, group=parallel_state.get_tensor_model_parallel_group())
                total[1:] = visual
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return total

    def _result(self, sums, text_count: float, draw_count: float, grad_norm, lr: float) -> StepResult:
        depth, weights = self.vocabulary.depth, self.run.train.loss
        text = sums[0].item() / text_count
        per_depth = (sums[1:] / draw_count).view(len(STREAMS), depth)
        semantic, pixel = per_depth.mean(1).tolist()
        return StepResult(
            loss=weights.text * text + weights.semantic * semantic + weights.pixel * pixel,
            loss_text=text,
            loss_semantic=semantic,
            loss_pixel=pixel,
            depth_semantic=per_depth[0].tolist(),
            depth_pixel=per_depth[1].tolist(),
            grad_norm=float(grad_norm),
            lr=lr,
        )

    def shutdown(self) -> None:
        parallel_state.destroy_model_parallel()
