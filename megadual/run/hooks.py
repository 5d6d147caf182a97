"""What a training does beside its steps, without its loop knowing of it."""

from pathlib import Path
from typing import Any


class Hook:
    """Called by a loop at these points, on every rank unless said otherwise. A subclass has those that it needs."""

    def before_step(self, step: int) -> None:
        """`step`, counted from 1, is about to wait for its data."""

    def after_step(self, step: int, entry: dict[str, Any]) -> None:
        """The step is done; `entry` is its line in metrics.jsonl, to which numbers may be added."""

    def after_checkpoint(self, checkpoint: Path) -> None:
        """A checkpoint is whole (rank 0)."""

    def at_end(self, finished: bool) -> None:
        """After the last step, or where training ends before it."""
