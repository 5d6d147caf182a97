"""What a run will do: the input shards still to be done, and what they will take on the disk and in time."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import torch

from data_pipeline.config import PipelineConfig
from data_pipeline.decode import Decoded
from data_pipeline.documents import LeftOut, Unusable
from data_pipeline.encode import Encoder
from data_pipeline.formats import to_document
from data_pipeline.image_root import check_image_root, open_image_root
from data_pipeline.manifest import check_identity, identify
from data_pipeline.readers import InputShard, list_inputs, read_samples
from data_pipeline.source import change
from data_pipeline.store import Store, open_store
from megadual.config import to_yaml
from megadual.errors import UserError
from megadual.images import unknown_formats

SAMPLES_READ_TO_ESTIMATE = 200
BATCHES_TO_ESTIMATE, BATCH_TO_ESTIMATE = 4, 8
SAMPLES_TO_RECOGNISE, THREADS_TO_RECOGNISE = 8, 16


@dataclass
class Plan:
    """The inputs, those not yet in the set, and what the set's shards have in common."""

    store: Store
    inputs: list[InputShard]
    todo: list[InputShard]
    changed: dict[str, str]  # by name: what is another than when the set's folder was made
    identity: dict
    description: dict


def make_plan(config: PipelineConfig) -> Plan:
    """Check everything that can be checked before work starts; UserError where it cannot go on."""
    if not 0 <= config.max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction: {config.max_bad_fraction} is not a fraction between 0 and 1")
    for name, least, value in (
        ("encode.batch_size", 1, config.encode.batch_size),
        ("encode.torch_threads", 1, config.encode.torch_threads),
        ("filters.min_text", 1, config.filters.min_text),
        ("workers.decode_threads", 1, config.workers.decode_threads),
        ("workers.attempts", 1, config.workers.attempts),
        ("workers.count", 0, config.workers.count),
    ):
        if value < least:
            raise UserError(f"{name}: {value} must be at least {least}")
    if unknown := unknown_formats(config.read.image_formats):
        raise UserError(f"read.image_formats: this PIL reads no {', '.join(unknown)}")
    check_image_root(config.read.image_root)
    inputs = list_inputs(config.inputs)
    identity, description = identify(config)
    store = open_store(config.output)
    markers = store.markers()
    check_identity(config.output, markers, identity)
    for shard in inputs:
        if shard.name in markers and markers[shard.name]["source"] != shard.url:
            raise UserError(
                f"'{store.url}/{shard.name}' was made from '{markers[shard.name]['source']}', this run would make it "
                f"from '{shard.url}'; write the input as before, or give another output"
            )
    known = [shard for shard in inputs if shard.name in markers]
    changes = {shard.name: change(markers[shard.name], shard, config.read.image_root) for shard in known}
    changed = {name: what for name, what in changes.items() if what}
    again = changed if config.changed == "redo" else {}
    todo = [shard for shard in inputs if shard.name not in markers or shard.name in again]
    return Plan(store, inputs, todo, changed, identity, description)


def refuse_changed(config: PipelineConfig, plan: Plan) -> None:
    """UserError where inputs have changed and nobody has said what is to become of what was made of them."""
    if plan.changed and config.changed == "refuse":
        raise UserError(f"{tell_changed(plan)}; changed=redo reads such again, changed=keep leaves the set as it is")


def tell_changed(plan: Plan) -> str:
    """How many inputs have changed since they were read, and the first of them."""
    name, what = next(iter(plan.changed.items()))
    url = next(shard.url for shard in plan.inputs if shard.name == name)
    number = "1 input has" if len(plan.changed) == 1 else f"{len(plan.changed)} inputs have"
    return f"{number} changed since they were read ({'' if len(plan.changed) == 1 else 'the first: '}'{url}': {what})"


