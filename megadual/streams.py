"""The contract between the pipeline and the model: tokens, shard columns, how a document becomes positions.

Shape suffixes: T text ids of a document, N image positions of a document, I images, S positions of a
sequence, D code depth of a stream.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

TEXT = "text"  # the loss beside the streams'


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
SPECIAL_TOKENS = (END_OF_TEXT, IMAGE, "<image_start>", "<image_end>", "<image_gen_start>", "<image_gen_end>")

# One MDS row is one document; the encodings are mosaicml-streaming's names. Beside these columns each stream has one.
COLUMNS = {"key": "str", "text_ids": "ndarray:uint32", "grids": "ndarray:uint16", "meta": "json"}
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
    key, text_ids, *rest = COLUMNS.items()
    return dict([key, text_ids, *((name, CODES) for name in streams), *rest])


# Beside a folder's MDS files: (documents, 3) int32, each document's text ids, images and image positions, so that rows
# are packed without reading the documents.
LENGTHS = "lengths.npy"

IGNORE = -100  # text target of a position whose next position is not text


@dataclass(frozen=True)
class SpecialIds:
    """Ids of SPECIAL_TOKENS in one text tokenizer."""

    end_of_text: int
    image: int
    image_start: int
    image_end: int
    image_gen_start: int
    image_gen_end: int

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


@dataclass
class Document:
    """Text with images in it, the images as codes: one row of a shard set.

    text_ids (T,) uint32, each image one `<image>` id; codes: stream -> (N, D) uint16, all images in order,
    row-major; grids (I, 2) uint16, rows and columns of each image, N = sum of rows x columns.
    """

    key: str
    text_ids: np.ndarray
    codes: dict[str, np.ndarray]
    grids: np.ndarray
    meta: dict = field(default_factory=dict)

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
        """One image and its caption: may be read in either direction."""
        return len(self.grids) == 1

    def check(self, special: SpecialIds) -> "Document":
        """Raise ValueError, naming the document, where its columns do not fit together."""
        images, positions = np.count_nonzero(self.text_ids == special.image), self.positions
        if images != len(self.grids):
            raise ValueError(f"document '{self.key}': {images} image tokens in the text, {len(self.grids)} grids")
        for stream, codes_ND in self.codes.items():
            if codes_ND.ndim != 2 or len(codes_ND) != positions:
                raise ValueError(
                    f"document '{self.key}': {stream} codes of shape {codes_ND.shape}, "
                    f"the grids say {positions} positions"
                )
        return self

    def row(self) -> dict:
        """The document as MDSWriter takes it: one value for each of `mds_columns`.

        MDS holds no empty array, so a document without images has one grid of 0 x 0 and one row of codes there.
        """
        codes, grids = self.codes, self.grids
        if not len(grids):
            grids = np.zeros((1, 2), dtype=np.uint16)
            codes = {stream: np.zeros((1, codes_ND.shape[1]), dtype=np.uint16) for stream, codes_ND in codes.items()}
        return {"key": self.key, "text_ids": self.text_ids, **codes, "grids": grids, "meta": self.meta}

    @classmethod
    def from_row(cls, row: dict) -> "Document":
        """The document that `row()` stored, with those of its streams that `row` still holds."""
        key, text_ids, grids, meta = (row.pop(name) for name in COLUMNS)
        if grids.item(0):
            return cls(key, text_ids, row, grids, meta)
        return cls(key, text_ids, {stream: codes_ND[:0] for stream, codes_ND in row.items()}, grids[:0], meta)


@dataclass
class Sequence:
    """One document laid out as positions, or several, end to end.

    tokens (S,) int64, `<image>` at image positions; codes: stream -> (S, D) int64, zero at text positions;
    text_targets (S,) int64, the next token where it is text, else IGNORE; draw (S,) bool, true where the
    next position is an image position to be drawn (its codes are then those of the next position).
    """

    tokens: np.ndarray
    codes: dict[str, np.ndarray]
    text_targets: np.ndarray
    draw: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def padding(cls, length: int, depths: Mapping[str, int], special: SpecialIds) -> "Sequence":
        """Positions that hold no document: end-of-text tokens without targets. `depths`: stream -> D."""
        return cls(
            tokens=np.full(length, special.end_of_text, dtype=np.int64),
            codes={stream: np.zeros((length, depth), dtype=np.int64) for stream, depth in depths.items()},
            text_targets=np.full(length, IGNORE, dtype=np.int64),
            draw=np.zeros(length, dtype=bool),
        )

    @classmethod
    def joined(cls, sequences: "list[Sequence]") -> "Sequence":
        """Sequences of the same streams, laid end to end."""
        return cls(
            tokens=np.concatenate([sequence.tokens for sequence in sequences]),
            codes={
                stream: np.concatenate([sequence.codes[stream] for sequence in sequences])
                for stream in sequences[0].codes
            },
            text_targets=np.concatenate([sequence.text_targets for sequence in sequences]),
            draw=np.concatenate([sequence.draw for sequence in sequences]),
        )


Directions = list[bool] | tuple[bool, ...]  # of each image of a document, whether it is to be drawn


def arrange_text(
    text_ids: np.ndarray, draw_images: Directions, image: int, pair: bool, drop_caption: bool
) -> np.ndarray:
    """The order of a document's text when it is read: a pair is image-first to describe, image-last to draw."""
    if not pair:
        return text_ids
    caption = text_ids[text_ids != image]
    placeholder = np.array([image], dtype=text_ids.dtype)
    if not draw_images[0]:
        return np.concatenate([placeholder, caption])
    return placeholder if drop_caption else np.concatenate([caption, placeholder])


