"""Before training: do all ranks come, and is each node fit? A bad one is named while the job is still young."""

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import statistics
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from megadual.errors import UserError, first_line
from megadual.run import exits
from megadual.run.config import RunConfig
from megadual.run.local import STORE

START_TIMEOUT_S = 600.0  # for the slowest node to import and join
CLOCK_TOLERANCE_S = 5.0


class NodeError(UserError):
    """A node is not fit for the job; another start, elsewhere, may go well."""

    exit_code = exits.BAD_NODE


class MeetingError(NodeError):
    """This rank does not reach the others."""

    own = True


def open_store(rank: int, world: int, timeout_s: float = START_TIMEOUT_S) -> dist.Store:
    """What ranks tell each other before there is a process group, and through which they make one.

    One process alone needs nothing for it, and ranks of this machine have a file (megadual/run/local.py). Else it is a
    server at MASTER_ADDR:MASTER_PORT, of rank 0 or of torchrun's agent. Ours listens at that address alone where it is
    an IP address, as slurm/env.sh gives one; a host's name may mean another address on its own host, so all of them
    are listened at then. Who reaches the port can disturb the start: it belongs into the cluster's own network. Values
    are JSON, and nothing is unpickled from it.
    """
    if path := os.environ.get(STORE):
        return dist.FileStore(path, world)
    if "MASTER_ADDR" not in os.environ or world == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            world,
            is_master=serves,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,  # check_nodes waits, and says who is missing
            master_listen_fd=_listen(address, port) if serves else None,
        )
    except (OSError, RuntimeError) as error:  # ours, and torch.distributed's
        place, reason = f"MASTER_ADDR={address} MASTER_PORT={port}", first_line(error)
        if serves:
            raise MeetingError(
                f"rank 0 can't listen at {place}: {reason}; give another port, or its address"
            ) from error
        raise MeetingError(f"rank {rank} does not reach rank 0 at {place}: {reason}") from error
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _listen(address: str, port: int) -> int | None:
    """A socket's number; None for a name."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return None
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=4096).detach()


def check_nodes(
    run: RunConfig, store: dist.Store, rank: int, world: int, timeout_s: float = START_TIMEOUT_S
) -> list[int]:
    """Each rank checks its GPU, its way to the run folder and its clock; NodeError, on all ranks, names what is bad.

    Returns the process ids of the ranks on this node. Needs no process group, so that nothing can hang here.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "problems": [*_gpu(run.device), *_disk(Path(run.dir))]}
    reports = _gather(store, "report", mine, rank, world, timeout_s)
    clocks = _gather(store, "clock", time.time(), rank, world, timeout_s)  # read just after all have met
    bad = {report["host"]: problem for report in reports for problem in report["problems"]}
    for report, skew in zip(reports, skews(clocks), strict=True):
        if abs(skew) > CLOCK_TOLERANCE_S:
            bad.setdefault(report["host"], f"its clock is {skew:+.0f} s off the others'")
    if bad:
        raise NodeError("bad nodes: " + "; ".join(f"{host}: {problem}" for host, problem in bad.items()))
    return [report["pid"] for report in reports if report["host"] == mine["host"]]


def check_all_reduce(rank: int, world: int) -> None:
    """One all-reduce of the default group, on the device that trains; NodeError where the sum is wrong (collective)."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    total = torch.full((1 << 16,), rank + 1.0, device=device)
    dist.all_reduce(total)
    if not torch.all(total == world * (world + 1) / 2):
        raise NodeError(f"bad nodes: {socket.gethostname()}: an all-reduce gave rank {rank} a wrong sum")


def skews(clocks: list[float]) -> list[float]:
    """Seconds by which each clock is ahead of the median."""
    middle = statistics.median_low(clocks)
    return [clock - middle for clock in clocks]


def _gpu(device: str | None) -> list[str]:
    if device != "cuda":
        return []
    local = local_rank()
    found = torch.cuda.device_count()
    if local >= found:
        return [f"rank {os.environ.get('RANK', 0)} needs GPU {local}, {found} are visible (run.device=cuda)"]
    try:
        ones = torch.ones(256, 256, device=f"cuda:{local}")
        works = bool(torch.all(ones @ ones == 256))
    except RuntimeError as error:
        return [f"GPU {local}: {first_line(error)}"]
    return [] if works else [f"GPU {local} multiplies wrongly"]


def _disk(folder: Path) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        try:
            with open(probe, "wb") as file:
                file.write(bytes(1 << 16))
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return [f"run.dir '{folder}' can't be written: {error.strerror}"]
    return []


def _gather(store: dist.Store, name: str, value, rank: int, world: int, timeout_s: float) -> list:
    """Every rank's value on every rank. Rank 0 collects, so that a large world asks the store O(world) times."""
    store.set(f"{name}/{rank}", json.dumps(value))
    values, missing = [], []
    if rank == 0:
        deadline = time.monotonic() + timeout_s
        for other in range(world):
            left = max(0.01, deadline - time.monotonic())
            try:
                store.wait([f"{name}/{other}"], datetime.timedelta(seconds=left))
                values.append(json.loads(store.get(f"{name}/{other}")))
            except RuntimeError:  # a FileStore's, and a TCPStore's DistStoreError
                missing.append(_place(other))
    values, missing = broadcast(store, f"{name}/all", [values, missing], rank, world, timeout_s + 30)
    if missing:
        raise NodeError(f"bad nodes: nothing was heard from {', '.join(missing)} in {timeout_s:.0f} s")
    return values


def broadcast(store: dist.Store, name: str, value, rank: int, world: int, timeout_s: float = START_TIMEOUT_S):
    """Rank 0's value on every rank."""
    if rank == 0:
        store.set(name, json.dumps(value))
        with contextlib.suppress(RuntimeError):  # the store ends with rank 0: first all should have read
            if world > 1:
                store.wait([f"{name}/read"], datetime.timedelta(seconds=3))
        return value
    store.wait([name], datetime.timedelta(seconds=timeout_s))
    value = json.loads(store.get(name))
    if store.add(f"{name}/readers", 1) == world - 1:
        store.set(f"{name}/read", "")
    return value


def local_rank() -> int:
    """This process among those of its node, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _place(rank: int) -> str:
    """A rank that was never heard of, with its node where the launcher tells them (JOB_NODES, in rank order)."""
    nodes = os.environ.get("JOB_NODES", "").split()
    node = rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return f"rank {rank} on {nodes[node]}" if node < len(nodes) else f"rank {rank}"
