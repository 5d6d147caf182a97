"""What a layout will hold and do, before anything is allocated: parameters, FLOPs and memory of every stage."""

import dataclasses
import math
from statistics import NormalDist

from megadual.engine.muon import work
from megadual.engine.stages import Traffic, costs
from megadual.engine.topology import Topology
from megadual.model import sizes
from megadual.model.dual_lm import Vocabulary
from megadual.model.fused import LOGITS_AT_ONCE
from megadual.train.config import PretrainConfig

GIB = 1 << 30
DEEPSPEED_BUCKET = 500_000_000  # gradients that DeepSpeed reduces at once, its default


@dataclasses.dataclass(frozen=True)
class StageEstimate:
    """One pipeline stage; bytes are those of one GPU."""

    layers: int
    parameters: int  # of the stage, over its tensor-parallel ranks
    trained: float  # weights that one of its GPUs has gradients of
    flops_share: float
    weights: float
    gradients: float
    optimizer: float
    orthogonalised: float  # multiply-adds of a step's on the GPU that orthogonalises most; 0 without Muon
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate(run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, traffic: Traffic) -> list[StageEstimate]:
    """The stages of a resolved run, first to last."""
    model, parallel, train = run.model, run.parallel, run.train
    llm, heads = "llm" in train.parts, "heads" in train.parts
    virtual = parallel.virtual_pipeline
    hidden, head, tensor, data = model.hidden, model.head, parallel.tensor, layout.data
    kv = model.kv_heads * (hidden // model.heads)
    a_layer = sizes.layer(model)
    layer = a_layer.total
    table = sizes.text_table(model, vocabulary.padded_text_size).total
    a_projector = sizes.projector(model, vocabulary.streams)
    projector = a_projector.total
    all_heads = [sizes.HeadWeights.of(model, stream) for stream in vocabulary.streams]

    cost = costs(run, vocabulary, traffic)
    per_stage = [parallel.stage_layers[stage :: parallel.pipeline] for stage in range(parallel.pipeline)]
    shares = [sum(chunks) * cost.layer for chunks in per_stage]
    shares[0] += cost.embedding + per_stage[0][0] * (cost.first - 1) * cost.layer
    shares[-1] += cost.heads
    total_share = sum(shares)

    width = 2 if train.precision == "bf16" else 4
    # fp32 gradients; fp32 moments, of which Muon has one, and a fp32 copy of the weights where they are bf16
    per_weight, per_gradient, per_optimizer = width, 4, 8 + (4 if width == 2 else 0)
    stage_zero = parallel.zero_stage if run.engine == "deepspeed" else 1
    positions = train.seq_len * train.micro_batch_size / parallel.context
    data *= parallel.context  # these ranks split gradients' and optimizer's memory as data-parallel ones do
    inner = tensor if parallel.sequence else 1
    # kept for backward per layer and position: inputs of both norms, q, k, v, attention's output, gate, up; and for the
    # gradients of weights: outputs of both norms, product
    kept = (2 * hidden / inner + (2 * hidden + 2 * kv + 2 * model.ffn) / tensor) * width
    if llm:  # in FP8 a byte each, attention's output once more
        kept += (2 * hidden / inner + model.ffn / tensor) * (1 if train.fp8 else width)
        kept += hidden / tensor if train.fp8 else 0
    if train.recompute:
        kept = hidden / inner * width

    stages = []
    for stage, chunks in enumerate(per_stage):
        first, last = stage == 0, stage == parallel.pipeline - 1
        split = sum(chunks) * layer + (table if first else 0)
        # not split over tensor-parallel ranks, by part
        whole = {"projector": projector if first else 0, "llm": 0, "heads": 0}
        if last:
            split += 0 if model.tie_embeddings and first else table
            whole["llm"], whole["heads"] = hidden, sum(each.total for each in all_heads)  # the last norm
        on_gpu = split / tensor + sum(whole.values())
        trained = llm * split / tensor + sum(whole[part] for part in set(train.parts))
        # passes through a chunk that wait for their backward, of which there are `virtual` a micro-batch
        in_flight = (parallel.pipeline - stage - 1) * (1 + parallel.run_ahead) + 1
        if virtual > 1:  # megatron-core's interleaved schedule
            in_flight = 2 * (in_flight - 1) + (virtual - 1) * parallel.pipeline + 1
        in_flight = min(in_flight, layout.microbatches * virtual)
        # a frozen first chunk keeps nothing; the others do, for backward goes through whatever a stage receives
        kept_layers = sum(chunks) - (chunks[0] if first and not (llm or "projector" in train.parts) else 0)
        logits = 0.0
        if last:
            # one chunk's logits, the trained classifiers' gradients, made with them, and the visual heads' states
            logits = min(LOGITS_AT_ONCE, positions * traffic.text * vocabulary.padded_text_size / tensor) * width
            classifiers = sum(each.classifiers.matrices for each in all_heads)
            logits += (llm * table / tensor + heads * classifiers) * width
            most = most_drawn(positions, traffic) / inner
            at_once = min(drawn_at_once(run, traffic) or most, most)
            codes = at_once * sum(stream.depth for stream in vocabulary.streams)
            logits += codes * head.layers * (8 * head.width + 3 * head.ffn) * width
            if at_once < most:  # gradients of a head's two parts are summed
                logits += heads * max(each.total for each in all_heads) * width
        muon: list[tuple[sizes.Weights, int]] = []  # what it trains, and over how many GPUs that is split
        if train.optimizer == "muon":
            muon += [(a_layer, tensor)] * (llm * sum(chunks))
            muon += [(a_projector, 1)] * (first and "projector" in train.parts)
            muon += [(part, 1) for each in all_heads for part in (each.projector, each.transformer) if last and heads]
        works = [work(*shape) for weights, _ in muon for shape in weights.shapes]
        bucket = parallel.zero.get("reduce_bucket_size", DEEPSPEED_BUCKET) * per_gradient
        stages.append(
            StageEstimate(
                layers=sum(chunks),
                parameters=split + sum(whole.values()),
                trained=trained,
                flops_share=shares[stage] / total_share,
                weights=on_gpu * per_weight / (data if stage_zero == 3 else 1)
                + (2 * sum(chunks) * a_layer.matrices / tensor if train.fp8 else 0),  # along and across
                gradients=trained * per_gradient / (data if stage_zero >= 2 else 1)
                + (bucket if run.engine == "deepspeed" else 0),
                optimizer=(trained * per_optimizer - sum(4 * each.matrices / over for each, over in muon)) / data,
                # of a fused matrix's parts, two at most are large
                orthogonalised=max(sum(works) / (data * tensor), 2 * max(works, default=0)),
                activations=in_flight / virtual * kept_layers * positions * kept,
                logits=logits,
            )
        )
    return stages


def drawn_deviation(positions: float, traffic: Traffic) -> float:
    """Standard deviation of how many of a micro-batch's positions are drawn: by chance an image is or is not."""
    if not traffic.drawn:
        return 0.0
    share = min(traffic.drawn / traffic.image, 1.0)
    return math.sqrt(positions / traffic.attended * share * (1 - share)) * traffic.attended * traffic.image


def drawn_at_once(run: PretrainConfig, traffic: Traffic) -> int | None:
    """`train.drawn_at_once` of a resolved run, or what null stands for; None under ZeRO-3, where all are kept."""
    parallel, train = run.parallel, run.train
    if train.drawn_at_once is not None or parallel.zero_stage == 3:
        return train.drawn_at_once
    positions = train.seq_len * train.micro_batch_size / parallel.context
    often = positions * traffic.drawn + drawn_deviation(positions, traffic)
    return max(math.ceil(often / (parallel.tensor if parallel.sequence else 1)), 1)


def drawn_over(bound: float, positions: float, traffic: Traffic) -> float:
    """By how much what is drawn of so many positions is expected to be over a bound."""
    over, deviation = positions * traffic.drawn - bound, drawn_deviation(positions, traffic)
    if not deviation:
        return max(over, 0.0)
    normal = NormalDist()
    return over * normal.cdf(over / deviation) + deviation * normal.pdf(over / deviation)


def most_drawn(positions: float, traffic: Traffic) -> float:
    """Positions that are drawn in the micro-batch of a thousand that has most of them.

    Of 4,096 positions of captioned images of 729 they are 1,095 on average and up to 2,916.
    """
    return min(positions * traffic.drawn + 3 * drawn_deviation(positions, traffic), positions)


def table(stages: list[StageEstimate], gpu_memory_gib: float) -> str:
    """The estimate for people, with a warning where a stage will not fit."""
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    lines = [
        "stage layers  parameters  FLOPs  " + "  ".join(f"{part:>11}" for part in parts) + "  (GiB a GPU, estimated)"
    ]
    for number, stage in enumerate(stages):
        sizes = "  ".join(f"{getattr(stage, part) / GIB:11.2f}" for part in parts)
        lines.append(f"{number:5} {stage.layers:6} {stage.parameters / 1e6:10.1f}M {stage.flops_share:6.1%}  {sizes}")
    worst = max(stages, key=lambda stage: stage.total)
    if worst.total > gpu_memory_gib * GIB:
        lines.append(
            f"warning: stage {stages.index(worst)} will not fit {gpu_memory_gib:.0f} GiB: more parallel.tensor or "
            "parallel.pipeline, train.recompute=true or a smaller train.micro_batch_size help"
        )
    return "\n".join(lines)
