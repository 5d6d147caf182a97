"""Images as the pipeline decodes them: broken EXIF, 16 bits, and errors that cost one sample only."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.config import EncodeConfig, FilterConfig
from data_pipeline.decode import decode
from data_pipeline.documents import RawDocument, RawImage, RawTurn, Unusable
from megadual.streams import Role

TURNED = (0x0112, 3, 1, b"\6\0\0\0")  # orientation 6: by a quarter


def decoded(data: bytes) -> Image.Image:
    document = RawDocument("k", [RawTurn(Role.CAPTION, [RawImage(data), "a cat"])])
    (part,) = decode(document, FilterConfig(), EncodeConfig()).images
    return part.image


def file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of entries (tag, type, count, value)."""
    ifd = b"".join(struct.pack("<HHL4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + ifd + bytes(4)


@pytest.mark.parametrize(
    "entry, turned",
    [
        ((0x010F, 11, 1, bytes(4)), True),  # a maker that is a float: AttributeError where it is written again
        ((0xA005, 1, 1, bytes(4)), True),  # struct.error there
        ((0x011A, 1, 1, bytes(4)), True),  # TypeError there
        ((0x8825, 6, 1, b"\xff" * 4), True),
        (None, False),  # no table at all: struct.error, or nothing found, where it is read
    ],
)
def test_an_image_with_broken_exif_is_read(entry, turned):
    block = exif(TURNED, entry) if entry else b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    image = decoded(file(Image.new("RGB", (40, 24), (200, 100, 50)), "JPEG", exif=block))
    assert image.mode == "RGB" and image.size == ((24, 40) if turned else (40, 24))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_upright_once(orientation):
    """As PIL turns it; what is upright is not turned again."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = file(Image.fromarray(noise), exif=tags)
    image = decoded(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image.tobytes() == expected.tobytes() == decoded(file(image)).tobytes()
    assert not image.getexif()


@pytest.mark.parametrize("error", [struct.error("unpack"), TypeError("bytes"), RuntimeError("")])
@pytest.mark.parametrize("step", ["load", "convert"])
def test_whatever_pil_raises_is_a_reason(monkeypatch, error, step):
    def broken(*args, **kwargs):
        raise error

    data = file(Image.new("RGB", (32, 32)))
    monkeypatch.setattr(Image.Image if step == "convert" else Image.open(io.BytesIO(data)).__class__, step, broken)
    with pytest.raises(Unusable, match=f"the image is broken: {str(error) or 'RuntimeError'}"):
        decoded(data)


@pytest.mark.parametrize("dtype, format", [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF")])
def test_16_bits_of_grey_are_scaled(dtype, format):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(dtype)
    image = np.asarray(decoded(file(Image.fromarray(ramp), format)))
    assert np.abs(image[..., 0] - ramp / 257.0).max() <= 1 and (image == image[..., :1]).all()


def test_the_transparent_grey_of_16_bits_is_white():
    grey = np.full((32, 32), 1000, dtype=np.uint16)
    grey[:16] = 30000
    image = decoded(file(Image.fromarray(grey), transparency=30000))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((0, 31)) == (3, 3, 3)
