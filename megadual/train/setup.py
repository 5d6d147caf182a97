"""From a run's config to what it trains on and with, checked before any process group exists."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from megadual.data.cache import Cache
from megadual.data.dataset import PackedDataset
from megadual.data.source import Source
from megadual.engine import choose
from megadual.engine.estimate import estimate, table
from megadual.engine.protocol import Engine
from megadual.engine.stages import Traffic, costs, split_layers
from megadual.engine.topology import Topology
from megadual.errors import UserError
from megadual.model.dual_lm import Vocabulary
from megadual.run.hooks import Hook
from megadual.run.profiler import Profiler
from megadual.streams import TEXT, Marks, Stream
from megadual.text import fingerprint, load_text_tokenizer
from megadual.train.checkpoint import resolve_checkpoint, starting_weights
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog
from megadual.train.sampling import Sampling
from megadual.train.scoring import Scoring
from megadual.train.validation import SEED, Validation
from megadual.vision import read_codebooks


@dataclasses.dataclass
class Inputs:
    """What a run reads: the shard sets, and what its tokenizers give the model."""

    sets: list[Source]
    marks: Marks
    vocabulary: Vocabulary
    validation: list[Source] = dataclasses.field(default_factory=list)
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
    sets, held_out = open_sets(run, tokenizer, streams)
    for source in sets + held_out:
        source.documents.check(
            codebooks.fingerprint, run.model.dualtoken, fingerprint(tokenizer), run.model.text_tokenizer
        )
    vocabulary = Vocabulary(len(tokenizer), streams, {name: codebooks.vectors[name] for name in names})
    inputs = Inputs(sets, Marks.of(tokenizer), vocabulary, held_out)
    resolve_stages(run, inputs)
    return inputs


def check_detector(run: PretrainConfig) -> None:
    """UserError where checkpoints are to be scored with a detector that is not here."""
    detector = run.run.evaluate_detector
    if run.run.evaluate_every and not Path(detector or "").is_file():
        raise UserError(f"run.evaluate_detector={detector} is no file; make it with megadual.evaluate train-detector")


def open_sets(run: PretrainConfig, tokenizer, streams: list[Stream]) -> tuple[list[Source], list[Source]]:
    """The run's shard sets, of training and held out, with the codes of `streams`."""
    data = run.data
    cache = Cache(data.cache, data.cache_gb) if data.urls else None
    train, held_out = (
        [Source.open(each, tokenizer, streams, cache) for each in sets] for sets in (data.sets, data.validation)
    )
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
    parallel, train = run.parallel, run.train
    inputs.traffic = Traffic.of(PackedDataset(inputs.sets, inputs.marks, train.seq_len, 1, 1, train.seed))
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
    documents = sum(len(source.documents) for source in inputs.sets)
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
        held_out, every = (
            sum(len(source.documents) for source in inputs.validation),
            run.data.validation_every or run.train.steps,
        )
        about += f"\nheld out: {run.data.validation_rows} rows of {held_out:,} documents, every {every} steps"
    stages = estimate(run, layout, vocabulary, inputs.traffic)
    speed = choose.about(run, layout, vocabulary, inputs.traffic)
    return about + "\n" + table(stages, run.parallel.gpu_memory_gib) + speed


def dataset(run: PretrainConfig, sets: list[Source], marks: Marks, layout: Topology, data_rank: int) -> PackedDataset:
    """The batches of one data-parallel rank."""
    train = run.train
    return PackedDataset(
        sets, marks, train.seq_len, train.micro_batch_size, layout.rows_per_step, train.seed, data_rank, layout.data
    )


def hooks(run: PretrainConfig, engine: Engine, inputs: Inputs, layout: Topology, log: MetricsLog | None) -> list[Hook]:
    """What this rank does beside its steps; `log` is rank 0's."""
    found: list[Hook] = [Sampling(run, log), Scoring(run, log)] if log else []
    if log and run.run.profile:
        found.append(Profiler(Path(run.run.dir) / "profile", *run.run.profile))
    if run.data.validation:  # after the profiler, whose steps it is no part of
        found.append(validation(run, engine, inputs, layout))
    return found


def validation(run: PretrainConfig, engine: Engine, inputs: Inputs, layout: Topology) -> Validation:
    """What measures the losses on the held-out sets. On every rank."""
    train, rows_each_time = run.train, run.data.validation_rows
    rows = PackedDataset(
        inputs.validation, inputs.marks, train.seq_len, train.micro_batch_size, rows_each_time, SEED,
        engine.data_rank, layout.data,
    )  # fmt: skip
    return Validation(run, engine, rows, inputs.vocabulary)
