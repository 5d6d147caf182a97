"""From undecoded images to RGB, or the reason why not; and the filters."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, UnidentifiedImageError

from data_pipeline.config import EncodeConfig, FilterConfig
from data_pipeline.documents import LeftOut, RawDocument, RawImage, Unusable, join
from megadual.images import FORMATS, open_image
from megadual.streams import ImageUse, Role, TurnBit
from megadual.vision.tokenizer import to_rgb


@dataclass
class DecodedImage:
    """An RGB image, later its cropped pixels, and what it is for."""

    image: Any
    use: ImageUse


@dataclass
class DecodedTurn:
    role: Role
    parts: list[str | DecodedImage]
    bits: TurnBit


@dataclass
class Decoded:
    """Turns of texts and decoded images in order."""

    key: str
    turns: list[DecodedTurn]
    meta: dict
    left_out_images: Counter = field(default_factory=Counter)
    left_out_captions: Counter = field(default_factory=Counter)

    @property
    def texts(self) -> list[str]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, str)]

    @property
    def images(self) -> list[DecodedImage]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, DecodedImage)]


@contextlib.contextmanager
def unusable_where_broken() -> Iterator[None]:
    """Unusable for all that PIL raises on broken data, so that one image costs its sample and not its shard."""
    try:
        yield
    except Unusable:
        raise
    except UnidentifiedImageError as error:
        raise Unusable("not an image of any of read.image_formats") from error
    except Image.DecompressionBombError as error:
        raise Unusable(f"the image is too large: {error}") from error
    except Exception as error:
        raise Unusable(f"the image is broken: {str(error) or type(error).__name__}") from error


def _image(data: bytes, max_pixels: int, formats: Iterable[str]) -> Image.Image:
    with unusable_where_broken():
        image = open_image(io.BytesIO(data), formats)
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


def _filter_length(length: int, kind: str, filters: FilterConfig) -> None:
    if length < getattr(filters, f"min_{kind}"):
        raise LeftOut(f"min_{kind}")
    if length > getattr(filters, f"max_{kind}"):
        raise LeftOut(f"max_{kind}")


def _filter_captions(turns: list[DecodedTurn], filters: FilterConfig) -> tuple[list[DecodedTurn], Counter]:
    """The pair with the captions that pass, and how many don't; LeftOut where none does."""
    image, first = turns[0].parts
    captions, left_out = [], Counter()
    for caption in [first, *(turn.parts[0] for turn in turns[1:])]:
        try:
            _filter_length(len(caption), "caption", filters)
            captions.append(caption)
        except LeftOut as reason:
            left_out[str(reason)] += 1
    if not captions:
        raise LeftOut(next(iter(left_out)))
    parts = [[image, captions[0]], *([caption] for caption in captions[1:])]
    return [DecodedTurn(Role.CAPTION, each, turns[0].bits) for each in parts], left_out


def decode(
    document: RawDocument, filters: FilterConfig, encode: EncodeConfig, formats: Iterable[str] = FORMATS
) -> Decoded:
    """Decode and filter one document; Unusable or LeftOut say why there is none."""
    document.load()
    sizes, left_out, captions = [], Counter(document.left_out_images), Counter()

    def decoded(part: RawImage) -> DecodedImage | None:
        image = _image(part.load(), encode.max_pixels, formats)
        try:
            _filter_image(image, filters)
        except LeftOut as reason:
            if not document.is_page:  # what is said of the image would not hold
                raise
            left_out[str(reason)] += 1
            return None
        sizes.append(list(image.size))
        with unusable_where_broken():
            return DecodedImage(to_rgb(image), part.use)

    turns = []
    for turn in document.turns:
        parts = [part if isinstance(part, str) else decoded(part) for part in turn.parts]
        kept = join([part for part in parts if part is not None], turn.between)
        turns.append(DecodedTurn(turn.role, kept, turn.bits))
    if document.is_pair:
        turns, captions = _filter_captions(turns, filters)
    else:
        length = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
        _filter_length(length, "text", filters)
    return Decoded(document.key, turns, {**document.meta, "sizes": sizes}, left_out, captions)
