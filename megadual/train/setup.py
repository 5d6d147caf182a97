"""From a run's config to what it trains on and with, checked before any process group exists."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megadual.config import load_config
from megadual.data.cache import Cache
from megadual.data.dataset import PackedDataset
from megadual.data.source import Source
from megadual.engine import choose
from megadual.engine.estimate import drawn_at_once, estimate, table
from megadual.engine.predict import flops_of
from megadual.engine.protocol import Engine
from megadual.engine.stages import Traffic, costs, split_layers
from megadual.engine.topology import Topology, topology
from megadual.errors import UserError
from megadual.model.dual_lm import Vocabulary
from megadual.run import record, session
from megadual.run.gloo import keep_gloo_behind
from megadual.run.hooks import Hook
from megadual.run.profiler import Profiler
from megadual.run.ranks import Ranks
from megadual.streams import TEXT, Marks, Stream
from megadual.text import fingerprint, load_text_tokenizer
from megadual.train.checkpoint import resolve_checkpoint, starting_weights
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog
from megadual.train.sampling import Sampling
from megadual.train.scoring import Scoring
from megadual.train.validation import SEED, Validation
from megadual.vision import read_codebooks

REPEATED = 4  # epochs up to which text that is read again teaches about as much as new text


@dataclasses.dataclass
class Inputs:
    """What a run reads: the shard sets, and what its tokenizers give the model."""

    sets: list[Source]
    marks: Marks | None  # None in a plan without data
    vocabulary: Vocabulary
    validation: list[Source] = dataclasses.field(default_factory=list)
    traffic: Traffic | None = None  # set by `resolve_stages`
    epochs: list[float] = dataclasses.field(default_factory=list)  # of each set, in the whole run; set by the same
    assumed: list[str] = dataclasses.field(default_factory=list)  # what a plan has in place of inputs (train/assume.py)
    chosen: str = ""  # how the layout was picked, for people; set by `settle`


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
    """Measure what the data asks of the model; by that set `run.parallel.stage_layers`, where it is null.

    Not where the layout is still to be picked (`settle`).
    """
    train = run.train
    data = PackedDataset(inputs.sets, inputs.marks, train.seq_len, 1, 1, train.seed)
    inputs.traffic = Traffic.of(data)
    filled = train.steps * train.global_batch_tokens * inputs.traffic.fill
    shares = np.diff(data.rows.bounds, prepend=0, append=1)
    positions = [int(rows.full[rows.kept].sum()) for rows in data.rows.sets]
    inputs.epochs = [filled * share / each for share, each in zip(shares.tolist(), positions, strict=True)]
    if run.parallel.layout == "given":
        cut_stages(run, inputs)


def cut_stages(run: PretrainConfig, inputs: Inputs) -> None:
    """Set `run.parallel.stage_layers` by cost, where it is null."""
    parallel = run.parallel
    if parallel.stage_layers is None:
        cost = costs(run, inputs.vocabulary, inputs.traffic)
        parallel.stage_layers = split_layers(run.model.layers, parallel.pipeline * parallel.virtual_pipeline, cost)


def check_cache(run: PretrainConfig, layout: Topology, inputs: Inputs) -> None:
    """UserError where the bound of the cache is below what the processes of a node read at a time.

    What is mapped stays on the disk until its micro-batch is read, evicted or not: the bound could not be kept.
    """
    files = _files_in_stores(inputs)
    if run.data.cache_gb is None or not files:
        return
    (_, rates), _ = choose.rates_here()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", min(layout.world, rates.gpus)))
    rows, needed = -(-here * layout.data // layout.world) * run.train.micro_batch_size, max(files)
    for sets, seed in (inputs.sets, run.train.seed), (inputs.validation, SEED):
        if sets:
            data = PackedDataset(sets, inputs.marks, run.train.seq_len, 1, 1, seed)
            needed = max(needed, data.bytes_to_fetch(rows))
    if needed > run.data.cache_gb * 1e9:
        raise UserError(
            f"data.cache_gb={run.data.cache_gb:g} is less than what a node of {here} processes reads at a time, {rows} "
            f"rows out of {_gb(needed)} GB of files: give at least that, better the {_gb(sum(files))} GB of all sets "
            "at URLs, or make the sets again with smaller files (encode.shard_bytes)"
        )


def _files_in_stores(inputs: Inputs) -> list[int]:
    """Bytes of each shard of the sets at URLs."""
    sets = [source.documents for source in inputs.sets + inputs.validation]
    return [shard.file.bytes for documents in sets if not documents.here for shard in documents.shards]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"


def settle(run: PretrainConfig, world: int, inputs: Inputs, here: bool = True) -> Topology:
    """The layout of a run whose inputs are read; with parallel.layout=auto the one that is picked, put into `run`.

    The same on every rank, as all have the same inputs. `here`: it is to start on this machine's kind of hosts, and
    not only to be planned. UserError where none can work.
    """
    if run.parallel.layout == "given":
        cut_stages(run, inputs)
        layout = topology(run, world)
    else:
        layout = _pick(run, world, inputs, here)
    run.train.drawn_at_once = drawn_at_once(run, inputs.traffic)
    return layout


def _pick(run: PretrainConfig, world: int, inputs: Inputs, here: bool) -> Topology:
    """The layout that the plan predicts to be fastest, put into `run`."""
    (name, rates), by = choose.rates_here()
    if here and "LOCAL_WORLD_SIZE" in os.environ:
        rates = dataclasses.replace(rates, gpus=int(os.environ["LOCAL_WORLD_SIZE"]))
    before = _last_layout(run)
    found = choose.search(run, world, inputs.vocabulary, inputs.traffic, (name, rates))
    best = found.best()
    run.parallel, run.train = best.run.parallel, best.run.train
    inputs.chosen = f"parallel.layout=auto picks {best.name} for {world} processes{by}:\n{found.table()}"
    if before and before != (world, best.name):
        inputs.chosen += f"\npicked anew: the last start had {before[1]} on {before[0]} processes"
    return best.layout


def _last_layout(run: PretrainConfig) -> tuple[int, str] | None:
    """The processes and the layout of this run's last start; None where there was none that can be read."""
    folder = Path(run.run.dir)
    with contextlib.suppress(ValueError, LookupError, OSError):
        world, last = record.read_starts(folder)[-1]["world"], load_config(PretrainConfig, folder / session.CONFIG)
        return world, choose.describe(last, topology(last, world))
    return None


