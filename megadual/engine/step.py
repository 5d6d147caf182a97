"""What both engines do alike around one optimizer step: global normalisation and losses gathered."""

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megadual.data.dataset import MicroBatch
from megadual.model.dual_lm import StreamLosses, Vocabulary
from megadual.model.flops import step_flops
from megadual.streams import TEXT
from megadual.train.config import PretrainConfig


@dataclasses.dataclass
class StepResult:
    """What one optimizer step did; equal on every rank.

    `losses` are the mean losses of the text and of each stream, by name, `depth_losses` each stream's (D,) by depth;
    `flops` the model FLOPs of the whole step, `fill` the share of positions that are not padding.
    """

    loss: float  # the weighted sum
    losses: dict[str, float]
    depth_losses: dict[str, list[float]]
    grad_norm: float
    lr: float
    flops: float
    fill: float


def loss_weights(run: PretrainConfig, vocabulary: Vocabulary) -> dict[str, float]:
    """What each mean loss weighs in the total, by name."""
    return {name: run.train.loss.get(name, 1.0) for name in [TEXT, *(stream.name for stream in vocabulary.streams)]}


class GlobalLosses:
    """The losses of one global batch: each is divided by its count of targets in all of it.

    So how rows fall on micro-batches and ranks does not change them. `batches` are this data-parallel rank's, whole
    where context-parallel ranks share them. Collective over the data-parallel group.
    """

    def __init__(self, run: PretrainConfig, batches: list[MicroBatch], vocabulary: Vocabulary):
        self.run, self.streams = run, vocabulary.streams
        self.weights = loss_weights(run, vocabulary)
        counts = torch.tensor(
            [
                [len(b.predicts_text_at), len(b.predicts_codes_at), len(b.image_at), b.tokens.numel()]
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
        sums = 1 + sum(stream.depth for stream in self.streams)  # the text's, then each stream's by depth
        self.sums = torch.zeros(sums, dtype=torch.float64, device=torch.cuda.current_device())

    def total(self, losses: StreamLosses) -> torch.Tensor:
        """One micro-batch's part of the weighted loss to minimise; its sums are kept for `result`."""
        visual = [losses.visual[stream.name] for stream in self.streams]
        self.sums += torch.cat([losses.text.view(1), *visual]).detach()
        total = self.weights[TEXT] * losses.text / self.text_count
        for stream, sums_D in zip(self.streams, visual, strict=True):
            total = total + self.weights[stream.name] * sums_D.sum() / (self.draw_count * stream.depth)
        return total

    def means(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The mean losses by name, and those of each stream by depth, of all ranks (collective over all ranks)."""
        sums = self.sums
        if self.run.parallel.sequence:  # the visual sums are each rank's part, the text sum is whole
            visual = sums[1:].clone()
            dist.all_reduce(visual, group=parallel_state.get_tensor_model_parallel_group())
            sums[1:] = visual
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        text, *visual = sums.split([1, *(stream.depth for stream in self.streams)])
        by_depth = {stream.name: sums_D / self.draw_count for stream, sums_D in zip(self.streams, visual, strict=True)}
        losses = {TEXT: text.item() / self.text_count}
        losses |= {stream: mean_D.mean().item() for stream, mean_D in by_depth.items()}
        return losses, {stream: mean_D.tolist() for stream, mean_D in by_depth.items()}

    def result(self, grad_norm: float, lr: float) -> StepResult:
        """What the step did, the same on every rank (collective over all ranks)."""
        losses, depth_losses = self.means()
        return StepResult(
            loss=sum(self.weights[name] * loss for name, loss in losses.items()),
            losses=losses,
            depth_losses=depth_losses,
            grad_norm=float(grad_norm),
            lr=lr,
            flops=self.flops,
            fill=self.fill,
        )
