"""How fast a layout will train, from rates that were measured on its type of GPU.

A micro-batch takes a stage its products, the bytes of everything between them, the adding of its gradients, and its
tensor-, context- and pipeline-parallel exchanges; no less than the host takes to launch it. A step is all micro-batches
through the slowest stage, the pipeline's filling and emptying, the optimizer, what of the data-parallel exchanges
nothing hides, and waiting: for the rank that draws most and for the slowest GPU. How much is drawn differs from one
micro-batch to the next too: pipeline stages wait for those that draw most.
"""

import dataclasses
import functools
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import yaml

from megadual.data.dealing import deal
from megadual.engine.estimate import GIB, StageEstimate, drawn_at_once, drawn_deviation, drawn_over, estimate
from megadual.engine.stages import Traffic
from megadual.engine.topology import Topology
from megadual.errors import UserError
from megadual.model import sizes
from megadual.model.dual_lm import Vocabulary
from megadual.model.flops import PEAKS, step_flops, work
from megadual.train.config import PretrainConfig

# Bytes a weight and step that the optimizer moves: AdamW in fp32 with a bf16 copy, the gradient's norm and clipping,
# all split over data-parallel ranks; and zeroing gradients, which is not.
OPTIMIZER_BYTES, ZEROING_BYTES = 46, 4
# Bytes a weight and micro-batch that adding its gradient to an fp32 sum moves, by engine; DeepSpeed's were fitted, and
# those that ZeRO-3 moves beside them.
GRADIENT_BYTES, ZERO_3_COPIED = {"megatron": 6, "deepspeed": 17}, 15
# bf16 numbers read and written between a layer's products, forward and backward, for each of its width and of its
# ffn's; and bytes for each logit.
WIDTH_PASSES, FFN_PASSES, LOGIT_BYTES = 40, 8, 6
# Exchanges of (T, H) hidden states a layer, forward and backward, that nothing runs beside under tensor parallelism.
TENSOR_EXCHANGES = 6
GRADIENTS_EXPOSED = 0.75  # of their reduction over data-parallel ranks nothing runs beside
ZERO_3_BYTES = 12  # a weight and micro-batch: gathered twice, its gradient reduced; fitted
TENSOR_LOSS = 0.1  # of the products' rate, each time that tensor parallelism halves them; fitted
# Of the standard deviation of what a micro-batch draws: expected excess of a normal number over its mean, where less is
# no gain; and where stages run ahead of each other, fitted.
STAGE_WAITS, STAGE_WAITS_AHEAD = 0.4, 0.1
# Weights of a bucket, whose gradients are reduced at once: megatron-core's, at least and for each data-parallel rank.
BUCKET, BUCKET_A_RANK = 40_000_000, 1_000_000
STEP_DEVIATION = 0.01  # standard deviation of one GPU's time for a step, of that time; assumed, not measured
STEPS_DEALT = 4  # in which the rank that draws most is looked for


@dataclasses.dataclass(frozen=True)
class Rates:
    """See rates.yaml."""

    products: float
    fp8: float
    memory: float
    inside: float
    between: float
    hop: float
    host_layer: float
    host_head: float
    gpus: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a GPU; the memory is that of the first stage's, which rank 0 has."""

    step_s: float
    tokens_per_s: float
    mfu: float
    peak_gib: float
    parts: dict[str, float] = dataclasses.field(default_factory=dict)  # what the step's seconds go to


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
    times = [_micro_batch_s(run, layout, vocabulary, traffic, stages, number, rates) for number in range(len(stages))]
    computing, exchanging = max(times, key=sum)
    update, reducing = max((_update_s(run, layout, vocabulary, stage, rates) for stage in stages), key=sum)
    parts = {
        "computing": layout.microbatches * computing,
        "exchanges of layers": layout.microbatches * exchanging,
        "pipeline's bubble": (parallel.pipeline - 1) / parallel.virtual_pipeline * (computing + exchanging),
        "optimizer": update,
        "exchanges of gradients": reducing,
        "rank that draws most": _drawn_most_s(run, layout, vocabulary, traffic, rates),
    }
    parts["slowest GPU"] = STEP_DEVIATION * expected_most(layout.world) * sum(parts.values())
    step_s = sum(parts.values())
    a_gpu = 1 / step_s / layout.world
    return Prediction(
        step_s,
        train.global_batch_tokens * a_gpu,
        flops_of(run, vocabulary, traffic) * a_gpu / PEAKS[name],
        stages[0].total / GIB,
        parts,
    )