def check_agreed(run: PretrainConfig, ranks: Ranks) -> None:
    """UserError where ranks have picked different layouts, as they may on GPUs of different types."""
    if run.parallel.layout == "given":
        return
    picked = ranks.gather((dataclasses.asdict(run.parallel), run.train.recompute))
    if other := next((rank for rank, each in enumerate(picked) if each != picked[0]), None):
        raise UserError(
            f"parallel.layout=auto picks another layout on rank {other} than on rank 0: are their GPUs of different "
            "types? give one instead"
        )


def engine(run: PretrainConfig, layout: Topology, vocabulary: Vocabulary) -> Engine:
    """The run's engine, over the initialised default process group, with the weights that it starts from."""
    start = starting_weights(run)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, start=start and str(start)))
    if run.engine == "deepspeed":
        from megadual.engine.deepspeed import DeepSpeedEngine as Made
    else:
        from megadual.engine.megatron import MegatronEngine as Made
    made: Engine = Made(run, layout, vocabulary)
    keep_gloo_behind()  # now that there are all groups
    return made


def plan(run: PretrainConfig, layout: Topology, inputs: Inputs) -> str:
    """What the run is about to do, for people."""
    vocabulary, streams, train = inputs.vocabulary, inputs.vocabulary.streams, run.train
    documents = f"{sum(len(source.documents) for source in inputs.sets):,} documents" if inputs.sets else "assumed data"
    flops = train.steps * flops_of(run, vocabulary, inputs.traffic)
    about = [
        *(f"assumed: {each}" for each in inputs.assumed),
        f"pretrain: {train.steps} steps of {train.global_batch_tokens:,} positions "
        f"({layout.rows_per_step} rows of {train.seq_len}, {layout.microbatches} micro-batches a rank) on {documents}",
        f"in all: {train.steps * train.global_batch_tokens:,} positions, {flops:.2e} model FLOPs" + _epochs(inputs),
        *_repeated(inputs),
        *_fetched_again(run, inputs),
        f"layout: engine={run.engine} {layout.describe(run)} on {layout.world} processes, {train.precision}, "
        + train.optimizer,
        f"model: {run.model.layers} layers of {run.model.hidden}, {vocabulary.text_size:,} text tokens; "
        + ", ".join(f"{stream.name}: {stream.depth} codes among {stream.codebook_size:,}" for stream in streams),
    ]
    if inputs.validation:
        held_out = sum(len(source.documents) for source in inputs.validation)
        every = run.data.validation_every or train.steps
        about.append(f"held out: {run.data.validation_rows} rows of {held_out:,} documents, every {every} steps")
    if inputs.chosen:
        about.append(inputs.chosen)
    stages = estimate(run, layout, vocabulary, inputs.traffic)
    speed = choose.about(run, layout, vocabulary, inputs.traffic)
    return "\n".join(about) + "\n" + table(stages, run.parallel.gpu_memory_gib) + speed


def _epochs(inputs: Inputs) -> str:
    read = [f"{epochs:.3g}" for epochs in inputs.epochs]
    if len(read) > 1:
        read = [f"'{source.config.path}' {epochs}" for source, epochs in zip(inputs.sets, read, strict=True)]
    return f"; epochs: {', '.join(read)}" if read else ""


def _repeated(inputs: Inputs) -> list[str]:
    return [
        f"remark: the {len(source.documents):,} documents of '{source.config.path}' are read {epochs:,.0f} times; what "
        f"is read more than about {REPEATED} times teaches ever less"
        for source, epochs in zip(inputs.sets, inputs.epochs, strict=False)
        if epochs > REPEATED
    ]


def _fetched_again(run: PretrainConfig, inputs: Inputs) -> list[str]:
    """Documents are shuffled over whole sets, so that what was evicted is soon needed again."""
    bound, size = run.data.cache_gb, sum(_files_in_stores(inputs))
    if bound is None or size <= bound * 1e9:
        return []
    return [
        f"warning: data.cache_gb={bound:g} is less than the {_gb(size)} GB of the sets at URLs: their files come again "
        "and again, and steps wait for them; give it room for all, if the disk has it"
    ]


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
