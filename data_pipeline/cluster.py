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
from data_pipeline.readers import InputShard
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

    Ends early when too much of what is finished is unusable or too many inputs failed. `can_grow`: the cluster may get
    nodes.
    """
    pool = WorkerPool(config, plan, board)
    try:
        for _ in range(worker_count(config.workers, len(plan.todo), can_grow)):
            pool.start_worker()
        while pool.unfinished and not too_many_failures(config, plan, board, len(pool.given_up)):
            pool.take_answers()
    finally:
        pool.close()
    return pool.given_up


class WorkerPool:
    """Workers, the shards that they are on, and those to do.

    A worker gets a shard only when it is ready, so that no shard waits for a worker that cannot start.
    """

    def __init__(self, config: PipelineConfig, plan: Plan, board: Board):
        self.config, self.identity, self.board = config, plan.identity, board
        self.worker_class = ray.remote(num_cpus=config.workers.cpus, num_gpus=config.workers.gpus)(Encoder)
        self.todo, self.attempts = deque(plan.todo), Counter()
        self.given_up: dict[str, str] = {}  # URL -> its last error
        self.waiting = {}  # what a worker will answer -> (worker, its shard; None while it starts)
        self.failed_starts, self.last_answer = 0, time.monotonic()

    @property
    def encoding(self) -> bool:
        """Whether any worker has a shard."""
        return any(shard is not None for _, shard in self.waiting.values())

    @property
    def unfinished(self) -> bool:
        return bool(self.todo) or self.encoding

    def start_worker(self) -> None:
        worker = self.worker_class.remote(self.config, self.identity)
        self.waiting[worker.__ray_ready__.remote()] = (worker, None)

    def take_answers(self) -> None:
        """Wait a second at most for what workers answer, and see to it."""
        answers = ray.wait(list(self.waiting), num_returns=1, timeout=1)[0]
        self._tell_if_nobody_works(bool(answers))
        for answer in answers:
            worker, shard = self.waiting.pop(answer)
            try:
                if shard is None:
                    ray.get(answer)
                    self.failed_starts = 0
                    self.board.start()
                    self._give_shard(worker)
                else:
                    self.board.update(shard, ray.get(next(answer)))
                    self.waiting[answer] = (worker, shard)
            except StopIteration:
                self.board.finish(shard)
                self._give_shard(worker)
            except RayError as error:
                self._note_failed_start(error) if shard is None else self._note_failed_shard(shard, error)
                if isinstance(error, RayTaskError):  # the worker itself is well
                    self._give_shard(worker)
                else:
                    ray.kill(worker)  # it may only be out of reach, and hold the room for the next one
                    if self.todo:
                        self.start_worker()

    def close(self) -> None:
        for worker, _ in self.waiting.values():
            ray.kill(worker)

    def _give_shard(self, worker) -> None:
        if not self.todo:
            ray.kill(worker)
            return
        shard = self.todo.popleft()
        self.attempts[shard.url] += 1
        self.waiting[worker.encode_shard.options(num_returns="streaming").remote(shard)] = (worker, shard)

    def _note_failed_start(self, error: RayError) -> None:
        self.failed_starts += 1
        if self.failed_starts == self.config.workers.attempts:
            raise UserError(f"workers do not start: {str(error).splitlines()[-1]}") from error

    def _note_failed_shard(self, shard: InputShard, error: RayError) -> None:
        attempts = self.attempts[shard.url]
        self.board.restart(shard)
        self.board.message(f"{shard.url}: attempt {attempts} failed: {reason(error)}")
        if attempts < self.config.workers.attempts:
            self.todo.append(shard)
        else:
            self.given_up[shard.url] = reason(error)
            self.board.failed += 1

    def _tell_if_nobody_works(self, answered: bool) -> None:
        if answered or self.encoding:
            self.last_answer = time.monotonic()
        elif time.monotonic() - self.last_answer > SECONDS_BEFORE_WORD:
            self.last_answer = time.monotonic()
            self.board.message(f"waiting for a worker: {resources(self.config.workers)}")


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
