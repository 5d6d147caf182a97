"""The command: plan, encode every input shard that is not in the set yet, describe the set."""

import ray

from data_pipeline.board import Board
from data_pipeline.cluster import encode_all
from data_pipeline.config import PipelineConfig
from data_pipeline.manifest import commonest_reason, write_manifest, write_quarantine
from data_pipeline.plan import Plan, describe, make_plan, refuse_changed
from data_pipeline.source import change
from megadual.cluster import connect
from megadual.config import parse_command_line
from megadual.errors import UserError, command


def encode_todo(config: PipelineConfig, plan: Plan) -> tuple[dict[str, str], str]:
    """Encode what is to do on Ray; returns the inputs given up and how fast it went."""
    if not plan.todo:
        return {}, "nothing to do"
    started_ray = connect(config.workers)
    board = Board(plan.todo)
    try:
        failed = encode_all(config, plan, board, can_grow=not started_ray)
    finally:
        board.close()
        if started_ray:
            ray.shutdown()
    return failed, (
        f"{len(board.finished)} done now in {board.seconds:.1f} s, {board.images / board.seconds:.0f} images/s, "
        f"peak memory of a worker {board.memory / 1e6:.0f} MB"
    )


def tokenize(config: PipelineConfig) -> dict:
    """Bring every input shard into the set at `config.output` and describe it; returns the manifest.

    Unusable samples and inputs go to `quarantine.jsonl`. UserError where they are too many: the set then has no new
    manifest, what is committed stays, and running again goes on from there.
    """
    plan = make_plan(config)
    refuse_changed(config, plan)
    with plan.store.run():
        return _tokenize(config, plan)


def _tokenize(config: PipelineConfig, plan: Plan) -> dict:
    store = plan.store
    if plan.changed and config.changed == "redo":  # readers find no set until it is described anew
        for name in ("manifest.json", "index.json"):
            store.remove(name)
    failed, speed = encode_todo(config, plan)

    markers = store.markers()
    failed = dict(sorted(failed.items()))
    write_quarantine(store, markers, failed)
    samples, quarantined = (sum(marker[name] for marker in markers.values()) for name in ("samples", "quarantined"))
    if quarantined > config.max_bad_fraction * samples:
        worst, marker = max(markers.items(), key=lambda entry: entry[1]["quarantined"])
        most = f"{store.url}/{worst}: {marker['quarantined']} of {marker['samples']}"
        raise UserError(
            f"{quarantined} of {samples} samples are unusable: {commonest_reason(store, markers)}. That is more than "
            f"max_bad_fraction={config.max_bad_fraction}; see {store.url}/quarantine.jsonl, then mend the inputs or "
            "raise max_bad_fraction. With changed=redo inputs are read again that were mended or get another "
            f"read.image_root; to have any other read again remove its folder (most are in {most})"
        )
    if len(failed) > config.max_bad_fraction * len(plan.inputs):
        reasons = "".join(f"\n  {url}: {error}" for url, error in failed.items())
        raise UserError(
            f"{len(failed)} of {len(plan.inputs)} input shards failed {config.workers.attempts} times, more than "
            f"max_bad_fraction={config.max_bad_fraction}; run again when they can be read:{reasons}"
        )
    missing = [
        shard.name
        for shard in plan.todo
        if shard.url not in failed
        and (shard.name not in markers or change(markers[shard.name], shard, config.read.image_root))
    ]
    if missing:
        reason = f" ({commonest_reason(store, markers)})" if quarantined else ""
        raise UserError(
            f"stopped early, since more than max_bad_fraction={config.max_bad_fraction} of what this run finished is "
            f"unusable{reason}: {len(missing)} of {len(plan.inputs)} input shards are not done; see {store.url}/"
            "quarantine.jsonl, then mend the inputs (with changed=redo those are read again) or raise "
            "max_bad_fraction, and run again"
        )
    manifest = write_manifest(store, markers, failed, plan.description)
    store.clean()
    left_out = sum(manifest["left_out"].values())
    print(
        f"{samples} samples in: {manifest['documents']} documents with {manifest['images']} images written, "
        f"{quarantined} quarantined, {left_out} left out by filters; {len(markers)} shards in {store.url}, {speed}"
    )
    if failed:
        print(f"{len(failed)} input shards failed and are named in quarantine.jsonl; another run tries them again")
    return manifest


@command
def main(argv: list[str] | None = None) -> None:
    config, args = parse_command_line(PipelineConfig, "Turn image-text corpora into dual-codebook shards.", argv)
    if args.dry_run:
        print(describe(config, make_plan(config)))
    else:
        tokenize(config)
