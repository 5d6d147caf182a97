"""What both engines do alike around one optimizer step: global normalisation, losses gathered, the schedule."""

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megadual.data.dataset import MicroBatch
from megadual.model.dual_lm import StreamLosses, Vocabulary
from megadual.model.flops import step_flops
from megadual.streams import STREAMS
from megadual.train.config import PretrainConfig


@dataclasses.dataclass
class StepResult:
    """What one optimizer step did; equal on every rank. Per-depth losses are (D,) lists.

    `flops` are the model FLOPs of the whole step, `fill` the share of positions that are not padding.
    """

    loss: float
    loss_text: float
    loss_semantic: float
    loss_pixel: float
    depth_semantic: list[float]
    depth_pixel: list[float]
    grad_norm: float
    lr: float
    flops: float
    fill: float


class GlobalLosses:
    """The losses of one global batch: each stream's is divided by its count of targets in all of it.

    So how rows fall on micro-batches and ranks does not change them. `batches` are this data-parallel rank's, whole
    where context-parallel ranks share them. Collective over the data-parallel group.
    """

    def __init__(self, run: PretrainConfig, batches: list[MicroBatch], vocabulary: Vocabulary):
        self.run, self.depth = run, vocabulary.depth
        counts = torch.tensor(
            [
                [len(b.text_positions), len(b.draw_positions), len(b.image_positions), b.tokens.numel()]
                + [b.filled, sum(length**2 for length in b.lengths)]
                for b in batches
            ],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        ).sum(0)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        text, drawn, images, positions, filled, squares = counts.tolist()
        self.text_count, self.draw_count = max(text, 1), max(drawn, 1)
        self.flops = step_flops(run.model, vocabulary, filled, squares, images, text, drawn, run.train.parts)
        self.fill = filled / positions
        self.sums = torch.zeros(1 + 2 * self.depth, dtype=torch.float64, device=torch.cuda.current_device())

    def total(self, losses: StreamLosses) -> torch.Tensor:
        """One micro-batch's part of the weighted loss to minimise; its sums are kept for `result`."""
        self.sums += torch.cat([losses.text.view(1), losses.semantic, losses.pixel]).detach()
        weights, drawn = self.run.train.loss, self.draw_count * self.depth
        return (
            weights.text * losses.text / self.text_count
            + weights.semantic * losses.semantic.sum() / drawn
            + weights.pixel * losses.pixel.sum() / drawn
        )

    def result(self, grad_norm: float, lr: float) -> StepResult:
        """Add up the last stages' sums and hand them to every rank (collective over all ranks)."""
        sums = self.sums
        if self.run.parallel.sequence:  # the visual sums are each rank's part, the text sum is whole
            visual = sums[1:].clone()
            dist.all_reduce(visual, group=parallel_state.get_tensor_model_parallel_group())
            sums[1:] = visual
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        text = sums[0].item() / self.text_count
        per_depth = (sums[1:] / self.draw_count).view(len(STREAMS), self.depth)
        semantic, pixel = per_depth.mean(1).tolist()
        weights = self.run.train.loss
        return StepResult(
            loss=weights.text * text + weights.semantic * semantic + weights.pixel * pixel,
            loss_text=text,
            loss_semantic=semantic,
            loss_pixel=pixel,
            depth_semantic=per_depth[0].tolist(),
            depth_pixel=per_depth[1].tolist(),
            grad_norm=float(grad_norm),
            lr=lr,
            flops=self.flops,
            fill=self.fill,
        )


def schedule(run: PretrainConfig, optimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine to `train.min_lr` at the last step."""
    train = run.train
    return OptimizerParamScheduler(
        optimizer,
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
