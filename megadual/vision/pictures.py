"""Grids of originals beside their reconstructions."""

from PIL import Image
from torch import Tensor

from .tokenizer import to_image


def comparison_grid(originals: Tensor, reconstructions: Tensor, pairs_per_row: int = 8, gap: int = 4) -> Image.Image:
    """(B, 3, h, w) twice, in [-1, 1] -> one picture of pairs, the original at the left."""
    count, _, height, width = originals.shape
    columns = min(pairs_per_row, count)
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * (2 * width + 2 * gap) + gap, rows * (height + gap) + gap), "white")
    for i in range(count):
        left = gap + (i % columns) * (2 * width + 2 * gap)
        top = gap + (i // columns) * (height + gap)
        grid.paste(to_image(originals[i]), (left, top))
        grid.paste(to_image(reconstructions[i]), (left + width + 1, top))
    return grid
