"""The command: plan, encode every input shard that is not in the set yet, describe the set."""

import shutil
from pathlib import Path

import ray

from data_pipeline.board import Board
from data_pipeline.cluster import connect, encode_all
from data_pipeline.config import PipelineConfig
from data_pipeline.manifest import read_markers, write_manifest, write_quarantine
from data_pipeline.plan import Plan, describe, make_plan
from data_pipeline.writer import TEMPORARY
from megadual.config import parse_command_line
from megadual.errors import UserError, command


def encode_todo(config: PipelineConfig, plan: Plan) -> tuple[dict[str, str], str]:
    """Encode what is to do on Ray; returns the shards given up and how fast it went."""
    if not plan.todo:
        return {}, "nothing to do"
    started_ray = connect(config.workers)
    board = Board(plan.todo)
    try:
        given_up = encode_all(config, plan, board)
    finally:
        board.close()
        if started_ray:
            ray.shutdown()
    return given_up, f"{len(board.finished)} done now, {board.samples / board.seconds:.0f} images/s"


def tokenize(config: PipelineConfig) -> dict:
    """Bring every input shard into the set at `config.output` and describe it; returns the manifest.

    Unusable samples go to `quarantine.jsonl`. UserError where they are too many or where a shard could not be
    done: the set then has no manifest for it, what is committed stays, and running again goes on from there.
    """
    plan = make_plan(config)
    output = Path(config.output)
    (output / TEMPORARY).mkdir(parents=True, exist_ok=True)
    given_up, speed = encode_todo(config, plan)

    markers = read_markers(output)
    write_quarantine(output, markers)
    samples, quarantined = (sum(marker[name] for marker in markers.values()) for name in ("samples", "quarantined"))
    if quarantined > config.max_bad_fraction * samples:
        raise UserError(
            f"{quarantined} of {samples} samples are unusable, more than max_bad_fraction={config.max_bad_fraction}; "
            f"see {output / 'quarantine.jsonl'}, then mend the inputs or raise max_bad_fraction"
        )
    if given_up:
        failed = "".join(f"\n  {url}: {error}" for url, error in given_up.items())
        raise UserError(
            f"{len(given_up)} input shards failed {config.workers.attempts} times; "
            f"run again when they can be read:{failed}"
        )
    manifest = write_manifest(output, markers, plan.description)
    shutil.rmtree(output / TEMPORARY, ignore_errors=True)
    left_out = sum(manifest["left_out"].values())
    print(
        f"{samples} images in: {manifest['images']} written, {quarantined} quarantined, "
        f"{left_out} left out by filters; {len(markers)} shards in {output}, {speed}"
    )
    return manifest


@command
def main(argv: list[str] | None = None) -> None:
    config, args = parse_command_line(PipelineConfig, "Turn image-text corpora into dual-codebook shards.", argv)
    if args.dry_run:
        print(describe(config, make_plan(config)))
    else:
        tokenize(config)
