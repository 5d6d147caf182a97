"""Input shards, handed whole to workers of a Ray cluster."""

import ray

from data_pipeline.board import Board
from data_pipeline.config import PipelineConfig
from data_pipeline.encode import Encoder
from data_pipeline.plan import Plan
from megadual.cluster import WorkerPool, worker_count

SAMPLES_BEFORE_STOP = 1000  # no run is stopped early for its bad fraction before it has finished as many
FAILED_INPUTS_BEFORE_STOP = 10  # or before as many inputs have failed


def encode_all(config: PipelineConfig, plan: Plan, board: Board, can_grow: bool) -> dict[str, str]:
    """Encode the plan's shards on Ray workers; returns the URLs of those given up, with the last error of each.

    Ends early when too much of what is finished is unusable or too many inputs failed. `can_grow`: the cluster may get
    nodes.
    """
    worker = ray.remote(num_cpus=config.workers.cpus, num_gpus=config.workers.gpus)(Encoder)
    pool = WorkerPool(
        config.workers,
        new_worker=lambda: worker.remote(config, plan.identity),
        begin=lambda worker, shard: worker.encode_shard.options(num_returns="streaming").remote(shard),
        todo=plan.todo,
        board=board,
        can_grow=can_grow,
    )
    try:
        for _ in range(worker_count(config.workers, len(plan.todo), can_grow)):
            pool.start_worker()
        while pool.unfinished and not too_many_failures(config, plan, board, len(pool.given_up)):
            pool.take_answers()
    finally:
        pool.close()
    return pool.given_up


def too_many_failures(config: PipelineConfig, plan: Plan, board: Board, failed: int) -> bool:
    samples, quarantined = board.finished_counts()
    return (samples >= SAMPLES_BEFORE_STOP and quarantined > config.max_bad_fraction * samples) or (
        failed >= FAILED_INPUTS_BEFORE_STOP and failed > config.max_bad_fraction * len(plan.inputs)
    )
