"""How far a run is, and the line that shows it."""

import sys
import time

from tqdm import tqdm

from data_pipeline.encode import Progress
from data_pipeline.readers import InputShard


class Board:
    """The progress of each shard of this run; its share done and ETA are of the inputs' bytes.

    On a terminal a bar that is redrawn every second, else a line every ten.
    """

    def __init__(self, todo: list[InputShard]):
        self.progress: dict[str, Progress] = {}
        self.finished: set[str] = set()
        self.started = self.shown = time.monotonic()
        self.working = False
        self.failed = 0
        self.total = sum(shard.size for shard in todo)
        self.terminal = sys.stderr.isatty()

    @property
    def images(self) -> int:
        return sum(progress.images for progress in self.progress.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def memory(self) -> int:
        """Bytes, the largest peak of a worker."""
        return max((progress.memory for progress in self.progress.values()), default=0)

    def start(self) -> None:
        """The first worker is ready: rates count from here."""
        if not self.working:
            self.working, self.started = True, time.monotonic()

    def update(self, shard: InputShard, progress: Progress) -> None:
        self.progress[shard.name] = progress
        if time.monotonic() - self.shown >= (1 if self.terminal else 10):
            self.show()

    def restart(self, shard: InputShard) -> None:
        """The shard's attempt failed: what it had done does not count."""
        self.progress.pop(shard.name, None)

    def finish(self, shard: InputShard) -> None:
        self.finished.add(shard.name)

    def finished_counts(self) -> tuple[int, int]:
        """(samples, quarantined) of the shards that this run has committed."""
        done = [self.progress[name] for name in self.finished]
        return sum(progress.samples for progress in done), sum(progress.quarantined for progress in done)

    def message(self, message: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(message, file=sys.stderr)

    def show(self) -> None:
        self.shown = time.monotonic()
        done, quarantined, samples = (
            sum(getattr(progress, name) for progress in self.progress.values())
            for name in ("bytes", "quarantined", "samples")
        )
        line = tqdm.format_meter(
            done,
            self.total,
            self.seconds,
            ncols=120 if self.terminal else None,
            prefix="tokenize",
            unit="B",
            unit_scale=True,
            bar_format="{desc}: {percentage:3.0f}% of {total_fmt}, {elapsed}<{remaining}{postfix}",
            postfix=f"{samples} samples, {self.images / self.seconds:.0f} images/s, {quarantined} quarantined"
            + (f", {self.failed} inputs failed" if self.failed else ""),
        )
        end = {"end": "\r"} if self.terminal else {}
        print(f"\033[K{line}" if self.terminal else line, file=sys.stderr, flush=True, **end)

    def close(self) -> None:
        self.show()
        if self.terminal:
            print(file=sys.stderr)
