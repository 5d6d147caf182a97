"""The lock of a run folder, the watchdog, the checks of nodes, and what is recorded of starts."""

import errno
import fcntl
import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megadual.errors import UserError
from megadual.run import exits, record
from megadual.run.config import RunConfig
from megadual.run.local import ALL_SIGNALS
from megadual.run.lock import LOCK, RunLock
from megadual.run.nodes import CLOCK_TOLERANCE_S, NodeError, check_nodes, skews

BEAT = 0.1


def test_one_holder(tmp_path):
    first, second = RunLock(tmp_path, BEAT), RunLock(tmp_path, BEAT)
    first.acquire()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def _hold(folder: Path, held) -> None:
    RunLock(folder, BEAT).acquire()
    held.set()
    time.sleep(60)


def test_a_killed_holder_leaves_no_harm(tmp_path):
    held = multiprocessing.Event()
    holder = multiprocessing.Process(target=_hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(30)
    with pytest.raises(UserError):
        RunLock(tmp_path, BEAT).acquire()
    holder.kill()
    holder.join()
    lock = RunLock(tmp_path, beat_s=60)  # known by its process id, without watching
    lock.acquire()
    lock.release()


def test_a_dead_holder_elsewhere_is_watched(tmp_path):
    """Its clock does not matter: here the lock was touched in the future."""
    elsewhere = RunLock(tmp_path).me | {"host": "another machine", "name": "n7"}
    (tmp_path / LOCK).write_text(json.dumps(elsewhere))
    os.utime(tmp_path / LOCK, (time.time() + 3600,) * 2)
    lock, begun = RunLock(tmp_path, BEAT), time.monotonic()
    lock.acquire()
    assert time.monotonic() - begun >= 4 * BEAT
    lock.release()


def test_a_holder_outlives_its_disks_bad_moment(tmp_path, monkeypatch):
    failed = threading.Event()

    def utime(path, times=None, before=os.utime):
        if failed.is_set():
            return before(path, times)
        failed.set()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "utime", utime)
    lock = RunLock(tmp_path, BEAT)
    lock.acquire()
    assert failed.wait(30)
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path, BEAT).acquire()
    lock.release()


def test_of_two_that_find_a_dead_holder_one_wins(tmp_path):
    elsewhere = RunLock(tmp_path).me | {"host": "another machine", "name": "n7"}
    (tmp_path / LOCK).write_text(json.dumps(elsewhere))
    locks, won = [RunLock(tmp_path, BEAT) for _ in range(4)], []

    def start(lock):
        try:
            lock.acquire()
            won.append(lock)
        except UserError:
            pass

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()


def _die_taking_over(folder: Path, depth: int) -> None:
    """Killed between two steps: when it has the lock of taking over, or that of taking that over, and so on."""
    replace, left = os.replace, [depth]

    def die(*args):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        replace(*args)

    os.replace = die
    RunLock(folder, BEAT).acquire()


def test_a_start_that_is_killed_while_it_takes_over_leaves_no_harm(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(RunLock(tmp_path).me | {"pid": 1 << 30}))
    for depth in (0, 0, 1, 2):
        killed = multiprocessing.Process(target=_die_taking_over, args=(tmp_path, depth))
        killed.start()
        killed.join(30)
        assert killed.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".successor-of-*"))
    lock = RunLock(tmp_path, BEAT)
    start = threading.Thread(target=lock.acquire, daemon=True)
    start.start()
    start.join(30)
    assert not start.is_alive() and json.loads((tmp_path / LOCK).read_text()) == lock.me
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path, BEAT).acquire()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"owner": "../x", "pid": "1"}'])
def test_a_lock_that_a_disk_has_broken_is_taken_over(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    lock = RunLock(tmp_path, BEAT)
    lock.acquire()
    (tmp_path / LOCK).write_bytes(content)  # while it is held: it goes on
    with pytest.raises(UserError, match="in use by process 0 on an unknown machine"):
        RunLock(tmp_path, BEAT).acquire()
    assert not list(tmp_path.glob(".successor-of-*"))


def test_watchdog_shows_stacks_and_wakes_stopped_ranks(tmp_path):
    """Two ranks: one stops beating, the other is stopped as a whole."""
    code = """
import sys, time
from pathlib import Path
from megadual.run import watchdog
watchdog.GRACE_S = 1.0
rank, peer = int(sys.argv[1]), [int(pid) for pid in sys.argv[3:]]
dog = watchdog.Watchdog(Path(sys.argv[2]), rank, 2.0, peer)
def hangs():
    print("ready", flush=True)
    time.sleep(60)
hangs()
"""
    command = [sys.executable, "-c", code]
    stopped = subprocess.Popen([*command, "1", tmp_path], stdout=subprocess.PIPE, text=True)
    assert stopped.stdout.readline() == "ready\n"
    stopped.send_signal(signal.SIGSTOP)
    hanging = subprocess.run([*command, "0", tmp_path, str(stopped.pid)], capture_output=True, text=True, timeout=60)
    assert hanging.returncode == 77 and "error: rank 0 on" in hanging.stderr
    assert stopped.wait(timeout=30) == 77
    for rank in range(2):
        assert "in hangs" in (tmp_path / f"hang-rank{rank}.txt").read_text()


def _check(run, rank, port, results):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=dist.default_pg_timeout)
    try:
        results[rank] = check_nodes(run, store, rank, 2, timeout_s=2.0)
    except NodeError as error:
        results[rank] = str(error)


