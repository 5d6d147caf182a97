"""gloo's threads on the cores that ranks compute on."""

import contextlib
import os
from pathlib import Path


def keep_gloo_behind() -> None:
    """Let the threads of all groups that there are by now take no core from a thread that is at work.

    Such a thread polls a socket that has been sent something until its rank asks for it. Woken by each message, it
    would take the core of the very rank that others wait for. On two cores small all-reduces of two ranks take a
    quarter of the time with this, of four a third (docs/log.md). On Linux alone; no other thread's policy changes.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system; or forbidden here, or a thread has ended
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
