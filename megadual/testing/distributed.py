"""Run a function on several processes of one group, as tests of parallel layouts do.

With gloo processes come from a forkserver that has torch and megatron-core imported once, so starting eight takes a
second and not eight imports. With NCCL each has a GPU of its own and starts from nothing, since CUDA can't be forked.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["megadual.testing.preload"]
_context = None


def forkserver():
    """The context whose processes have imported PRELOAD already."""
    global _context
    if _context is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
    return _context


def _worker(fn, rank, world_size, store, results, timeout_s, backend, args):
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        results.put((rank, True, pickle.dumps(fn(*args))))  # by value: tensors outlive this process
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def _failures(rank: int, said: str, workers: list, results) -> str:
    """What the first failed rank said, and what came of the others: it may only have lost a peer that died."""
    told = [f"rank {rank} of {len(workers)} failed:\n{said}"]
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            other, ok, value = results.get(timeout=0.2)
            told.append(f"rank {other} " + ("was done" if ok else f"failed:\n{value}"))
    told += [f"rank {r} was ended by signal {-w.exitcode}" for r, w in enumerate(workers) if (w.exitcode or 0) < 0]
    return "\n".join(told)


def run_distributed(fn: Callable, nprocs: int, *args, timeout_s: float = 120.0, backend: str = "gloo") -> list[Any]:
    """Call `fn(*args)` in `nprocs` processes of one group and return its results by rank.

    `fn` must be importable (a module's top level), its arguments and results picklable, results on the CPU.
    The first failure stops all processes and is raised here as RuntimeError with that rank's traceback;
    so is running longer than `timeout_s` seconds.
    """
    context = forkserver() if backend == "gloo" else multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        workers = [
            context.Process(target=_worker, args=(fn, rank, nprocs, store, results, timeout_s, backend, args))
            for rank in range(nprocs)
        ]
        for worker in workers:
            worker.start()
        got, deadline = {}, time.monotonic() + timeout_s
        try:
            while len(got) < nprocs:
                try:
                    rank, ok, value = results.get(timeout=0.2)
                except queue.Empty:
                    dead = [r for r, w in enumerate(workers) if r not in got and w.exitcode not in (None, 0)]
                    if dead and results.empty():
                        raise RuntimeError(f"ranks {dead} died without a word") from None
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"only ranks {sorted(got)} of {nprocs} were done in {timeout_s} s") from None
                    continue
                if not ok:
                    raise RuntimeError(_failures(rank, value, workers, results))
                got[rank] = pickle.loads(value)
            for worker in workers:
                worker.join(timeout=10)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()
    return [got[rank] for rank in range(nprocs)]
