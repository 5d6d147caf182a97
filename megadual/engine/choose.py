"""The fastest layout that fits, by the plan's predictions."""

import dataclasses
import itertools

from megadual.engine.estimate import GIB, estimate
from megadual.engine.predict import Prediction, Rates, predict, rates_of
from megadual.engine.stages import Traffic, costs, split_layers
from megadual.engine.topology import Topology, topology
from megadual.errors import UserError
from megadual.model.dual_lm import Vocabulary
from megadual.train.config import PretrainConfig

SIZES = (1, 2, 4, 8)  # tried as parallel.tensor and as parallel.pipeline
SPARE = 0.08  # of a GPU's memory, for what the estimate leaves out: fragments, buffers of collectives


def fastest(
    run: PretrainConfig, world: int, vocabulary: Vocabulary, traffic: Traffic, measured: tuple[str, Rates]
) -> tuple[PretrainConfig, Topology, Prediction] | None:
    """A resolved run on `world` GPUs with the fastest tensor and pipeline sizes, recomputing or not; None: none fits.

    The engine, context parallelism and what is trained stay. Tensor parallelism stays within a host, with sequence
    parallelism.
    """
    found = []
    for tensor, pipeline, recompute in itertools.product(SIZES, SIZES, (False, True)):
        parallel = dataclasses.replace(
            run.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=1, sequence=tensor > 1, stage_layers=None
        )
        candidate = dataclasses.replace(
            run, parallel=parallel, train=dataclasses.replace(run.train, recompute=recompute)
        )
        try:
            layout = topology(candidate, world)
        except UserError:
            continue
        if tensor > measured[1].gpus:
            continue
        parallel.stage_layers = split_layers(run.model.layers, pipeline, costs(candidate, vocabulary, traffic))
        most = max(stage.total for stage in estimate(candidate, layout, vocabulary, traffic))
        if most <= (1 - SPARE) * parallel.gpu_memory_gib * GIB:
            found.append((candidate, layout, predict(candidate, layout, vocabulary, traffic, measured)))
    return max(found, key=lambda one: one[2].tokens_per_s, default=None)


def about(run: PretrainConfig, layout: Topology, vocabulary: Vocabulary, traffic: Traffic) -> str:
    """What speed to expect, for people, and a layout that should be faster by more than predictions err, if any.

    Nothing for a GPU whose rates are not known.
    """
    try:
        measured = rates_of()
    except UserError:
        return ""
    expected = predict(run, layout, vocabulary, traffic, measured)
    days = expected.step_s * run.train.steps / 86400
    lines = [
        f"expected on {measured[0]}: {expected.step_s:.2f} s a step, {expected.tokens_per_s:,.0f} tokens/s a GPU, "
        f"MFU {expected.mfu:.1%}, {days:.1f} days for {run.train.steps:,} steps"
    ]
    best = fastest(run, layout.world, vocabulary, traffic, measured)
    if best and best[2].step_s < 0.95 * expected.step_s:
        other, its_layout, found = best
        lines.append(
            f"faster, as predicted: {its_layout.describe(other)} recompute={str(other.train.recompute).lower()}, "
            f"{found.tokens_per_s:,.0f} tokens/s a GPU"
        )
    return "\n".join(["", *lines])