def describe(config: PipelineConfig, plan: Plan) -> str:
    """The resolved config, the input shards and estimates, as `--dry-run` prints them."""
    todo = [shard.name for shard in plan.todo]
    lines = [to_yaml(config), f"{len(plan.inputs)} input shards, {len(todo)} to do:"]
    if plan.changed:
        lines.insert(1, f"{tell_changed(plan)}: changed={config.changed}")
    if todo:
        open_image_root(config.read, todo[0])  # once, and not in every thread
    with ThreadPoolExecutor(THREADS_TO_RECOGNISE) as pool:  # inputs may be far away
        formats = dict(zip(todo, pool.map(lambda shard: _formats(config, shard), plan.todo), strict=True))
    lines += [
        f"  {shard.url}  {shard.size / 1e6:.1f} MB  "
        + (f"to do: {formats[shard.name]}" if shard.name in todo else "done")
        + (f" (changed: {plan.changed[shard.name]})" if shard.name in plan.changed else "")
        for shard in plan.inputs
    ]
    if todo:
        try:
            lines.append(_estimate(config, plan))
        except OSError as error:
            lines.append(f"no estimate: {type(error).__name__}: {error}")
    return "\n".join(lines)


def _formats(config: PipelineConfig, shard: InputShard) -> str:
    """What the first samples are recognised as, or why they are unusable."""
    found: Counter = Counter()
    try:
        images = open_image_root(config.read, shard.name)
        for sample, _ in islice(read_samples(shard, config.read.max_bytes), SAMPLES_TO_RECOGNISE):
            try:
                found[to_document(sample, config.read, images).meta["format"]] += 1
            except Unusable as reason:
                found[f"unusable: {reason}"] += 1
            except LeftOut as reason:
                found[f"left out: {reason}"] += 1
    except OSError as error:
        return f"cannot be read now: {type(error).__name__}: {error}"
    return ", ".join(f"{count} {what}" if len(found) > 1 else what for what, count in found.most_common()) or "empty"


def _estimate(config: PipelineConfig, plan: Plan) -> str:
    """From the largest input: samples per byte of the first ones, size and time of the few that are encoded."""
    probe = max(plan.todo, key=lambda shard: shard.size)
    samples = islice(read_samples(probe, config.read.max_bytes), SAMPLES_READ_TO_ESTIMATE)
    positions = [position for _, position in samples]
    if not positions or not positions[-1]:
        return f"no estimate: '{probe.url}' is empty"
    samples = round(sum(shard.size for shard in plan.todo) * len(positions) / positions[-1])
    row_bytes, seconds = _try_encoding(config, plan, probe)
    said = (
        f"about {samples} samples -> {samples * row_bytes / 1e6:.1f} MB in {config.output} ({row_bytes:.0f} bytes each)"
    )
    rate = config.workers.samples_per_second or (1 / seconds if seconds else None)
    if rate is None:
        return f"{said}; give workers.samples_per_second for an estimate of the time"
    workers = max(config.workers.count, 1)
    source = "as given" if config.workers.samples_per_second else "measured here"
    return (
        f"{said}; about {_duration(samples / rate / workers)} of encoding with workers.count={workers}, "
        f"{rate:.1f} samples/s each ({source})"
    )


def _try_encoding(config: PipelineConfig, plan: Plan, probe: InputShard) -> tuple[float, float | None]:
    """(bytes of a row, seconds for a sample) of the first samples; no seconds where this machine lacks the GPU."""
    has_device = not config.workers.gpus or torch.cuda.is_available()
    workers = config.workers if has_device else replace(config.workers, gpus=0)
    encode = replace(config.encode, batch_size=BATCH_TO_ESTIMATE)
    encoder = Encoder(replace(config, encode=encode, workers=workers), plan.identity)
    done, documents, started = [], [], [time.perf_counter()]
    for batch, _ in islice(encoder.batches(probe), BATCHES_TO_ESTIMATE):
        encoding = encoder.encode([outcome for _, outcome in batch if isinstance(outcome, Decoded)])
        documents += encoder.documents(encoding, probe)
        done.append(len(batch))
        started.append(time.perf_counter())
    warm = 1 if len(done) > 1 else 0  # the first batch warms up
    seconds = (started[-1] - started[warm]) / sum(done[warm:])
    arrays = [array for d in documents for array in (d.text_ids, d.turns, d.grids, d.image_use, *d.codes.values())]
    row_bytes = sum(array.nbytes for array in arrays)
    row_bytes += sum(len(document.key) + len(str(document.meta)) + 60 for document in documents)  # sizes and offsets
    return row_bytes / sum(done), seconds if has_device else None


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
