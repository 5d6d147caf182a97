"""The formats that labs have their data in: each recognised from what a sample holds, unless `read.format` says which.

Every reader makes a RawDocument of a Sample. Rules that all share: an image of a user's, system's or tool's turn is
looked at, one of an assistant's drawn; the assistant's turns have a loss; where it draws, the turn that asks for that
may be dropped, text and images, for guidance (conversations.py). Pages are one turn that has a loss, never re-ordered;
only what is stored as a pair is one. Text that spells a special token is text, but for the `<image>`s of formats that
have images so.
"""

from collections.abc import Callable
from typing import NamedTuple

from data_pipeline.config import ReadConfig
from data_pipeline.documents import LeftOut, RawDocument, Unusable
from data_pipeline.formats import conversations, edits, pages, pairs
from data_pipeline.formats.sample import Sample
from data_pipeline.image_root import ImageRoot
from data_pipeline.readers import RawSample


class Format(NamedTuple):
    """`recognise` may not raise; `read` raises Unusable or LeftOut where there is no document."""

    recognise: Callable[[Sample], bool]
    read: Callable[[Sample], RawDocument]


FORMATS = {
    "conversations": Format(conversations.is_sharegpt, conversations.read_sharegpt),
    "messages": Format(conversations.is_messages, conversations.read_messages),
    "cauldron": Format(conversations.is_cauldron, conversations.read_cauldron),
    "interleaved": Format(pages.is_interleaved, pages.read_interleaved),
    "mmc4": Format(pages.is_mmc4, pages.read_mmc4),
    "edit": Format(edits.is_edit, edits.read_edit),
    "edit_list": Format(edits.is_edit_list, edits.read_edit_list),
    "pair": Format(pairs.is_pair, pairs.read_pair),
    "text": Format(pairs.is_text, pairs.read_text),
}


def recognise(sample: Sample) -> str:
    """The name of the sample's format; Unusable where that is none, or may be several."""
    names = [name for name, format in FORMATS.items() if format.recognise(sample)]
    if len(names) > 1:
        raise Unusable(f"it can be read as {' or as '.join(names)}; say which: read.format={names[0]}")
    if names:
        return names[0]
    if pairs.is_part_of_pair(sample):  # whose reader says what is missing
        return "pair"
    raise Unusable(f"no known format: it holds {', '.join(sorted({*sample.fields, *sample.members}))}")


def to_document(raw: RawSample, read: ReadConfig, images: ImageRoot | None = None) -> RawDocument:
    """Lay a sample out; Unusable or LeftOut say why there is no document. `images`: where those are that it names."""
    if raw.damage:
        raise Unusable(raw.damage)
    sample = Sample(raw, read, images)
    try:
        name = recognise(sample) if read.format == "auto" else read.format
        document = FORMATS[name].read(sample)
    except (Unusable, LeftOut):
        raise
    except Exception as error:  # of a value where no reader expects its like: it costs this sample only
        raise Unusable(f"it can't be laid out: {type(error).__name__}: {error}") from error
    document.meta["format"] = name
    return document
