"""Opening images that come from anywhere, by no other decoder than those that are meant."""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

# PIL tells a format by what a file holds, whatever its name: asked for any, it hands an EPS named .jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")


def open_image(file: str | Path | BinaryIO, formats: Iterable[str] = FORMATS) -> Image.Image:
    """An image of one of PIL's `formats`, still to be decoded; PIL.UnidentifiedImageError where it is none of them."""
    return Image.open(file, formats=tuple(formats))


def unknown_formats(formats: Iterable[str]) -> list[str]:
    """Those of `formats` that this PIL can't read."""
    Image.init()  # does nothing the second time
    return [name for name in formats if name.upper() not in Image.OPEN]
