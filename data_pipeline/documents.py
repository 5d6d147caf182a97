"""From what a sample holds to its document: texts and undecoded images in order.

Which layout a sample has is seen from it, so that one set can hold all three:
- interleaved: `texts` and `images`, two lists of one length that hold at each place either a text or an image, the
  other null. In a tar they stand in KEY.json, and an image is the suffix of its member (`"0.jpg"` for KEY.0.jpg); in
  parquet an image is its bytes;
- pair: one of `read.images`, with one of `read.captions`; in parquet as img2dataset writes it;
- text: `read.text`, in JSON lines and parquet.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from data_pipeline.config import ReadConfig
from data_pipeline.readers import RawSample
from megadual.streams import ImageUse, Role, TurnBit


class Unusable(Exception):
    """The sample is broken: it goes to the quarantine list with this reason."""


class LeftOut(Exception):
    """The sample is sound but a filter leaves it out: counted under this reason."""


@dataclass
class RawImage:
    """An encoded image and what it is for."""

    data: bytes
    use: ImageUse = ImageUse.EITHER


@dataclass
class RawTurn:
    """What one speaker says: texts and images in order, no two texts side by side."""

    role: Role
    parts: list[str | RawImage]
    bits: TurnBit = TurnBit.LOSS


@dataclass
class RawDocument:
    """Turns in order. A pair is its image and then its captions, each a turn, the image in the first."""

    key: str
    layout: str
    field: str  # where its text stood
    turns: list[RawTurn]

    @property
    def images(self) -> int:
        return sum(isinstance(part, RawImage) for turn in self.turns for part in turn.parts)

    def digest(self) -> bytes:
        """Equal for documents of the same turns."""
        state = hashlib.blake2b(digest_size=16)
        for turn in self.turns:
            state.update(f"turn {turn.role} {turn.bits} ".encode())
            for part in turn.parts:
                data = part.data if isinstance(part, RawImage) else part.encode()
                state.update(f"{part.use if isinstance(part, RawImage) else 'text'} {len(data)} ".encode())
                state.update(data)
        return state.digest()


def to_document(sample: RawSample, read: ReadConfig) -> RawDocument:
    """Lay a sample out; Unusable or LeftOut say why there is no document."""
    if sample.damage:
        raise Unusable(sample.damage)
    lists = _interleaved_lists(sample.members)
    if lists is not None:
        parts = _interleave(*lists, sample.members)
        return RawDocument(sample.key, "interleaved", "texts", [RawTurn(Role.DOCUMENT, parts)])
    present = [name for name in read.images if name in sample.members]
    image = next((name for name in present if sample.members[name] is not None), present[0] if present else None)
    if image is None and read.text in sample.members:
        text = _text(sample.members[read.text], "text")
        return RawDocument(sample.key, "text", read.text, [RawTurn(Role.DOCUMENT, [text])])
    if image is not None and sample.members[image] is None and sample.members.get("status", "success") != "success":
        raise LeftOut("not_downloaded")  # img2dataset keeps a row for what it could not fetch
    field, caption = _caption(sample.members, read.captions)
    if image is None:
        raise Unusable("no image: the sample has none of " + ", ".join(read.images))
    parts = [_image(sample.members[image]), caption.strip()]
    return RawDocument(sample.key, "pair", field, [RawTurn(Role.CAPTION, parts)])


def _interleaved_lists(members: dict[str, Any]) -> tuple[list, list] | None:
    holder, described = members, members.get("json")
    if isinstance(described, bytes) and b'"texts"' in described:
        try:
            holder = json.loads(described)
        except (ValueError, RecursionError) as error:
            raise Unusable("its .json is not JSON") from error
    if not isinstance(holder, dict):
        return None
    texts, images = holder.get("texts"), holder.get("images")
    return (texts, images) if isinstance(texts, list) and isinstance(images, list) else None


def _interleave(texts: list, images: list, members: dict[str, Any]) -> list[str | RawImage]:
    if len(texts) != len(images):
        raise Unusable(f"{len(texts)} texts beside {len(images)} images; both lists must have one length")
    parts = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise Unusable(f"place {place} must hold either a text or an image")
        if image is None:
            parts.append(_text(text, f"text at place {place}", blank=True))
        else:
            if isinstance(image, str) and image not in members:
                raise Unusable(f"no image: the sample has no .{image}")
            parts.append(_image(members[image] if isinstance(image, str) else image))
    return parts


def _caption(members: dict[str, Any], names: list[str]) -> tuple[str, str]:
    for name in names:
        member, _, field = name.partition(":")
        if member not in members:
            continue
        value = members[member]
        if field:
            try:
                value = json.loads(value)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Unusable(f"no caption: {member} has no field '{field}'") from error
        return name, _text(value, "caption")
    raise Unusable("no caption: the sample has none of " + ", ".join(names))


def _text(value: Any, what: str, blank: bool = False) -> str:
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        if not isinstance(value, str):
            raise Unusable(f"the {what} is {type(value).__name__}, not a string")
        value.encode("utf-8")  # JSON may spell half a surrogate pair
    except UnicodeError as error:
        raise Unusable(f"the {what} is not UTF-8") from error
    if not blank and not value.strip():
        raise Unusable(f"the {what} is empty")
    return value


def _image(value: Any) -> RawImage:
    """The encoded image; datasets' parquet files keep it as a struct of bytes and path."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Unusable(f"the image is {type(data).__name__}, not bytes")
    if not data:
        raise Unusable("the image has 0 bytes")
    return RawImage(data)