def flops_of(run: PretrainConfig, vocabulary: Vocabulary, traffic: Traffic) -> float:
    """Model FLOPs of a step."""
    filled = run.train.global_batch_tokens * traffic.fill
    return step_flops(
        run.model, vocabulary, filled, filled * traffic.attended, filled * traffic.image, filled * traffic.text,
        filled * traffic.drawn, run.train.parts,
    )  # fmt: skip


def expected_most(count: int) -> float:
    """By how many standard deviations the largest of `count` normal numbers is expected to be over their mean."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))  # Blom's approximation


def _micro_batch_s(
    run: PretrainConfig,
    layout: Topology,
    vocabulary: Vocabulary,
    traffic: Traffic,
    stages: list[StageEstimate],
    number: int,
    rates: Rates,
) -> tuple[float, float]:
    """One micro-batch, forward and backward, through stage `number`: what it computes, and what it exchanges."""
    model, parallel, train, stage = run.model, run.parallel, run.train, stages[number]
    each = work(model, vocabulary).with_backward(train.parts, parallel.pipeline > 1)
    tensor, split = parallel.tensor, parallel.tensor if parallel.sequence else 1
    positions = train.seq_len * train.micro_batch_size / parallel.context
    filled = positions * traffic.fill

    layered = positions * stage.layers * (4 / 3 if train.recompute else 1)
    of_layer = each.layer_position / (rates.fp8 if train.fp8 else 1)
    multiply_adds = layered * (of_layer + each.attention * traffic.attended) / tensor
    moved = layered * 2 * (WIDTH_PASSES * model.hidden / split + FFN_PASSES * model.ffn / tensor)
    if number == 0:
        multiply_adds += filled * traffic.image * each.embed_image
    if number == len(stages) - 1:
        text = filled * traffic.text / tensor
        drawn = filled * traffic.drawn
        if parallel.pipeline > 1:
            waits = STAGE_WAITS_AHEAD if parallel.run_ahead else STAGE_WAITS
            drawn += waits * drawn_deviation(filled, traffic)
        if bound := drawn_at_once(run, traffic):
            drawn += drawn_over(bound * split, filled, traffic) / 3  # forward, once more
        of_heads = _drawn_position(run, vocabulary)
        multiply_adds += text * each.text_target + drawn / split * of_heads[0]
        moved += text * vocabulary.padded_text_size * LOGIT_BYTES + drawn / split * of_heads[1]
    moved += stage.trained * GRADIENT_BYTES[run.engine]

    width = 2 if train.precision == "bf16" else 4
    exchanged = stage.layers * TENSOR_EXCHANGES * positions * model.hidden * width * (tensor - 1) / tensor
    if parallel.context > 1:  # keys and values of all ranks, and hidden states for the visual heads, there and back
        kv = model.kv_heads * (model.hidden // model.heads) / tensor
        exchanged += 2 * positions * (stage.layers * 2 * kv + model.hidden) * width * (parallel.context - 1)
    exchange_s = exchanged / (rates.inside if tensor * parallel.context <= rates.gpus else rates.between)
    if parallel.pipeline > 1:  # megatron-core's stages lie as far apart as they can
        sent = 2 * positions * model.hidden * width / split * parallel.virtual_pipeline
        exchange_s += sent / (rates.inside if layout.world <= rates.gpus else rates.between)
    if run.engine == "deepspeed" and parallel.zero_stage == 3:
        moved += stage.trained * ZERO_3_COPIED
        exchange_s += stage.trained * ZERO_3_BYTES / 2 / _data_bus(run, layout, rates)
    products = rates.products * (1 - TENSOR_LOSS) ** math.log2(tensor)
    computing = 2 * multiply_adds / products + moved / rates.memory
    # Where rows are few and layers narrow, or shared by many, kernels take less time than the host's launching them.
    heads = len(vocabulary.streams) if number == len(stages) - 1 else 0
    launching = layered / positions * rates.host_layer + heads * rates.host_head
    return max(computing, launching - exchange_s), exchange_s


def _drawn_position(run: PretrainConfig, vocabulary: Vocabulary) -> tuple[float, float]:
    """The visual heads' multiply-adds, and the bytes they move between products, for a position that is drawn."""
    head = run.model.head
    each = work(run.model, vocabulary).with_backward(run.train.parts, run.parallel.pipeline > 1)
    between = 2 * head.layers * (WIDTH_PASSES * head.width + FFN_PASSES * head.ffn)
    moved = sum(s.depth * (between + s.codebook_size * LOGIT_BYTES) for s in vocabulary.streams)
    return each.drawn_target, moved