def test_a_rank_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_NODES", "n1 n2")
    run = RunConfig(dir=f"{tmp_path}/run")
    server = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    results = {}
    _check(run, 0, server.port, results)
    assert results[0] == "bad nodes: nothing was heard from rank 1 on n2 in 2 s"


def test_nodes_that_are_fit(tmp_path):
    run = RunConfig(dir=f"{tmp_path}/run")
    server = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    results = {}
    ranks = [threading.Thread(target=_check, args=(run, rank, server.port, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert results == {0: [os.getpid()] * 2, 1: [os.getpid()] * 2}


RANK = """
import contextlib, os, sys, time
from pathlib import Path
from megadual.run.signals import StopSignal
rank, folder, how = int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2]
with contextlib.closing(StopSignal()) as stop:
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (stop.got and how == "stops") and not (how == "fails" and rank == 1):
        time.sleep(0.02)
        if stop.got:
            (folder / f"{rank}.got").touch()
sys.exit(75 if stop.got else 9)
"""


@pytest.fixture
def start_ranks(tmp_path):
    """start_ranks(how): the starter of two ranks of RANK, and their process ids once both are there."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(how):
        code = "import sys; from megadual.run import local; local.GRACE_S = 0.5; "
        code += "sys.exit(local.run_ranks(2, sys.argv[1:]))"
        command = [sys.executable, "-c", code, sys.executable, tmp_path / "rank.py", tmp_path, how]
        started.append(start_as_a_shell_does(command, env=os.environ | {"TMPDIR": str(tmp_path)}))
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
        return started[0], [int(file.read_text()) for file in files]

    yield start
    for process in started:
        process.kill()
        process.wait()


def start_as_a_shell_does(command, **options):
    """With Ctrl-C and the terminal's end as they are where nothing ignores them; its stderr is read."""

    def heed():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed, **options)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_local_ranks_get_the_signals_and_give_their_exit_code(start_ranks, tmp_path):
    process, ranks = start_ranks("stops")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # a second one ends nothing early
    assert process.wait(30) == 75
    assert not any(map(alive, ranks))
    assert not list(tmp_path.glob("megadual-*"))


@pytest.mark.parametrize("number", ALL_SIGNALS)
def test_local_ranks_answer_each_signal(start_ranks, number):
    process, ranks = start_ranks("stops")
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 75
    assert not any(map(alive, ranks))


def test_a_second_ctrl_c_ends_local_ranks_at_once(start_ranks, tmp_path):
    process, ranks = start_ranks("stays")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: all((tmp_path / f"{rank}.got").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == exits.INTERRUPTED
    assert not any(map(alive, ranks))


def test_a_second_ctrl_c_ends_a_single_rank_at_once(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, tmp_path / "rank.py", tmp_path, "stays"]
    process = start_as_a_shell_does(command, env=os.environ | {"RANK": "0"})
    wait_for((tmp_path / "0.pid").exists)
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "0.got").exists)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_before_training_ends_at_once(tmp_path, ranks):
    code = "import os, time\nfrom megadual.run import local\nlocal.hold_stop_signals()\n"
    (tmp_path / "rank.py").write_text(code + "os.write(1, b'begun\\n')\ntime.sleep(60)\n")
    command = [sys.executable, tmp_path / "rank.py"]
    if ranks > 1:
        command[1:1] = ["-m", "megadual.run.local", str(ranks)]
    process = start_as_a_shell_does(command, stdout=subprocess.PIPE)
    for _ in range(ranks):
        assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=30)[1]
    assert (told, process.returncode) == ("", -signal.SIGINT if ranks == 1 else exits.INTERRUPTED)


