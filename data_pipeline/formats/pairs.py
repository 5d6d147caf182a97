"""Pairs of an image with its captions, and texts without images."""

from typing import Any

from data_pipeline.bounded_json import parse_json
from data_pipeline.documents import LeftOut, RawDocument, RawTurn, Unusable
from data_pipeline.formats.sample import Sample, kind, text
from megadual.streams import Role


def is_pair(sample: Sample) -> bool:
    return any(sample.members.get(name) is not None for name in sample.read.images) and any(
        sample.members.get(name) is not None if not field else sample.fields.get(field) is not None
        for name, _, field in (name.partition(":") for name in sample.read.captions)
    )


def is_part_of_pair(sample: Sample) -> bool:
    """A pair, or what would be one if nothing were missing."""
    names = [*sample.read.images, *(name.partition(":")[0] for name in sample.read.captions if ":" not in name)]
    return any(name in sample.members for name in names)


def read_pair(sample: Sample) -> RawDocument:
    """One of `read.images` with one of `read.captions`; several captions are a turn each."""
    present = [name for name in sample.read.images if name in sample.members]
    values = [sample.members[name] for name in present if sample.members[name] is not None]
    if present and not values and sample.members.get("status", "success") != "success":
        raise LeftOut("not_downloaded")  # img2dataset keeps a row for what it could not fetch
    name, captions = _captions(sample)
    if not present:
        raise Unusable("no image: the sample has none of " + ", ".join(sample.read.images))
    first, *others = captions
    image = sample.image(values[0] if values else None)
    turns = [RawTurn(Role.CAPTION, [image, first]), *(RawTurn(Role.CAPTION, [other]) for other in others)]
    return RawDocument(sample.key, turns, {"field": name})


def _captions(sample: Sample) -> tuple[str, list[str]]:
    """(its name, the captions), of the first of `read.captions` that there is."""
    for name in sample.read.captions:
        member, _, field = name.partition(":")
        if sample.members.get(member) is None:
            continue
        value = sample.members[member]
        if field:
            try:
                value = parse_json(value)[field]
            except (ValueError, KeyError, TypeError) as error:
                raise Unusable(f"no caption: {member} has no field '{field}'") from error
        return name, _spelt(value, several=(field or member).endswith("captions"))
    raise Unusable("no caption: the sample has none of " + ", ".join(sample.read.captions))


def _spelt(value: Any, several: bool) -> list[str]:
    """A text or a list of them; under a name like `captions` also spelt as JSON, a list or an object (BAGEL's)."""
    if several and isinstance(value, (str, bytes)):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise Unusable("the captions are not JSON") from error
        if not isinstance(value, (list, dict)):
            raise Unusable(f"the captions are JSON, but {kind(value)}, neither a list nor an object")
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [text(value, "caption").strip()]
    captions = [text(caption, "caption", blank=True).strip() for caption in value]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise Unusable("the caption is empty")
    return captions


def is_text(sample: Sample) -> bool:
    has_image = any(name in sample.members for name in sample.read.images)
    return not has_image and sample.members.get(sample.read.text) is not None


def read_text(sample: Sample) -> RawDocument:
    """`read.text`, in JSON lines and parquet."""
    said = text(sample.members.get(sample.read.text), "text")
    return RawDocument(sample.key, [RawTurn(Role.DOCUMENT, [said])], {"field": sample.read.text})
