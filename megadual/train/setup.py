"""From a run's config to what it trains on and with, checked before any process group exists."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from megadual.data.dataset import PackedDataset
from megadual.data.mds_reader import ShardSet
from megadual.data.packing import PackedRows
from megadual.engine import choose
from megadual.engine.estimate import estimate, table
from megadual.engine.protocol import Engine
from megadual.engine.stages import Traffic, costs, split_layers
from megadual.engine.topology import Topology
from megadual.errors import UserError
from megadual.model.dual_lm import Vocabulary
from megadual.run.hooks import Hook
from megadual.run.profiler import Profiler
from megadual.streams import TEXT, SpecialIds, Stream
from megadual.text import fingerprint, load_text_tokenizer
from megadual.train.checkpoint import resolve_checkpoint, starting_weights
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog
from megadual.train.sampling import Sampling
from megadual.train.validation import SEED, Validation
from megadual.vision import read_codebooks


@dataclasses.dataclass
class Inputs:
    """What a run reads: the shard sets, and what its tokenizers give the model."""

    sets: list[ShardSet]
    special: SpecialIds
    vocabulary: Vocabulary
    validation: list[ShardSet] = dataclasses.field(default_factory=list)
    traffic: Traffic | None = None  # set by `resolve_stages`


def read_inputs(run: PretrainConfig) -> Inputs:
    """Open the run's tokenizers and shard sets; UserError where one is missing or they don't belong together."""
    tokenizer = load_text_tokenizer(run.model.text_tokenizer)
    try:
        codebooks = read_codebooks(run.model.dualtoken)
    except ValueError as error:
        raise UserError(f"model.dualtoken: {error}") from error
    streams = choose_streams(codebooks.streams, run.model.streams)
    names = [stream.name for stream in streams]
    check_losses(run, names)
    if run.checkpoint.start:
        resolve_checkpoint(run.checkpoint.start)
    sets, held_out = open_sets(run, names)
    for shard_set in sets + held_out:
        shard_set.check(codebooks.fingerprint, run.model.dualtoken, fingerprint(tokenizer), run.model.text_tokenizer)
    vocabulary = Vocabulary(len(tokenizer), streams, {name: codebooks.vectors[name] for name in names})
    inputs = Inputs(sets, SpecialIds.of(tokenizer), vocabulary, held_out)
    resolve_stages(run, inputs)
    return inputs


def open_sets(run: PretrainConfig, streams: list[str]) -> tuple[list[ShardSet], list[ShardSet]]:
    """The run's shard sets, of training and held out, with the codes of `streams`."""
    train, held_out = ([ShardSet(root, streams) for root in sets] for sets in (run.data.sets, run.data.validation))
    return train, held_out


def choose_streams(streams: Iterable[Stream], names: list[str] | None) -> list[Stream]:
    """The streams that `model.streams` names, in the DualToken's order; None: all. UserError names those there are."""
    streams = list(streams)
    known = [stream.name for stream in streams]
    if names is not None and (not names or not set(names) <= set(known)):
        raise UserError(f"model.streams={names} must name streams of model.dualtoken: at least one of {known}")
    return [stream for stream in streams if names is None or stream.name in names]


def check_losses(run: PretrainConfig, streams: list[str]) -> None:
    """UserError where `train.loss` names none of the model's losses, or weighs all of them 0."""
    weights, known = run.train.loss, [TEXT, *streams]
    if unknown := sorted(set(weights) - set(known)):
        raise UserError(
            f"train.loss.{unknown[0]} weighs a loss that the model does not have; known: {', '.join(known)}"
        )
    if not any(weights.get(name, 1.0) for name in known):
        raise UserError(f"train.loss weighs {' and '.join(known)} 0: nothing would be trained")


def resolve_stages(run: PretrainConfig, inputs: Inputs) -> None:
    """Measure what the data asks of the model; by that set `run.parallel.stage_layers`, where it is null."""
    parallel, data = run.parallel, run.data
    rows = PackedRows(
        inputs.sets, data.weights, run.train.seq_len, run.train.seed, data.draw_probability, data.caption_dropout
    )
    inputs.traffic = Traffic.of(rows, data.draw_probability)
    if parallel.stage_layers is None:
        cost = costs(run, inputs.vocabulary, inputs.traffic)
        parallel.stage_layers = split_layers(run.model.layers, parallel.pipeline * parallel.virtual_pipeline, cost)


def engine(run: PretrainConfig, layout: Topology, vocabulary: Vocabulary) -> Engine:
    """The run's engine, over the initialised default process group, with the weights that it starts from."""
    start = starting_weights(run)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, start=start and str(start)))
    if run.engine == "deepspeed":
        from megadual.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(run, layout, vocabulary)
    from megadual.engine.megatron import MegatronEngine

    return MegatronEngine(run, layout, vocabulary)


def plan(run: PretrainConfig, layout: Topology, inputs: Inputs) -> str:
    """What the run is about to do, for people."""
    documents = sum(len(shard_set) for shard_set in inputs.sets)
    vocabulary, streams = inputs.vocabulary, inputs.vocabulary.streams
    about = (
        f"pretrain: {run.train.steps} steps of {run.train.global_batch_tokens:,} positions "
        f"({layout.rows_per_step} rows of {run.train.seq_len}, {layout.microbatches} micro-batches a rank) "
        f"on {documents:,} documents\n"
        f"layout: engine={run.engine} {layout.describe(run)} on {layout.world} processes, {run.train.precision}\n"
        f"model: {run.model.layers} layers of {run.model.hidden}, {vocabulary.text_size:,} text tokens; "
        + ", ".join(f"{stream.name}: {stream.depth} codes among {stream.codebook_size:,}" for stream in streams)
    )
    if inputs.validation:
        held_out, every = sum(map(len, inputs.validation)), run.data.validation_every or run.train.steps
        about += f"\nheld out: {run.data.validation_rows} rows of {held_out:,} documents, every {every} steps"
    stages = estimate(run, layout, vocabulary, inputs.traffic)
    speed = choose.about(run, layout, vocabulary, inputs.traffic)
    return about + "\n" + table(stages, run.parallel.gpu_memory_gib) + speed


def dataset(
    run: PretrainConfig, sets: list[ShardSet], special: SpecialIds, layout: Topology, data_rank: int
) -> PackedDataset:
    """The batches of one data-parallel rank."""
    train = run.train
    return PackedDataset(
        sets, run.data, train.seq_len, train.micro_batch_size, layout.rows_per_step, train.seed, special,
        data_rank, layout.data,
    )  # fmt: skip


def hooks(run: PretrainConfig, engine: Engine, inputs: Inputs, layout: Topology, log: MetricsLog | None) -> list[Hook]:
    """What this rank does beside its steps; `log` is rank 0's."""
    found: list[Hook] = [Sampling(run, log)] if log else []
    if log and run.run.profile:
        found.append(Profiler(Path(run.run.dir) / "profile", *run.run.profile))
    if run.data.validation:  # after the profiler, whose steps it is no part of
        found.append(validation(run, engine, inputs, layout))
    return found


def validation(run: PretrainConfig, engine: Engine, inputs: Inputs, layout: Topology) -> Validation:
    """What measures the losses on the held-out sets. On every rank."""
    train, config = run.train, dataclasses.replace(run.data, sets=run.data.validation, weights=None)
    rows = PackedDataset(
        inputs.validation, config, train.seq_len, train.micro_batch_size, run.data.validation_rows, SEED,
        inputs.special, engine.data_rank, layout.data,
    )  # fmt: skip
    return Validation(run, engine, rows, inputs.vocabulary)