def test_ranks_stop_in_order_where_torchrun_is_killed(tmp_path):
    rank = """
import contextlib, os, sys, time
from pathlib import Path
from megadual.run.local import hold_stop_signals
from megadual.run.signals import StopSignal
hold_stop_signals()
with contextlib.closing(StopSignal()) as stop:
    print(os.getpid(), flush=True)
    while not stop.got:
        time.sleep(0.02)
    Path(sys.argv[1]).write_text("saved")
"""
    launcher = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, "-c", rank, tmp_path / "saved"],
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == -signal.SIGUSR1
    wait_for(lambda: not alive(pid))
    assert (tmp_path / "saved").read_text() == "saved"


def test_what_nohup_ignores_stays_ignored():
    code = """
import contextlib, os, signal
from megadual.run.local import hold_stop_signals
from megadual.run.signals import StopSignal
hold_stop_signals()
with contextlib.closing(StopSignal()) as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.got)
"""

    def ignore():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=ignore)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_a_terminal_that_closes_stops_it_in_order(tmp_path):
    """The hang-up comes as SIGHUP, and nothing can be printed any more."""
    code = """
import contextlib, sys, time
from pathlib import Path
from megadual.run.output import unbreakable_output
from megadual.run.signals import StopSignal
with unbreakable_output(), contextlib.closing(StopSignal()) as stop:
    while not stop.got:
        print("a step", flush=True)
        time.sleep(0.01)
    for _ in range(9):
        print("saving", flush=True)
        print("saving", file=sys.stderr)
    Path(sys.argv[1]).write_text("saved")
sys.exit(75)
"""

    def in_the_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "saved"], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=in_the_terminal,
    )  # fmt: skip
    os.close(theirs)
    assert b"a step" in os.read(ours, 100)
    os.close(ours)
    assert process.wait(30) == 75
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_full_disk_behind_the_output_keeps_the_exit_code():
    code = """
import os, sys
from megadual.run.output import unbreakable_output
with unbreakable_output():
    print("x" * 100_000)
    print("a few")
    print("more", file=sys.stderr)
sys.exit(75)
"""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full).returncode == 75


def test_one_local_rank_s_failure_ends_all(start_ranks):
    process, ranks = start_ranks("fails")
    assert process.wait(40) == 9
    assert not any(map(alive, ranks))


def test_a_killed_starter_leaves_no_rank(start_ranks):
    process, ranks = start_ranks("stays")
    process.kill()
    wait_for(lambda: not any(map(alive, ranks)))


def test_a_stop_that_came_first_is_seen_and_one_that_comes_last_does_no_harm():
    code = """
import contextlib, os, signal
from megadual.run.local import hold_stop_signals
hold_stop_signals()
os.kill(os.getpid(), signal.SIGUSR1)
from megadual.run.signals import StopSignal
with contextlib.closing(StopSignal()) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
print(stop.got)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n")


def test_clocks_are_compared_with_the_median():
    assert skews([100.0, 100.1, 160.0, 100.2]) == pytest.approx([-0.1, 0.0, 59.9, 0.1])
    assert CLOCK_TOLERANCE_S < 59.9


def test_starts_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    record.add_start(tmp_path, record.describe_start(4))
    record.add_start(tmp_path, record.describe_start(8))
    record.end_start(tmp_path, "finished")
    killed, finished = record.read_starts(tmp_path)
    assert "ended" not in killed and finished["ended"] == "finished"
    assert killed["slurm"]["job"] == "17" and killed["packages"]["torch"] and finished["world"] == 8


def test_a_broken_record_is_named(tmp_path):
    for content in (b"", b"\0\0\0", b"[]", b'{"starts": ', b'{"starts": 3}', b'{"starts": [{}]}'):
        (tmp_path / record.FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"run.json' is broken \(.*remove it"):
            record.read_starts(tmp_path)