def _data_bus(run: PretrainConfig, layout: Topology, rates: Rates) -> float:
    """Bytes/s of a collective's bus over data-parallel ranks.

    They lie beside each other, tensor-parallel ranks between them: what of them is on one host shares that host's
    links to the others.
    """
    ranks, beside = layout.data * run.parallel.context, max(rates.gpus // run.parallel.tensor, 1)
    return rates.inside if ranks <= beside else min(rates.inside, beside * rates.between)


def _update_s(
    run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, stage: StageEstimate, rates: Rates
) -> tuple[float, float]:
    """The optimizer's step of a stage, and exchanges of gradients and weights that nothing hides."""
    parallel = run.parallel
    ranks = layout.data * parallel.context
    seconds = stage.trained * (OPTIMIZER_BYTES / ranks + ZEROING_BYTES) / rates.memory
    seconds += 2 * stage.orthogonalised / rates.products
    exchanged = stage.trained * (4 * GRADIENTS_EXPOSED + 2) * (ranks - 1) / ranks / _data_bus(run, layout, rates)
    buckets = math.ceil(stage.trained / max(BUCKET, BUCKET_A_RANK * ranks))
    exchanged += (GRADIENTS_EXPOSED + 1) * buckets * (ranks - 1) * rates.hop  # rings
    if parallel.sequence:  # the visual heads' gradients are summed over tensor-parallel ranks
        heads = sum(sizes.HeadWeights.of(run.model, stream).total for stream in vocabulary.streams)
        exchanged += heads * 4 * 2 * (parallel.tensor - 1) / parallel.tensor / rates.inside
    return seconds, exchanged


def _drawn_most_s(
    run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, traffic: Traffic, rates: Rates
) -> float:
    """What the data-parallel rank that draws most in a step takes longer than the average one."""
    parallel = run.parallel
    if not traffic.drawn or layout.data == 1:
        return 0.0
    images = max(round(run.train.seq_len * traffic.fill / traffic.attended), 1)  # of a row, one a document
    share = min(traffic.drawn / traffic.image, 1.0)
    excess = _most_images(images, share, layout.rows_per_step, layout.data) * traffic.attended * traffic.image
    multiply_adds, moved = _drawn_position(run, vocabulary)
    split = parallel.context * (parallel.tensor if parallel.sequence else 1)
    return excess / split * (2 * multiply_adds / rates.products + moved / rates.memory)


@functools.lru_cache
def _most_images(images: int, share: float, rows: int, ranks: int) -> float:
    """How many more images than the average rank that one draws which draws most, of `rows` of `images` dealt out."""
    random, most = np.random.default_rng(0), []
    for _ in range(STEPS_DEALT):
        drawn = random.binomial(images, share, rows).astype(float)
        most.append(max(drawn[of_rank].sum() for of_rank in deal(drawn, ranks)) - drawn.sum() / ranks)
    return float(np.mean(most))
