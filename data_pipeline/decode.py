"""From undecoded images to RGB, or the reason why not; and the filters."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image, UnidentifiedImageError

from data_pipeline.config import EncodeConfig, FilterConfig
from data_pipeline.documents import LeftOut, RawDocument, Unusable
from megadual.vision.tokenizer import to_rgb


@dataclass
class Decoded:
    """Texts (str) and RGB images in order."""

    key: str
    parts: list
    meta: dict
    left_out_images: Counter = field(default_factory=Counter)

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def images(self) -> list:
        return [part for part in self.parts if not isinstance(part, str)]


@contextlib.contextmanager
def _unusable_where_broken() -> Iterator[None]:
    """Unusable for all that PIL raises on broken data, so that one image costs its sample and not its shard."""
    try:
        yield
    except Unusable:
        raise
    except UnidentifiedImageError as error:
        raise Unusable("not an image that can be read") from error
    except Image.DecompressionBombError as error:
        raise Unusable(f"the image is too large: {error}") from error
    except Exception as error:
        raise Unusable(f"the image is broken: {str(error) or type(error).__name__}") from error


def _image(data: bytes, max_pixels: int) -> Image.Image:
    with _unusable_where_broken():
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise Unusable(f"the image has {image.width} x {image.height} pixels, more than max_pixels {max_pixels}")
        image.load()
        return image


def _filter_image(image: Image.Image, filters: FilterConfig) -> None:
    short, long = sorted(image.size)
    if short < filters.min_side:
        raise LeftOut("min_side")
    if long > filters.max_aspect * short:
        raise LeftOut("max_aspect")


def _filter_text(parts: list, filters: FilterConfig, layout: str) -> None:
    length = sum(len(part) for part in parts if isinstance(part, str))
    kind = "caption" if layout == "pair" else "text"
    if length < getattr(filters, f"min_{kind}"):
        raise LeftOut(f"min_{kind}")
    if length > getattr(filters, f"max_{kind}"):
        raise LeftOut(f"max_{kind}")


def decode(document: RawDocument, filters: FilterConfig, encode: EncodeConfig) -> Decoded:
    """Decode and filter one document; Unusable or LeftOut say why there is none."""
    parts, sizes, left_out = [], [], Counter()
    for part in document.parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        image = _image(part, encode.max_pixels)
        try:
            _filter_image(image, filters)
        except LeftOut as reason:
            if document.layout == "pair":
                raise
            left_out[str(reason)] += 1
            continue
        sizes.append(list(image.size))
        with _unusable_where_broken():
            parts.append(to_rgb(image))
    _filter_text(parts, filters, document.layout)
    meta = {"layout": document.layout, "field": document.field, "sizes": sizes}
    return Decoded(document.key, parts, meta, left_out)
