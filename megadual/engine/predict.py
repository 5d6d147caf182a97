"""How fast a layout will train, from rates that were measured on its type of GPU.

A micro-batch takes a stage its products, the bytes of everything between them, the adding of its gradients, and its
tensor- and context-parallel exchanges. A step is all micro-batches through the slowest stage, the pipeline's filling
and emptying, the optimizer, and what of the data-parallel exchanges nothing hides. How much is drawn differs from one
micro-batch to the next: pipeline stages wait for those that draw most.
"""

import dataclasses
import math
from pathlib import Path

import torch
import yaml

from megadual.engine.estimate import GIB, StageEstimate, drawn_deviation, estimate
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
# Bytes a weight and micro-batch that adding its gradient to an fp32 sum moves, by engine; DeepSpeed's were fitted.
GRADIENT_BYTES = {"megatron": 6, "deepspeed": 32}
# bf16 numbers read and written between a layer's products, forward and backward, for each of its width and of its
# ffn's; and bytes for each logit.
WIDTH_PASSES, FFN_PASSES, LOGIT_BYTES = 40, 8, 6
# Exchanges of (T, H) hidden states a layer, forward and backward, that nothing runs beside under tensor parallelism.
TENSOR_EXCHANGES = 6
GRADIENTS_EXPOSED = 0.75  # of their reduction over data-parallel ranks nothing runs beside
ZERO_3_BYTES = 12  # a weight and micro-batch: gathered twice, its gradient reduced; fitted
TENSOR_LOSS = 0.1  # of the products' rate, each time that tensor parallelism halves them; fitted
STAGE_WAITS = 0.4  # expected excess of a normal number over its mean, where less is no gain


@dataclasses.dataclass(frozen=True)
class Rates:
    """See rates.yaml."""

    products: float
    memory: float
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
    slowest = max(_micro_batch_s(run, vocabulary, traffic, stages, number, rates) for number in range(len(stages)))
    rounds = layout.microbatches + (parallel.pipeline - 1) / parallel.virtual_pipeline
    step_s = rounds * slowest + max(_update_s(run, layout, vocabulary, stage, rates) for stage in stages)
    filled = train.global_batch_tokens * traffic.fill
    flops = step_flops(
        run.model, vocabulary, filled, filled * traffic.attended, filled * traffic.image, filled * traffic.text,
        filled * traffic.drawn, train.parts,
    )  # fmt: skip
    a_gpu = 1 / step_s / layout.world
    return Prediction(step_s, train.global_batch_tokens * a_gpu, flops * a_gpu / PEAKS[name], stages[0].total / GIB)


def _micro_batch_s(
    run: PretrainConfig,
    vocabulary: Vocabulary,
    traffic: Traffic,
    stages: list[StageEstimate],
    number: int,
    rates: Rates,
) -> float:
    """One micro-batch, forward and backward, through stage `number`."""
    model, parallel, train, stage = run.model, run.parallel, run.train, stages[number]
    each = work(model, vocabulary).with_backward(train.parts, parallel.pipeline > 1)
    tensor, split = parallel.tensor, parallel.tensor if parallel.sequence else 1
    positions = train.seq_len * train.micro_batch_size / parallel.context
    filled = positions * traffic.fill

    layered = positions * stage.layers * (4 / 3 if train.recompute else 1)
    multiply_adds = layered * (each.layer_position + each.attention * traffic.attended) / tensor
    moved = layered * 2 * (WIDTH_PASSES * model.hidden / split + FFN_PASSES * model.ffn / tensor)
    if number == 0:
        multiply_adds += filled * traffic.image * each.embed_image
    if number == len(stages) - 1:
        text = filled * traffic.text / tensor
        drawn = filled * traffic.drawn
        if parallel.pipeline > 1:
            drawn += STAGE_WAITS * drawn_deviation(filled, traffic)
        multiply_adds += text * each.text_target + drawn / split * each.drawn_target
        moved += text * vocabulary.padded_text_size * LOGIT_BYTES
        head = model.head
        between = 2 * head.layers * (WIDTH_PASSES * head.width + FFN_PASSES * head.ffn)
        of_codes = sum(s.depth * (between + s.codebook_size * LOGIT_BYTES) for s in vocabulary.streams)
        moved += drawn / split * of_codes
    moved += stage.trained * GRADIENT_BYTES[run.engine]

    width = 2 if train.precision == "bf16" else 4
    exchanged = stage.layers * TENSOR_EXCHANGES * positions * model.hidden * width * (tensor - 1) / tensor
    if parallel.context > 1:  # keys and values of all ranks, and hidden states for the visual heads, there and back
        kv = model.kv_heads * (model.hidden // model.heads) / tensor
        exchanged += 2 * positions * (stage.layers * 2 * kv + model.hidden) * width * (parallel.context - 1)
    if parallel.pipeline > 1:
        exchanged += 2 * positions * model.hidden * width / split
    if run.engine == "deepspeed" and parallel.zero_stage == 3:
        exchanged += stage.trained * ZERO_3_BYTES / 2
    products = rates.products * (1 - TENSOR_LOSS) ** math.log2(tensor)
    return 2 * multiply_adds / products + moved / rates.memory + exchanged / rates.inside


def _update_s(
    run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, stage: StageEstimate, rates: Rates
) -> float:
    """The optimizer's step of a stage, and exchanges of gradients and weights that nothing hides."""
    parallel = run.parallel
    ranks = layout.data * parallel.context
    seconds = stage.trained * (OPTIMIZER_BYTES / ranks + ZEROING_BYTES) / rates.memory
    bus = rates.inside if layout.world <= rates.gpus else rates.between
    seconds += stage.trained * (4 * GRADIENTS_EXPOSED + 2) * (ranks - 1) / ranks / bus
    if parallel.sequence:  # the visual heads' gradients are summed over tensor-parallel ranks
        heads = sum(sizes.HeadWeights.of(run.model, stream).total for stream in vocabulary.streams)
        seconds += heads * 4 * 2 * (parallel.tensor - 1) / parallel.tensor / rates.inside
    return seconds
