"""From a raw sample to an image and its caption, or the reason why not."""

import io
import json
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.config import EncodeConfig, FilterConfig, ReadConfig
from data_pipeline.readers import RawSample


class Unusable(Exception):
    """The sample is broken: it goes to the quarantine list with this reason."""


class LeftOut(Exception):
    """The sample is sound but a filter leaves it out: counted under this reason."""


@dataclass
class Pair:
    """A decoded sample: an RGB image and its caption."""

    key: str
    image: Image.Image
    caption: str
    meta: dict


def _caption(sample: RawSample, where: str) -> str:
    suffix, _, name = where.partition(":")
    if suffix not in sample.members:
        raise Unusable(f"no caption: the sample has no .{suffix}")
    try:
        text = sample.members[suffix].decode("utf-8")
        if name:
            text = json.loads(text)[name]
    except UnicodeDecodeError as error:
        raise Unusable("the caption is not UTF-8") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Unusable(f"no caption: .{suffix} has no field '{name}'") from error
    if not isinstance(text, str) or not text.strip():
        raise Unusable("the caption is empty")
    return text.strip()


def _image(sample: RawSample, suffixes: list[str], max_pixels: int) -> Image.Image:
    data = next((sample.members[suffix] for suffix in suffixes if suffix in sample.members), None)
    if data is None:
        raise Unusable("no image: the sample has none of ." + ", .".join(suffixes))
    if not data:
        raise Unusable("the image has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise Unusable(f"the image has {image.width} x {image.height} pixels, more than max_pixels {max_pixels}")
        image.load()
    except UnidentifiedImageError as error:
        raise Unusable("not an image that can be read") from error
    except Image.DecompressionBombError as error:
        raise Unusable(f"the image is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL's decoders raise on broken data
        raise Unusable(f"the image is broken: {error}") from error
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode(sample: RawSample, read: ReadConfig, filters: FilterConfig, encode: EncodeConfig) -> Pair:
    """Decode and filter one sample; Unusable or LeftOut say why there is no pair."""
    if sample.damage:
        raise Unusable(sample.damage)
    caption = _caption(sample, read.caption)
    image = _image(sample, read.images, encode.max_pixels)
    short, long = sorted(image.size)
    if short < filters.min_side:
        raise LeftOut("min_side")
    if long > filters.max_aspect * short:
        raise LeftOut("max_aspect")
    if len(caption) < filters.min_caption:
        raise LeftOut("min_caption")
    if len(caption) > filters.max_caption:
        raise LeftOut("max_caption")
    return Pair(sample.key, _to_rgb(image), caption, {"caption": read.caption, "size": list(image.size)})
