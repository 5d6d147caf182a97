"""How a document becomes positions of a sequence.

Shape suffixes: S positions of a sequence, D code depth of a stream.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from megadual.streams import Document, ImageUse, Marks, Role, SpecialIds, TurnBit

IGNORE = -100  # text target of a position whose next position is not text
# Plain numbers: arithmetic on flags takes longer than laying out a caption.
_LOSS, _MAY_DROP = int(TurnBit.LOSS), int(TurnBit.DROPPABLE)
_DRAWN, _EITHER, _IMAGE_MAY_DROP = int(ImageUse.DRAWN), int(ImageUse.EITHER), int(ImageUse.DROPPABLE)


@dataclass
class Sequence:
    """One document laid out as positions, or several, end to end.

    tokens (S,) int64, `<image>` at image positions; codes: stream -> (S, D) uint16, zero at text positions;
    text_loss (S,) bool, where the token is text to be predicted, from the position before; draw_loss (S,) bool, where
    an image position's codes are.
    """

    tokens: np.ndarray
    codes: dict[str, np.ndarray]
    text_loss: np.ndarray
    draw_loss: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Sequence":
        codes = {stream: codes_SD[part] for stream, codes_SD in self.codes.items()}
        return Sequence(self.tokens[part], codes, self.text_loss[part], self.draw_loss[part])

    @classmethod
    def padding(cls, length: int, depths: Mapping[str, int], special: SpecialIds) -> "Sequence":
        """Positions that hold no document: end-of-text tokens without targets. `depths`: stream -> D."""
        return cls(
            tokens=np.full(length, special.end_of_text, dtype=np.int64),
            codes={stream: np.zeros((length, depth), dtype=np.uint16) for stream, depth in depths.items()},
            text_loss=np.zeros(length, dtype=bool),
            draw_loss=np.zeros(length, dtype=bool),
        )

    @property
    def text_targets(self) -> np.ndarray:
        """(S,) int64, the next token where it is text with a loss, else IGNORE."""
        targets = np.full(len(self), IGNORE, dtype=np.int64)
        np.copyto(targets[:-1], self.tokens[1:], where=self.text_loss[1:])
        return targets

    def largest(self) -> dict[str, int]:
        """The largest text id and code of each stream, by the column of a document that it comes from."""
        return {
            "text_ids": int(self.tokens.max()),
            **{stream: int(codes.max()) for stream, codes in self.codes.items()},
        }

    @classmethod
    def joined(cls, sequences: "list[Sequence]") -> "Sequence":
        """Sequences of the same streams, laid end to end."""
        return cls(
            tokens=np.concatenate([sequence.tokens for sequence in sequences]),
            codes={
                stream: np.concatenate([sequence.codes[stream] for sequence in sequences])
                for stream in sequences[0].codes
            },
            text_loss=np.concatenate([sequence.text_loss for sequence in sequences]),
            draw_loss=np.concatenate([sequence.draw_loss for sequence in sequences]),
        )


LOSSES = ("assistant", "last_turn", "full", "none")


class Reading(NamedTuple):
    """How a document is read: everything about it that is left to chance or to the set's settings."""

    draw: tuple[bool, ...]  # of each image, whether it is drawn where its use leaves that open
    drop_text: bool = False  # leave out what may be; of a pair, its caption where the image is drawn
    drop_image: bool = False
    caption: int = 0  # which one of a pair that has several
    prompt: tuple[int, ...] | None = None  # text ids that a pair that is looked at is asked; None: no chat around it
    loss: str = "assistant"  # turns with TurnBit.LOSS; or only the `last_turn` of them, or `full`: all text; or none


class _Piece(NamedTuple):
    """Text in the order in which it is read, `<image>` for an image."""

    ids: np.ndarray
    text_loss: bool
    draw_loss: bool


def _pieces(doc: Document, marks: Marks, reading: Reading) -> tuple[list[_Piece], bool]:
    """The document in pieces that have a loss or not, and whether its end-of-text token has one."""
    full, text = reading.loss == "full", reading.loss != "none"
    if doc.is_pair:
        return _pair_pieces(doc, marks, reading, full, text)
    turns, stop = doc.turns.tolist(), np.array([marks.im_end])
    last = max((k for k, (_, _, bits) in enumerate(turns) if bits & _LOSS), default=-1)
    pieces, begin, newline = [], 0, False
    for k, (end, role, bits) in enumerate(turns):
        said, header = doc.text_ids[begin:end], marks.headers.get(role)
        if reading.drop_text and bits & _MAY_DROP:
            said = said[said == marks.image]
        learned = bool(bits & _LOSS) and (k == last or reading.loss != "last_turn")
        if newline:
            pieces.append(_Piece(marks.newline, full, False))
        if header is not None:
            pieces.append(_Piece(header, full, False))
        pieces.append(_Piece(said, full or learned and text, learned))
        if header is not None:
            pieces.append(_Piece(stop, full or learned and text, False))
        begin, newline = end, header is not None
    if newline:
        return [*pieces, _Piece(marks.newline, full, False)], full
    return pieces, pieces[-1].text_loss


