"""The numbers of a run for TensorBoard: `tensorboard --logdir RUN/tensorboard`."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class TensorBoard:
    """Writes FOLDER's event files; a resumed run hides the steps that the checkpoint does not contain."""

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

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
        if isinstance(value, int | float):  # null is what was not finite
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image | str) -> None:
        """A PIL image or a file's path."""
        if isinstance(image, str):
            with Image.open(image) as file:
                image = file.convert("RGB")
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
