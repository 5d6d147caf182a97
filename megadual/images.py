"""Image files as they come from anyone: only formats that are meant, of bounded bytes and pixels."""

import base64
import io
import os
import stat
import time
import urllib.request
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

# PIL tells a format by what a file holds, whatever its name: asked for any, it hands an EPS named .jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000
SECONDS = 20  # for an address to be read
PIECE = 1 << 16

ADDRESSES = ("http://", "https://")
_HANDLERS = (  # urllib's own would follow from http to ftp
    urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)  # fmt: skip


def open_image(file: str | Path | BinaryIO, formats: Iterable[str] = FORMATS) -> Image.Image:
    """An image of one of PIL's `formats`, still to be decoded; PIL.UnidentifiedImageError where it is none of them."""
    return Image.open(file, formats=tuple(formats))


def unknown_formats(formats: Iterable[str]) -> list[str]:
    """Those of `formats` that this PIL can't read."""
    Image.init()  # does nothing the second time
    return [name for name in formats if name.upper() not in Image.OPEN]


def read_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded image, as it is stored, of a file or of a file's bytes; ValueError says in a line why there is none.

    The contents decide what format it is, whatever the file is called.
    """
    try:
        data = source if isinstance(source, bytes) else _file(source)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has {len(data)} bytes, more than {MAX_BYTES}")
        with warnings.catch_warnings():  # the bound below is ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = open_image(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {max_pixels}")
        image.load()
        return image
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # of PIL's decoders: whatever unpacking wrong bytes leads to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason.splitlines()[0]) from error


def read_address(address: str) -> bytes:
    """What lies at an http or https address; ValueError where it can't be had whole within SECONDS and MAX_BYTES."""
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    end, data = time.monotonic() + SECONDS, bytearray()
    try:
        with opener.open(address, timeout=SECONDS) as stream:
            while piece := stream.read1(PIECE):
                data += piece
                if len(data) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES} bytes")
                if time.monotonic() > end:
                    raise ValueError(f"it takes more than {SECONDS} s")
    except Exception as error:  # of urllib, http.client, ssl and socket, which share no class
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error
    return bytes(data)


def from_base64(text: str) -> bytes:
    """The bytes of base64, or of a data: address; ValueError where it is neither."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("a data: address of an image is 'data:image/...;base64,...'")
    if len(text) > 2 * MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return base64.b64decode("".join(text.split()), validate=True)


def _file(path: str | Path) -> bytes:
    """A file's bytes. Only a regular file has an end that is sure to come: a pipe or a device may have none."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no file")
    if about.st_size > MAX_BYTES:
        raise ValueError(f"it has {about.st_size} bytes, more than {MAX_BYTES}")
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)
