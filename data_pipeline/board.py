"""How far a run is, and the progress bar that shows it."""

import time

from tqdm import tqdm

from data_pipeline.encode import Progress
from data_pipeline.readers import InputShard


class Board:
    """The progress of each shard of this run; the bar runs over the bytes of the inputs."""

    def __init__(self, todo: list[InputShard]):
        self.progress: dict[str, Progress] = {}
        self.finished: set[str] = set()
        self.started = self.shown = time.monotonic()
        self.working = False
        self.bar = tqdm(total=sum(shard.size for shard in todo), desc="tokenize", unit="B", unit_scale=True)
        self.interval = 1.0 if self.bar.fp.isatty() else 10.0  # seconds between two lines

    @property
    def samples(self) -> int:
        return sum(progress.samples for progress in self.progress.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def start(self) -> None:
        """The first worker is ready: rates count from here."""
        if not self.working:
            self.working, self.started = True, time.monotonic()

    def update(self, shard: InputShard, progress: Progress) -> None:
        self.progress[shard.name] = progress
        if time.monotonic() - self.shown >= self.interval:
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

    def show(self) -> None:
        self.shown = time.monotonic()
        quarantined = sum(progress.quarantined for progress in self.progress.values())
        self.bar.n = sum(progress.bytes for progress in self.progress.values())
        self.bar.set_postfix_str(
            f"{self.samples} samples, {self.samples / self.seconds:.0f}/s, {quarantined} quarantined"
        )

    def close(self) -> None:
        self.show()
        self.bar.close()