Count = TypeVar("Count", int, np.ndarray)


def sequence_length(text_tokens: Count, images: Count, positions: Count, dropped_caption: bool = False) -> Count:
    """Positions that a document takes, or each of many, without building it; `text_tokens` counts its T text ids."""
    text = 0 if dropped_caption else text_tokens - images
    return text + 2 * images + positions + 1


def to_sequence(doc: Document, special: SpecialIds, draw_images: Directions, drop_caption: bool = False) -> Sequence:
    """One document as a sequence of its own; the arguments are those of `lay_out`."""
    dropped = drop_caption and doc.is_pair and draw_images[0]
    length = sequence_length(len(doc.text_ids), len(doc.grids), doc.positions, dropped)
    sequence = Sequence.padding(length, doc.depths, special)
    lay_out(doc, special, draw_images, drop_caption, sequence, 0)
    return sequence


def lay_out(
    doc: Document, special: SpecialIds, draw_images: Directions, drop_caption: bool, on: Sequence, begin: int
) -> int:
    """Lay a document out as positions on the padding of `on`, from position `begin`; returns where they end.

    draw_images says for each image whether it is to be drawn (between the gen tokens, with visual targets)
    or only looked at. A pair is re-ordered by its direction; other documents keep their order.
    `drop_caption` leaves out the caption of a pair that is drawn (for classifier-free guidance).
    Every document ends in `<|endoftext|>`. Of its codes those of the streams that `on` has are taken.
    """
    if len(draw_images) != len(doc.grids):
        raise ValueError(f"document '{doc.key}': {len(draw_images)} directions for {len(doc.grids)} images")
    for stream, on_SD in on.codes.items():
        if doc.codes[stream].shape[1] != on_SD.shape[1]:
            raise ValueError(
                f"document '{doc.key}' has {doc.codes[stream].shape[1]} {stream} codes a position, not {on_SD.shape[1]}"
            )
    drop_caption = drop_caption and doc.is_pair and draw_images[0]
    text = arrange_text(doc.text_ids, draw_images, special.image, doc.is_pair, drop_caption)
    at, read, codes = begin, 0, 0  # positions laid out, text and codes used
    before_image = []  # where positions stand whose next one is an image position
    places = (text == special.image).nonzero()[0].tolist()
    for place, (rows, columns), drawn in zip(places, doc.grids.tolist(), draw_images, strict=True):
        start, size = at + place - read, rows * columns
        end = start + 1 + size
        on.tokens[at:start] = text[read:place]
        on.tokens[start] = special.image_gen_start if drawn else special.image_start
        on.tokens[start + 1 : end] = special.image
        on.tokens[end] = special.image_gen_end if drawn else special.image_end
        for stream, on_SD in on.codes.items():
            on_SD[start + 1 : end] = doc.codes[stream][codes : codes + size]
        on.draw[start : end - 1] = drawn
        before_image.append(slice(start, end - 1))
        at, read, codes = end + 1, place + 1, codes + size
    last = at + len(text) - read
    on.tokens[at:last] = text[read:]
    on.tokens[last] = special.end_of_text
    on.text_targets[begin:last] = on.tokens[begin + 1 : last + 1]
    for positions in before_image:
        on.text_targets[positions] = IGNORE
    return last + 1
