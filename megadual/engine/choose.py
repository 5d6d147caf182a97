"""The fastest layout that fits, by the plan's predictions, and why others are out."""

import dataclasses
import itertools

import torch

from megadual.engine.estimate import GIB, estimate
from megadual.engine.predict import Prediction, Rates, predict, rates_of
from megadual.engine.stages import Traffic, costs, split_layers
from megadual.engine.topology import Topology, topology
from megadual.errors import UserError
from megadual.model.dual_lm import Vocabulary
from megadual.train.config import PretrainConfig

SIZES = (1, 2, 4, 8)  # tried as parallel.tensor and as parallel.pipeline
VIRTUAL = (1, 2, 4)  # as parallel.virtual_pipeline
SPARE = 0.08  # of a GPU's memory, for what the estimate leaves out: fragments, buffers of collectives
SHOWN = 4  # layouts of a table that fit
STAND_IN = "H100"  # whose rates count where a GPU's are not known


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A resolved run under one layout, and what is expected of it."""

    run: PretrainConfig
    layout: Topology
    prediction: Prediction
    most_gib: float  # of the stage that has most

    @property
    def fits(self) -> bool:
        return self.most_gib <= (1 - SPARE) * self.run.parallel.gpu_memory_gib

    @property
    def name(self) -> str:
        return describe(self.run, self.layout)


@dataclasses.dataclass(frozen=True)
class Search:
    """All layouts of a number of GPUs: those that can work, the fastest first, and the rules that others break."""

    candidates: list[Candidate]
    refused: list[str]

    @property
    def fitting(self) -> list[Candidate]:
        return [each for each in self.candidates if each.fits]

    def best(self) -> Candidate:
        """The fastest that fits; UserError where none does."""
        if self.fitting:
            return self.fitting[0]
        if not self.candidates:
            raise UserError(f"parallel.layout=auto finds no layout that can work: {'; '.join(self.refused)}")
        least = min(self.candidates, key=lambda each: each.most_gib)
        raise UserError(
            f"parallel.layout=auto finds no layout on {least.layout.world} GPUs within {1 - SPARE:.0%} of "
            f"parallel.gpu_memory_gib={least.run.parallel.gpu_memory_gib:g}: {least.name} takes least, "
            f"{least.most_gib:.1f} GiB; more GPUs help, a smaller train.micro_batch_size or train.seq_len, or more "
            "parallel.context"
        )

    def table(self) -> str:
        """For people: the best few, what would be faster if it did fit, and the rules that others break."""
        best = self.best()
        shown = self.fitting[:SHOWN]
        too_large = [each for each in self.candidates if not each.fits]
        faster = [each for each in too_large if each.prediction.step_s < best.prediction.step_s]
        width = max(len(each.name) for each in [*shown, *faster[:2]])
        lines = [
            f"  {each.name:{width}}  {each.prediction.step_s:9.3g} s a step  {each.most_gib:6.1f} GiB{what}"
            for each, what in [(each, "") for each in shown] + [(each, ", does not fit") for each in faster[:2]]
        ]
        lines.append(
            f"  of {len(self.candidates)} layouts {len(too_large)} take more than {1 - SPARE:.0%} of "
            f"{best.run.parallel.gpu_memory_gib:g} GiB, {len(faster)} of them predicted faster"
        )
        return "\n".join([*lines, *(f"  out: {why}" for why in self.refused)])


def describe(run: PretrainConfig, layout: Topology) -> str:
    """All that is chosen."""
    return layout.describe(run) + (" recompute" if run.train.recompute else "")


def search(
    run: PretrainConfig, world: int, vocabulary: Vocabulary, traffic: Traffic, measured: tuple[str, Rates]
) -> Search:
    """Every tensor, pipeline and virtual pipeline size for a resolved run on `world` GPUs, recomputing or not.

    The engine, context parallelism and what is trained stay. Tensor parallelism stays within a host, with sequence
    parallelism. The same on every rank.
    """
    found, refused = [], {}
    for tensor, pipeline, virtual in itertools.product(SIZES, SIZES, VIRTUAL):
        if world % (tensor * pipeline * run.parallel.context) or virtual > 1 and pipeline == 1:
            continue
        if tensor > measured[1].gpus:
            continue
        parallel = dataclasses.replace(
            run.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, sequence=tensor > 1,
            stage_layers=None,
        )  # fmt: skip
        candidate = dataclasses.replace(run, parallel=parallel)
        try:
            layout = topology(candidate, world)
        except UserError as error:
            refused[str(error)] = None
            continue
        cost = costs(candidate, vocabulary, traffic)
        parallel.stage_layers = split_layers(run.model.layers, pipeline * virtual, cost)
        for recompute in (False, True):
            train = dataclasses.replace(run.train, recompute=recompute)
            candidate = dataclasses.replace(run, parallel=parallel, train=train)
            most = max(stage.total for stage in estimate(candidate, layout, vocabulary, traffic)) / GIB
            expected = predict(candidate, layout, vocabulary, traffic, measured)
            found.append(Candidate(candidate, layout, expected, most))
    if not found and not refused:
        refused[f"parallel.context={run.parallel.context} does not divide {world} processes"] = None
    return Search(sorted(found, key=lambda each: each.prediction.step_s), list(refused))


def rates_here() -> tuple[tuple[str, Rates], str]:
    """The rates of this machine's GPU, or an H100's, and what to say where those stand in for others."""
    try:
        return rates_of(), "" if torch.cuda.is_available() else f", no GPU is here: {STAND_IN}'s rates"
    except UserError as error:
        return rates_of(STAND_IN), f", by {STAND_IN}'s rates: {error}"


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
        f"{expected.tokens_per_s * layout.world:,.0f} in all, MFU {expected.mfu:.1%}, {days:.1f} days for "
        f"{run.train.steps:,} steps"
    ]
    if run.parallel.layout == "given":
        fitting = search(run, layout.world, vocabulary, traffic, measured).fitting
        if fitting and fitting[0].prediction.step_s < 0.95 * expected.step_s:
            best = fitting[0]
            lines.append(
                f"faster, as predicted: {best.name}, {best.prediction.tokens_per_s:,.0f} tokens/s a GPU; "
                "parallel.layout=auto takes it"
            )
    return "\n".join(["", *lines])
