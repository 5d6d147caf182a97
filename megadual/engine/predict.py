"""How fast a layout will train, from rates that were measured on its type of GPU.

A micro-batch takes a stage the FLOPs of its parts at their rates, the adding of its gradients, and its tensor- and
context-parallel exchanges. A step is all micro-batches through the slowest stage, the pipeline's filling and emptying,
the optimizer, and what of the data-parallel exchanges nothing hides. Left out: that documents differ, so that stages
wait for the micro-batch with most to draw.
"""

import dataclasses
from pathlib import Path

import torch
import yaml

from megadual.engine.estimate import GIB, StageEstimate, estimate
from megadual.engine.stages import Traffic
from megadual.engine.topology import Topology
from megadual.errors import UserError
from megadual.model import sizes
from megadual.model.dual_lm import Vocabulary
from megadual.model.flops import PEAKS, Work, step_flops, work
from megadual.train.config import PretrainConfig

# Bytes a weight and step that the optimizer moves: AdamW in fp32 with a bf16 copy, the gradient's norm and clipping,
# all split over data-parallel ranks; and zeroing gradients, which is not.
OPTIMIZER_BYTES, ZEROING_BYTES = 46, 4
# Bytes a weight and micro-batch that adding its gradient to an fp32 sum moves, and nothing hides.
GRADIENT_BYTES = 6
# Exchanges of (T, H) hidden states a layer, forward and backward, that nothing runs beside under tensor parallelism.
TENSOR_EXCHANGES = 6
LAST_BUCKET = 0.25  # of the gradients' reduction runs beside no backward


@dataclasses.dataclass(frozen=True)
class Rates:
    """See rates.yaml."""

    layers: float
    text: float
    heads: float
    memory: float
    micro_batch_s: float
    inside: float
    between: float
    gpus: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a GPU; the memory is that of the first stage's, which rank 0 has."""

    step_s: float
    tokens_per_s: float
    mfu: float
    peak_gib: float


def rates_of(gpu: str | None = None) -> tuple[str, Rates]:
    """A type of GPU and its rates; None: this machine's, or H100 where there is none. UserError for an unknown one."""
    known = yaml.safe_load(Path(__file__).with_name("rates.yaml").read_text())
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    name = gpu or next((name for name in known if name in here), here)
    if name not in known:
        raise UserError(f"megadual/engine/rates.yaml has no rates of '{name}'; known: {', '.join(known)}")
    return name, Rates(**known[name])


def predict(
    run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, traffic: Traffic, measured: tuple[str, Rates]
) -> Prediction:
    """What a resolved run will do; `measured` as `rates_of` gives it."""
    name, rates = measured
    parallel, train = run.parallel, run.train
    stages = estimate(run, layout, vocabulary, traffic)
    each = work(run.model, vocabulary).with_backward(train.parts, parallel.pipeline > 1)
    times = [_micro_batch_s(run, each, traffic, stage, number, rates) for number, stage in enumerate(stages)]
    rounds = layout.microbatches + (parallel.pipeline - 1) / parallel.virtual_pipeline
    step_s = rounds * max(times) + max(_update_s(run, layout, vocabulary, stage, rates) for stage in stages)
    positions = train.global_batch_tokens
    flops = step_flops(
        run.model, vocabulary, positions, positions * traffic.attended, positions * traffic.image,
        positions * traffic.text, positions * traffic.drawn, train.parts,
    )  # fmt: skip
    a_gpu = 1 / step_s / layout.world
    return Prediction(step_s, positions * a_gpu, flops * a_gpu / PEAKS[name], stages[0].total / GIB)


def _micro_batch_s(
    run: PretrainConfig, each: Work, traffic: Traffic, stage: StageEstimate, number: int, rates: Rates
) -> float:
    """One micro-batch, forward and backward, through a stage."""
    parallel, train, hidden = run.parallel, run.train, run.model.hidden
    tensor, split = parallel.tensor, parallel.tensor if parallel.sequence else 1
    positions = train.seq_len * train.micro_batch_size / parallel.context
    layers = stage.layers * positions * (each.layer_position + each.attention * traffic.attended) / tensor
    if train.recompute:
        layers *= 4 / 3
    if number == 0:
        layers += positions * traffic.image * each.embed_image
    seconds = 2 * layers / rates.layers + rates.micro_batch_s
    if number == parallel.pipeline - 1:
        seconds += 2 * positions * traffic.text * each.text_target / tensor / rates.text
        seconds += 2 * positions * traffic.drawn * each.drawn_target / split / rates.heads
    seconds += stage.trained * GRADIENT_BYTES / rates.memory
    width = 2 if train.precision == "bf16" else 4
    exchanged = stage.layers * TENSOR_EXCHANGES * positions * hidden * width * (tensor - 1) / tensor
    if parallel.context > 1:  # keys and values of all ranks, there and back
        kv = run.model.kv_heads * (hidden // run.model.heads) / tensor
        exchanged += stage.layers * 2 * 2 * positions * kv * width * (parallel.context - 1)
    if parallel.pipeline > 1:
        exchanged += 2 * positions * hidden * width / split
    if run.engine == "deepspeed" and parallel.zero_stage == 3:  # weights, forward and backward, half of it hidden
        exchanged += stage.weights
    return seconds + exchanged / rates.inside


def _update_s(
    run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, stage: StageEstimate, rates: Rates
) -> float:
    """The optimizer's step of a stage, and exchanges of gradients and weights that nothing hides."""
    parallel = run.parallel
    ranks = layout.data * parallel.context
    weights = stage.trained
    seconds = weights * (OPTIMIZER_BYTES / ranks + ZEROING_BYTES) / rates.memory
    bus = rates.inside if layout.world <= rates.gpus else rates.between
    seconds += weights * (4 * LAST_BUCKET + 2) * (ranks - 1) / ranks / bus
    if parallel.sequence:  # the visual heads' gradients are summed over tensor-parallel ranks
        heads = sum(sizes.HeadWeights.of(run.model, stream).total for stream in vocabulary.streams)
        seconds += heads * 4 * 2 * (parallel.tensor - 1) / parallel.tensor / rates.inside
    return seconds
