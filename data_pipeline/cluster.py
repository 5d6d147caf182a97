"""Ray: joining or starting a cluster, and handing whole input shards to its workers."""

import os
import time
from collections import Counter, deque
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from data_pipeline.board import Board
from data_pipeline.config import PipelineConfig, WorkersConfig
from data_pipeline.encode import Encoder
from data_pipeline.plan import Plan
from megadual.errors import UserError

SAMPLES_BEFORE_STOP = 1000  # no run is stopped early for its bad fraction before it has finished as many
FAILED_INPUTS_BEFORE_STOP = 10  # or before as many inputs have failed
SECONDS_BEFORE_WORD = 60  # without any worker


def connect(workers: WorkersConfig) -> bool:
    """Join the cluster that the config, RAY_ADDRESS or this machine names, else start one; True where it started."""
    if ray.is_initialized():
        return False
    address = workers.address or os.environ.get("RAY_ADDRESS")
    if address != "local":
        try:
            ray.init(address=address or "auto", logging_level="ERROR")
            return False
        except ConnectionError as error:
            if address is not None:
                raise UserError(f"workers.address: no Ray cluster answers at '{address}'") from error
    # The workers must find this checkout from wherever the command was started.
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count(), round(workers.count * workers.cpus)),
        object_store_memory=workers.object_store_mb * 1_000_000,
        include_dashboard=False,
        logging_level="ERROR",
    )
    return True


def resources(workers: WorkersConfig) -> str:
    """What a worker needs beside what there is, in words."""
    room = ray.cluster_resources()
    return (
        f"one needs {workers.cpus} CPUs and {workers.gpus} GPUs on one node, the cluster has "
        f"{room.get('CPU', 0)} CPUs and {room.get('GPU', 0)} GPUs"
    )


def worker_count(workers: WorkersConfig, shards: int, can_grow: bool) -> int:
    """Workers to start: as many as asked for, else as there is room for, but no more than shards.

    UserError where there is room for none; where they were asked for and the cluster can grow, they may wait for it.
    """
    needs = {"CPU": workers.cpus, "GPU": workers.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(
        min((int(node.get(name, 0) / share) for name, share in needs.items() if share), default=1) for node in nodes
    )
    if fitting == 0 and not (workers.count and can_grow):
        raise UserError(f"workers: {resources(workers)}")
    return min(workers.count or fitting, shards)


def encode_all(config: PipelineConfig, plan: Plan, board: Board, can_grow: bool) -> dict[str, str]:
    """Encode the plan's shards on Ray workers; returns the URLs of those given up, with the last error of each.

    Ends early when too much of what is finished is unusable or too many inputs failed. A worker gets a shard only
    when it is ready, so that no shard waits for a worker that cannot start. `can_grow`: the cluster may get nodes.
    """
    worker_class = ray.remote(num_cpus=config.workers.cpus, num_gpus=config.workers.gpus)(Encoder)
    todo, attempts, given_up = deque(plan.todo), Counter(), {}
    waiting = {}  # what a worker will answer -> (worker, its shard; None while it starts)
    failed_starts, last_answer = 0, time.monotonic()

    def start_worker() -> None:
        worker = worker_class.remote(config, plan.identity)
        waiting[worker.__ray_ready__.remote()] = (worker, None)

    def unfinished() -> bool:
        return bool(todo) or any(shard is not None for _, shard in waiting.values())

    def give_work(worker) -> None:
        if todo:
            shard = todo.popleft()
            attempts[shard.url] += 1
            waiting[worker.encode_shard.options(num_returns="streaming").remote(shard)] = (worker, shard)
        else:
            ray.kill(worker)

    try:
        for _ in range(worker_count(config.workers, len(todo), can_grow)):
            start_worker()
        while unfinished() and not too_many_failures(config, plan, board, len(given_up)):
            answers = ray.wait(list(waiting), num_returns=1, timeout=1)[0]
            if answers or any(shard is not None for _, shard in waiting.values()):
                last_answer = time.monotonic()
            elif time.monotonic() - last_answer > SECONDS_BEFORE_WORD:
                last_answer = time.monotonic()
                board.say(f"waiting for a worker: {resources(config.workers)}")
            for answer in answers:
                worker, shard = waiting.pop(answer)
                try:
                    if shard is None:
                        ray.get(answer)
                        failed_starts = 0
                        board.start()
                        give_work(worker)
                    else:
                        board.update(shard, ray.get(next(answer)))
                        waiting[answer] = (worker, shard)
                except StopIteration:
                    board.finish(shard)
                    give_work(worker)
                except RayError as error:
                    if shard is None:
                        failed_starts += 1
                        if failed_starts == config.workers.attempts:
                            raise UserError(f"workers do not start: {str(error).splitlines()[-1]}") from error
                    else:
                        board.restart(shard)
                        board.say(f"{shard.url}: attempt {attempts[shard.url]} failed: {reason(error)}")
                        if attempts[shard.url] < config.workers.attempts:
                            todo.append(shard)
                        else:
                            given_up[shard.url] = reason(error)
                            board.failed += 1
                    if isinstance(error, RayTaskError):  # the worker itself is well
                        give_work(worker)
                    else:
                        ray.kill(worker)  # it may only be out of reach, and hold the room for the next one
                        if todo:
                            start_worker()
    finally:
        for worker, _ in waiting.values():
            ray.kill(worker)
    return given_up


def too_many_failures(config: PipelineConfig, plan: Plan, board: Board, failed: int) -> bool:
    samples, quarantined = board.finished_counts()
    return (samples >= SAMPLES_BEFORE_STOP and quarantined > config.max_bad_fraction * samples) or (
        failed >= FAILED_INPUTS_BEFORE_STOP and failed > config.max_bad_fraction * len(plan.inputs)
    )


def reason(error: RayError) -> str:
    """What went wrong, out of Ray's long account of it."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return "the worker died" if isinstance(error, RayActorError) else str(error).splitlines()[0]
