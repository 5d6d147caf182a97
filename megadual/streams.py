"""The contract between the pipeline and the model: tokens, shard columns, and what a document is.

A document says who speaks and what each image is for. Which turns have a loss, and in which direction a pair is read,
is chosen when it is read (megadual/data/layout.py).

Shape suffixes: T text ids of a document, N image positions of a document, I images, D code depth of a stream.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Generic, NamedTuple, TypeVar

import numpy as np

TEXT = "text"  # the loss beside the streams'

Count = TypeVar("Count", int, np.ndarray)  # of one document, or of many


@dataclass(frozen=True)
class Stream:
    """One of a DualToken's streams of codes, as data and language models see it: D codes a position, each one of K
    vectors of width C. ValueError where K codes don't fit a shard set's uint16.
    """

    name: str
    depth: int  # D
    codebook_size: int  # K
    code_dim: int  # C

    def __post_init__(self):
        if self.codebook_size > 1 << 16:
            raise ValueError(
                f"stream '{self.name}': a codebook of {self.codebook_size:,} is too large, codes are stored as uint16 "
                f"(at most {1 << 16:,})"
            )


IMAGE = "<image>"  # stands for one image in a document's text, and for one image position in a sequence
END_OF_TEXT = "<|endoftext|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # Qwen's marks around what somebody says
SPECIAL_TOKENS = (
    END_OF_TEXT, IMAGE, "<image_start>", "<image_end>", "<image_gen_start>", "<image_gen_end>", IM_START, IM_END,
)  # fmt: skip


class Role(IntEnum):
    """Who says a turn. Text without a speaker is a document's or a caption's: it stands without marks around it."""

    DOCUMENT = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    CAPTION = 5  # of the one image of a pair, which is read in either direction


# Plain numbers: comparing with members takes longer than the rest of a document's check.
_ROLES, _CAPTION = len(Role), int(Role.CAPTION)
SPEAKERS = (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL)


class TurnBit(IntFlag):
    LOSS = 1  # the model is to say it
    DROPPABLE = 2  # its text may be left out, for classifier-free guidance


class ImageUse(IntFlag):
    LOOKED_AT = 1
    DRAWN = 2
    EITHER = 3  # as the reader likes
    DROPPABLE = 4  # may be left out, for classifier-free guidance


_EITHER = int(ImageUse.EITHER)
_USES = {use | extra for use in (1, 2, 3) for extra in (0, int(ImageUse.DROPPABLE))}
_TURN_BITS = int(TurnBit.LOSS | TurnBit.DROPPABLE)

# One MDS row is one document; the encodings are mosaicml-streaming's names. Beside these columns each stream has one.
COLUMNS = {
    "key": "str",
    "text_ids": "ndarray:uint32",
    "turns": "ndarray:uint32",
    "grids": "ndarray:uint16",
    "image_use": "ndarray:uint8",
    "meta": "json",
}
CODES = "ndarray:uint16"


def check_stream_names(names: Iterable[str]) -> None:
    """ValueError where streams can't have these names: columns of shard sets, losses and parts of the model do too."""
    from torch.nn import ModuleDict  # takes seconds to import

    names = list(names)
    for name in names:
        if not name.isidentifier():
            raise ValueError(
                f"stream '{name}': a name must be letters, digits and underscores, and begin with no digit"
            )
        if name in COLUMNS or name == TEXT or hasattr(ModuleDict(), name):
            raise ValueError(f"stream '{name}': the name has another meaning; choose another")
        if names.count(name) > 1:
            raise ValueError(f"stream '{name}' is there {names.count(name)} times; names must differ")


def mds_columns(streams: Iterable[str]) -> dict[str, str]:
    """The columns of a shard set with these streams: name -> encoding."""
    key, text_ids, turns, *rest = COLUMNS.items()
    return dict([key, text_ids, turns, *((name, CODES) for name in streams), *rest])