def _pair_pieces(doc: Document, marks: Marks, reading: Reading, full: bool, text: bool) -> tuple[list[_Piece], bool]:
    """Image-first to describe, image-last to draw; asked for in chat form where there is a prompt."""
    several, (draw,) = len(doc.turns) > 1, reading.draw
    image, caption = doc.text_ids[:1], doc.captions()[reading.caption] if several else doc.text_ids[1:]
    if draw:
        read = [image] if reading.drop_text else [caption, image]
        return [_Piece(ids, text, True) for ids in read], text
    if reading.prompt is None:
        return [_Piece(ids, text, True) for ids in ([image, caption] if several else [doc.text_ids])], text
    user, assistant = marks.headers[Role.USER], marks.headers[Role.ASSISTANT]
    asked = np.concatenate([user, image, reading.prompt, [marks.im_end], marks.newline, assistant])
    answer = _Piece(np.append(caption, marks.im_end), text, True)
    return [_Piece(asked, full, False), answer, _Piece(marks.newline, full, False)], full


def to_sequence(doc: Document, marks: Marks, reading: Reading) -> Sequence:
    """One document as a sequence of its own; see `lay_out`."""
    sequence = Sequence.padding(doc.lengths(marks).sequence_length() + _prompted(marks, reading), doc.depths, marks)
    end = lay_out(doc, marks, reading, sequence, 0)
    return sequence[:end]


def _prompted(marks: Marks, reading: Reading) -> int:
    """Positions that a prompt adds to a pair."""
    if reading.prompt is None:
        return 0
    return len(reading.prompt) + marks.around(Role.USER) + marks.around(Role.ASSISTANT)


def lay_out(doc: Document, marks: Marks, reading: Reading, on: Sequence, begin: int) -> int:
    """Lay a document out as positions on the padding of `on`, from position `begin`; returns where they end.

    What somebody says stands between the marks of the chat template. An image that is drawn stands between the gen
    tokens, and has visual targets where its turn has a loss; one that is looked at between the others. A pair is
    re-ordered by its direction; other documents keep their order. Every document ends in `<|endoftext|>`, which has a
    loss where no speaker's turn is the last. Of its codes those of the streams that `on` has are taken.
    """
    if len(reading.draw) != len(doc.grids):
        raise ValueError(f"document '{doc.key}': {len(reading.draw)} directions for {len(doc.grids)} images")
    for stream, on_SD in on.codes.items():
        if doc.codes[stream].shape[1] != on_SD.shape[1]:
            raise ValueError(
                f"document '{doc.key}' has {doc.codes[stream].shape[1]} {stream} codes a position, not {on_SD.shape[1]}"
            )
    pieces, end_loss = _pieces(doc, marks, reading)
    text = np.concatenate([piece.ids for piece in pieces])
    places = (text == marks.image).nonzero()[0].tolist()
    images = zip(places, doc.grids.tolist(), doc.image_use.tolist(), reading.draw, strict=True)
    at, read, codes = begin, 0, 0  # positions laid out, text ids and codes used
    end = done = 0  # text ids and images of the pieces so far
    for ids, text_loss, draw_loss in pieces:
        first, end = at + end - read, end + len(ids)  # first: position of the piece, then of what follows an image
        before, done = done, bisect_left(places, end)
        for place, (rows, columns), use, draw in islice(images, done - before):
            start, size = at + place - read, rows * columns
            on.tokens[at:start] = text[read:place]
            at, read, codes = start, place + 1, codes + size
            if reading.drop_image and use & _IMAGE_MAY_DROP:
                continue
            drawn, at = draw if use & _EITHER == _EITHER else use & _DRAWN, start + size + 2
            on.tokens[start] = marks.image_gen_start if drawn else marks.image_start
            on.tokens[start + 1 : at - 1] = marks.image
            on.tokens[at - 1] = marks.image_gen_end if drawn else marks.image_end
            for stream, on_SD in on.codes.items():
                on_SD[start + 1 : at - 1] = doc.codes[stream][codes - size : codes]
            on.draw_loss[start + 1 : at - 1] = draw_loss and drawn
            on.text_loss[first : start + 1] = text_loss
            first = at - 1
        on.text_loss[first : at + end - read] = text_loss
    last = at + end - read
    on.tokens[at:last] = text[read:]
    on.tokens[last] = marks.end_of_text
    on.text_loss[last], on.text_loss[begin] = end_loss, False  # nothing is before a document
    return last + 1
