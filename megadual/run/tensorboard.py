"""The numbers of a run for TensorBoard: `tensorboard --logdir RUN/tensorboard`."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm


class TensorBoard:
    """Writes FOLDER's event files; a resumed run hides the steps that the checkpoint does not contain.

    No disk that is full or away ends training: it goes on without.
    """

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.writer: SummaryWriter | None = None
        with self._may_fail():
            self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """A line of metrics.jsonl; a list's numbers stand under NAME/0, NAME/1, ..."""
        for name, value in entry.items():
            if isinstance(value, list):
                for i, each in enumerate(value):
                    self._number(f"{name}/{i}", each, entry["step"])
            elif name != "step":
                self._number(name, value, entry["step"])

    def _number(self, name: str, value: Any, step: int) -> None:
        if self.writer and isinstance(value, int | float):  # null is what was not finite
            with self._may_fail():
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image | str) -> None:
        """A PIL image or a file's path."""
        if isinstance(image, str):
            with Image.open(image) as file:
                image = file.convert("RGB")
        if self.writer:
            with self._may_fail():
                self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer:
            with self._may_fail():
                self.writer.close()

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.writer = None
            tqdm.write(f"warning: training goes on without TensorBoard: {error}", sys.stderr)
