"""Where the time of some steps goes: a trace to look at, and a table."""

import re
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megadual.run.hooks import Hook

COMMUNICATION = re.compile(r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|\b(send|recv)\b", re.IGNORECASE)
ROWS = 25


class Profiler(Hook):
    """Profiles the steps from `first` to `last`; belongs on one rank.

    FOLDER/steps-FIRST-LAST.json.gz is a Chrome trace (chrome://tracing, ui.perfetto.dev), FOLDER/steps-FIRST-LAST.txt
    the table, which is printed too. Where training begins after `first` or ends before `last` they are of the steps
    that there are.
    """

    def __init__(self, folder: Path, first: int, last: int):
        self.folder, self.first, self.last = folder, first, last
        self.profile: profile | None = None

    def before_step(self, step: int) -> None:
        if self.profile is None and self.first <= step <= self.last:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.begun, self.steps, self.waited = time.perf_counter(), 0, 0.0
            self.profile.start()

    def after_step(self, step: int, entry: dict[str, Any]) -> None:
        if self.profile:
            self.steps += 1
            self.waited += entry.get("data_wait_s", 0.0)
            if step >= self.last:
                self._stop()

    def at_end(self, finished: bool) -> None:
        if self.profile:
            self._stop()

    def _stop(self) -> None:
        assert self.profile
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        self.profile.stop()
        name, table = f"steps-{self.first}-{self.last}", self._table(self.profile, seconds)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.txt").write_text(table)
            self.profile.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        except OSError as error:  # a full disk does not end training
            print(f"warning: '{self.folder}' lacks the profile: {error}", flush=True)
        print(table, flush=True)
        self.profile, self.last = None, 0  # the steps are over

    def _table(self, profiled: profile, seconds: float) -> str:
        """Shares are of the steps' time; a kernel's are of the device that it ran on."""
        on_gpu = torch.cuda.is_available()
        unit = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        times = [(event.key, event.count, getattr(event, unit) / 1e6) for event in profiled.key_averages()]
        times = sorted((entry for entry in times if entry[2] > 0), key=lambda entry: -entry[2])
        busy = sum(time for _, _, time in times)
        communicating = sum(time for name, _, time in times if COMMUNICATION.search(name))
        device = torch.cuda.get_device_name() if on_gpu else "CPU"
        lines = [
            f"profile of {self.steps} steps on {device}: {seconds / self.steps:.3f} s each, with the profiler",
            f"{'waiting for data':40} {self.waited / seconds:6.1%}",
            f"{'kernels' if on_gpu else 'operations'} (those at once count twice) {'':2} {busy / seconds:6.1%}",
            f"{'of them communication':40} {communicating / seconds:6.1%}",
            "",
            f"{'name':72} {'calls/step':>10} {'ms/step':>9} {'share':>7}",
        ]
        for name, count, of_name in times[:ROWS]:
            lines.append(
                f"{name[:72]:72} {count / self.steps:10.1f} {1e3 * of_name / self.steps:9.2f} {of_name / seconds:7.1%}"
            )
        return "\n".join(lines) + "\n"