# Beside a folder's MDS files, so that rows are packed without reading the documents: (documents, 7) int32, each
# document's `Lengths`, and the text ids of every caption of the pairs that have several, in order.
LENGTHS, CAPTIONS = "lengths.npy", "captions.npy"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of SPECIAL_TOKENS in one text tokenizer."""

    end_of_text: int
    image: int
    image_start: int
    image_end: int
    image_gen_start: int
    image_gen_end: int
    im_start: int
    im_end: int

    @classmethod
    def of(cls, tokenizer) -> "SpecialIds":
        """Look the tokens up in a HF tokenizer; ValueError names the ones it lacks."""
        ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        found = dict(zip(SPECIAL_TOKENS, ids, strict=True))
        unknown_id, unknown_token = tokenizer.unk_token_id, tokenizer.unk_token  # Qwen's own is END_OF_TEXT
        unknown = [t for t, i in found.items() if i is None or (i == unknown_id and t != unknown_token)]
        if unknown:
            raise ValueError(f"the text tokenizer lacks the special tokens {unknown}")
        return cls(*ids)


@dataclass(frozen=True)
class Marks(SpecialIds):
    """The special ids, and what stands around what somebody says: `<|im_start|>user\\n` ... `<|im_end|>\\n`."""

    headers: Mapping[Role, np.ndarray]  # of each of SPEAKERS, the ids before what it says
    newline: np.ndarray  # the ids behind <|im_end|>

    @classmethod
    def of(cls, tokenizer) -> "Marks":
        special = SpecialIds.of(tokenizer)
        texts = ["\n", *(f"{role.name.lower()}\n" for role in SPEAKERS)]
        newline, *names = (np.array(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids)
        headers = {role: np.append(special.im_start, name) for role, name in zip(SPEAKERS, names, strict=True)}
        return cls(**vars(special), headers=headers, newline=newline)

    def around(self, role: Role) -> int:
        """Positions that the marks around a turn take."""
        return len(self.headers[role]) + 1 + len(self.newline) if role in self.headers else 0


class Lengths(NamedTuple, Generic[Count]):
    """What decides how many positions a document takes; of many documents, arrays."""

    text_tokens: Count  # T, of a pair with several captions that of its longest
    images: Count
    positions: Count  # N
    marks: Count  # around its turns
    droppable_text: Count  # text ids
    droppable_image: Count  # positions, with the two tokens around each image
    captions: Count  # of a pair; else 0

    def sequence_length(self) -> Count:  # type: ignore[misc]  # mypy knows no self of a generic tuple
        """Positions of the sequence, nothing left out."""
        return self.text_tokens + self.images + self.positions + self.marks + 1


@dataclass
class Document:
    """Text with images in it, the images as codes: one row of a shard set.

    text_ids (T,) uint32, each image one `<image>` id; codes: stream -> (N, D) uint16, all images in order,
    row-major; grids (I, 2) uint16, rows and columns of each image, N = sum of rows x columns.
    turns (K, 3) uint32, what each of K speakers says: its end in text_ids, its Role, its TurnBits; image_use (I,)
    uint8, each image's ImageUse. By default all text is one document that the model is to write, its images drawn or
    looked at.

    A pair is an image and its caption, or several captions to choose from: text_ids is `<image>` and the captions, each
    of which is a turn.
    """

    key: str
    text_ids: np.ndarray
    codes: dict[str, np.ndarray]
    grids: np.ndarray
    meta: dict = field(default_factory=dict)
    turns: np.ndarray = None  # type: ignore[assignment]
    image_use: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self):
        if self.turns is None:
            self.turns = np.array([[len(self.text_ids), Role.DOCUMENT, TurnBit.LOSS]], dtype=np.uint32)
        if self.image_use is None:
            self.image_use = np.full(len(self.grids), ImageUse.EITHER, dtype=np.uint8)

    @property
    def positions(self) -> int:
        """N, what its images take."""
        return sum(rows * columns for rows, columns in self.grids.tolist())

    @property
    def depths(self) -> dict[str, int]:
        """Of each stream, D."""
        return {stream: codes_ND.shape[1] for stream, codes_ND in self.codes.items()}

    @property
    def is_pair(self) -> bool:
        """An image and its captions: read in either direction."""
        return self.turns.item(0, 1) == _CAPTION

    def captions(self) -> list[np.ndarray]:
        """A pair's captions, as text ids."""
        ends = self.turns[:, 0].tolist()
        return [self.text_ids[begin:end] for begin, end in zip([1, *ends], ends, strict=False)]

    def lengths(self, marks: Marks) -> Lengths[int]:
        """What its sequence's length is made of."""
        turns, begins = self.turns.tolist(), [0, *self.turns[:, 0].tolist()]
        is_image = self.text_ids == marks.image
        droppable_text = sum(
            end - begin - np.count_nonzero(is_image[begin:end])
            for begin, (end, _, bits) in zip(begins, turns, strict=False)
            if bits & TurnBit.DROPPABLE
        )
        droppable_image = sum(
            rows * columns + 2
            for (rows, columns), use in zip(self.grids.tolist(), self.image_use.tolist(), strict=True)
            if use & ImageUse.DROPPABLE
        )
        captions = [len(caption) for caption in self.captions()] if self.is_pair else []
        return Lengths(
            1 + max(captions) if captions else len(self.text_ids),
            len(self.grids),
            self.positions,
            sum(marks.around(Role(role)) for _, role, _ in turns),
            droppable_text,
            droppable_image,
            len(captions),
        )

    def check(self, special: SpecialIds) -> "Document":
        """Raise ValueError, naming the document, where its columns do not fit together; TypeError where one has other
        axes. Cheap, since every document that is read is checked.
        """
        images, positions = len((self.text_ids == special.image).nonzero()[0]), self.positions
        if images != len(self.grids):
            raise ValueError(f"document '{self.key}': {images} image tokens in the text, {len(self.grids)} grids")
        for stream, codes_ND in self.codes.items():
            if codes_ND.ndim != 2 or len(codes_ND) != positions:
                raise ValueError(
                    f"document '{self.key}': {stream} codes of shape {codes_ND.shape}, "
                    f"the grids say {positions} positions"
                )
        if len(self.image_use) != images:
            raise ValueError(f"document '{self.key}': uses of {len(self.image_use)} images, there are {images}")
        if not _USES.issuperset(uses := self.image_use.tolist()):
            unknown = next(use for use in uses if use not in _USES)
            raise ValueError(f"document '{self.key}': image_use has the unknown value {unknown}")
        turns, begin, captions = self.turns.tolist(), 0, 0
        for end, role, bits in turns:
            if end < begin:
                break
            if role >= _ROLES or bits > _TURN_BITS:
                unknown = f"role {role}" if role >= _ROLES else f"bits {bits}"
                raise ValueError(f"document '{self.key}': turns has one of the unknown {unknown}")
            begin = end
            captions += role == _CAPTION
        if begin != len(self.text_ids) or not turns:
            ends = [end for end, _, _ in turns]
            raise ValueError(f"document '{self.key}': turns end at {ends}, the text has {len(self.text_ids)} ids")
        if captions:
            image_first = images == 1 and self.text_ids.item(0) == special.image
            if not image_first or captions < len(turns) or self.image_use.item(0) != _EITHER:
                raise ValueError(
                    f"document '{self.key}': a pair is one image of either use, then nothing but its captions"
                )
        return self

    def row(self) -> dict:
        """The document as MDSWriter takes it: one value for each of `mds_columns`.

        MDS holds no empty array, so a document without images has one grid of 0 x 0 and one row of codes there.
        """
        codes, grids, image_use = self.codes, self.grids, self.image_use
        if not len(grids):
            grids, image_use = np.zeros((1, 2), dtype=np.uint16), np.zeros(1, dtype=np.uint8)
            codes = {stream: np.zeros((1, codes_ND.shape[1]), dtype=np.uint16) for stream, codes_ND in codes.items()}
        text = {"key": self.key, "text_ids": self.text_ids, "turns": self.turns}
        return {**text, **codes, "grids": grids, "image_use": image_use, "meta": self.meta}

    @classmethod
    def from_row(cls, row: dict) -> "Document":
        """The document that `row()` stored, with its streams and meta as far as `row` still holds them."""
        key, text_ids, turns, meta = row.pop("key"), row.pop("text_ids"), row.pop("turns"), row.pop("meta", {})
        grids, image_use = row.pop("grids"), row.pop("image_use")
        if grids.item(0):
            return cls(key, text_ids, row, grids, meta, turns, image_use)
        none = {stream: codes_ND[:0] for stream, codes_ND in row.items()}
        return cls(key, text_ids, none, grids[:0], meta, turns, image_use[:0])
