"""What a run will do: the input shards still to be done, and what they will take on the disk."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipeline.config import PipelineConfig
from data_pipeline.manifest import check_identity, identify, read_markers
from data_pipeline.readers import InputShard, list_inputs, read_samples
from megadual.config import to_yaml
from megadual.errors import UserError

SAMPLES_READ_TO_ESTIMATE = 200
TEXT_BYTES = 200  # of a row, roughly: caption ids, key, meta and offsets


@dataclass
class Plan:
    """The inputs, those not yet in the set, and what the set's shards have in common."""

    inputs: list[InputShard]
    todo: list[InputShard]
    identity: dict
    description: dict


def make_plan(config: PipelineConfig) -> Plan:
    """Check everything that can be checked before work starts; UserError where it cannot go on."""
    if "://" in config.output:
        raise UserError(f"output: '{config.output}' is a URL; give a local or shared folder and copy the set from it")
    if not 0 <= config.max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction: {config.max_bad_fraction} is not a fraction between 0 and 1")
    for name, least, value in (
        ("encode.batch_size", 1, config.encode.batch_size),
        ("encode.torch_threads", 1, config.encode.torch_threads),
        ("workers.decode_threads", 1, config.workers.decode_threads),
        ("workers.attempts", 1, config.workers.attempts),
        ("workers.count", 0, config.workers.count),
    ):
        if value < least:
            raise UserError(f"{name}: {value} must be at least {least}")
    inputs = list_inputs(config.inputs)
    identity, description = identify(config)
    output = Path(config.output)
    markers = read_markers(output)
    check_identity(output, markers, identity)
    for shard in inputs:
        if shard.name in markers and markers[shard.name]["source"] != shard.url:
            raise UserError(
                f"'{output / shard.name}' was made from '{markers[shard.name]['source']}', this run would make it from "
                f"'{shard.url}'; write the input as before, or give another output"
            )
    return Plan(inputs, [shard for shard in inputs if shard.name not in markers], identity, description)


def describe(config: PipelineConfig, plan: Plan) -> str:
    """The resolved config, the input shards and an estimate of the output, as `--dry-run` prints them."""
    todo = {shard.name for shard in plan.todo}
    lines = [to_yaml(config), f"{len(plan.inputs)} input shards, {len(todo)} to do:"]
    lines += [
        f"  {shard.url}  {shard.size / 1e6:.1f} MB  {'to do' if shard.name in todo else 'done'}"
        for shard in plan.inputs
    ]
    probe = max(plan.inputs, key=lambda shard: shard.size)
    positions = list(islice((position for _, position in read_samples(probe)), SAMPLES_READ_TO_ESTIMATE))
    samples = round(sum(shard.size for shard in plan.todo) * len(positions) / positions[-1]) if positions else 0
    rows, columns = plan.description["dualtoken"]["grid"]
    codes = 2 * rows * columns * plan.description["dualtoken"]["depth"] * 2
    lines.append(
        f"about {samples} samples -> {samples * (codes + TEXT_BYTES) / 1e6:.1f} MB in {config.output} "
        f"({codes} bytes of codes per image)"
    )
    return "\n".join(lines)
