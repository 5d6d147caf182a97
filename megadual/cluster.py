"""Ray: joining or starting a cluster, and handing pieces of work to its workers."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from megadual.errors import UserError, first_line

SECONDS_BEFORE_WORD = 60  # without any worker


class Workers(Protocol):
    """How work is spread, as a command's config says it."""

    address: str | None  # of a Ray cluster; `local` starts one; None takes a running one, else starts one
    count: int  # 0: as many as there is room for
    cpus: float  # of one worker
    gpus: float
    attempts: int  # at each piece of work
    object_store_mb: int  # of a Ray started here


class Board(Protocol):
    """Shows how far the work is."""

    failed: int

    def start(self) -> None: ...
    def update(self, task, progress) -> None: ...
    def restart(self, task) -> None: ...
    def finish(self, task) -> None: ...
    def message(self, message: str) -> None: ...


def connect(workers: Workers) -> bool:
    """Join the cluster that the config, RAY_ADDRESS or this machine names, else start one; True where it started."""
    if ray.is_initialized():
        return False
    address = workers.address or os.environ.get("RAY_ADDRESS")
    if address != "local":
        try:
            ray.init(address=address or "auto", logging_level=logging.ERROR)
            return False
        except ConnectionError as error:
            if address is not None:
                raise UserError(f"workers.address: no Ray cluster answers at '{address}'") from error
    # The workers must find this checkout from wherever the command was started.
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, round(workers.count * workers.cpus)),
        object_store_memory=workers.object_store_mb * 1_000_000,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
    return True


def resources(workers: Workers) -> str:
    """What a worker needs beside what there is, in words."""
    room = ray.cluster_resources()
    return (
        f"one needs {workers.cpus} CPUs and {workers.gpus} GPUs on one node, the cluster has "
        f"{room.get('CPU', 0)} CPUs and {room.get('GPU', 0)} GPUs"
    )


def room(workers: Workers) -> int:
    """Workers for which the nodes that are alive have room, also while others hold it."""
    needs = {"CPU": workers.cpus, "GPU": workers.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min((int(node.get(name, 0) / share) for name, share in needs.items() if share), default=1) for node in nodes
    )


def worker_count(workers: Workers, tasks: int, can_grow: bool) -> int:
    """Workers to start: as many as asked for, else as there is room for, but no more than tasks.

    UserError where there is room for none; where they were asked for and the cluster can grow, they may wait for it.
    """
    fitting = room(workers)
    if fitting == 0 and not (workers.count and can_grow):
        raise UserError(f"workers: {resources(workers)}")
    return min(workers.count or fitting, tasks)


class WorkerPool:
    """Workers, the tasks that they are on, and those to do; a task's `str` names it.

    A worker gets a task only when it is ready, so that no task waits for a worker that cannot start.
    """

    def __init__(
        self,
        workers: Workers,
        new_worker: Callable[[], Any],
        begin: Callable[[Any, Any], Any],
        todo: Iterable,
        board: Board,
        can_grow: bool = True,
    ):
        """`new_worker()` is an actor, `begin(actor, task)` the generator of how far it is with the task. A cluster that
        can't grow is not waited for once it has lost its nodes."""
        self.can_grow = can_grow
        self.workers, self.new_worker, self.begin, self.board = workers, new_worker, begin, board
        self.todo = deque(todo)
        self.attempts: Counter[str] = Counter()
        self.given_up: dict[str, str] = {}  # task -> its last error
        self.waiting: dict[
            Any, tuple[Any, Any]
        ] = {}  # what a worker will answer -> (worker, its task; None while it starts)
        self.failed_starts, self.last_answer = 0, time.monotonic()

    @property
    def working(self) -> bool:
        """Whether any worker has a task."""
        return any(task is not None for _, task in self.waiting.values())

    @property
    def unfinished(self) -> bool:
        return bool(self.todo) or self.working

    def start_worker(self) -> None:
        worker = self.new_worker()
        self.waiting[worker.__ray_ready__.remote()] = (worker, None)

    def take_answers(self) -> None:
        """Wait a second at most for what workers answer, and see to it."""
        answers: list[Any] = ray.wait(list(self.waiting), num_returns=1, timeout=1)[0]
        self._tell_if_nobody_works(bool(answers))
        for answer in answers:
            worker, task = self.waiting.pop(answer)
            try:
                if task is None:
                    ray.get(answer)
                    self.failed_starts = 0
                    self.board.start()
                    self._give_task(worker)
                else:
                    self.board.update(task, ray.get(next(answer)))
                    self.waiting[answer] = (worker, task)
            except StopIteration:
                self.board.finish(task)
                self._give_task(worker)
            except RayError as error:
                self._note_failed_start(error) if task is None else self._note_failed(task, error)
                if isinstance(error, RayTaskError):  # the worker itself is well
                    self._give_task(worker)
                else:
                    ray.kill(worker)  # it may only be out of reach, and hold the room for the next one
                    if self.todo:
                        self.start_worker()

    def close(self) -> None:
        for worker, _ in self.waiting.values():
            ray.kill(worker)

    def _give_task(self, worker) -> None:
        if not self.todo:
            ray.kill(worker)
            return
        task = self.todo.popleft()
        self.attempts[str(task)] += 1
        self.waiting[self.begin(worker, task)] = (worker, task)

    def _note_failed_start(self, error: RayError) -> None:
        self.failed_starts += 1
        if self.failed_starts == self.workers.attempts:
            raise UserError(f"workers do not start: {str(error).splitlines()[-1]}") from error

    def _note_failed(self, task, error: RayError) -> None:
        attempts = self.attempts[str(task)]
        self.board.restart(task)
        self.board.message(f"{task}: attempt {attempts} failed: {reason(error)}")
        if attempts < self.workers.attempts:
            self.todo.append(task)
        else:
            self.given_up[str(task)] = reason(error)
            self.board.failed += 1

    def _tell_if_nobody_works(self, answered: bool) -> None:
        if answered or self.working:
            self.last_answer = time.monotonic()
        elif time.monotonic() - self.last_answer > SECONDS_BEFORE_WORD:
            self.last_answer = time.monotonic()
            if not self.can_grow and not room(self.workers):
                raise UserError(f"workers: the cluster has lost its nodes: {resources(self.workers)}; run again")
            self.board.message(f"waiting for a worker: {resources(self.workers)}")


def reason(error: RayError) -> str:
    """What went wrong, out of Ray's long account of it."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return "the worker died" if isinstance(error, RayActorError) else first_line(error)
