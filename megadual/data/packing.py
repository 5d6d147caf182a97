"""Documents -> rows of exactly `seq_len` positions, as a pure function of the row's number.

No document is cut; one that is longer than a row is left out and counted. Each epoch of a set is a seeded
permutation taken in windows; within a window documents are put together so that rows are full, and the rows
are shuffled. How each document is read (`layout.Reading`) is drawn per window too: nothing but the number of
consumed rows has to be saved to go on exactly, under any number of data-parallel ranks. Which window a row is in is
known only by packing all before it, so a position also says that (`PackedRows.position`).
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from megadual.data.layout import Reading
from megadual.data.source import Source
from megadual.errors import UserError
from megadual.streams import Lengths, Marks, Role

WINDOW = 8192  # documents packed together: enough that the rows it leaves open do not matter
LOOKAHEAD = 64  # documents a row is chosen from
_MIX_BLOCK = 1024  # rows over which the shares of several sets are kept


class Piece(NamedTuple):
    """One document in a row, and how it is read."""

    set: int
    document: int
    reading: Reading


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def fill_rows(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows that hold at most `capacity`.

    Each row takes the first document that waits and, of the next LOOKAHEAD, those that fill it best: the
    subset sums that can be reached are the bits of an integer.
    """
    waiting = list(enumerate(lengths.tolist()))[::-1]
    within = (1 << capacity + 1) - 1
    rows = []
    while waiting:
        first, length = waiting.pop()
        ahead = waiting[-LOOKAHEAD:]
        reached = [1 << length]  # before each of `ahead`, and after the last
        for _, more in ahead:
            reached.append((reached[-1] | reached[-1] << more) & within)
        total, row, left = reached[-1].bit_length() - 1, [first], []
        for (document, more), before in zip(reversed(ahead), reversed(reached[:-1]), strict=True):
            if before >> total & 1:  # the total is reached without this one
                left.append((document, more))
            else:
                row.append(document)
                total -= more
        waiting[-LOOKAHEAD:] = left[::-1]
        rows.append(row)
    return rows


class _SetRows:
    """The endless rows of one set, epoch after epoch."""

    def __init__(self, source: Source, index: int, marks: Marks, seq_len: int, seed: int):
        self.index, self.seq_len, self.seed, self.config = index, seq_len, seed, source.config
        self.lengths, self.prompts = source.documents.lengths, source.prompts
        chat = marks.around(Role.USER) + marks.around(Role.ASSISTANT)
        self.prompt_lengths = np.array([chat + len(prompt) for prompt in self.prompts], dtype=np.int64)  # in positions
        captions = self.lengths.captions
        several = np.where(captions > 1, captions, 0)
        self.caption_lengths = source.documents.captions
        self.first_caption = np.cumsum(several) - several  # of each document, where its captions begin there
        # What an epoch goes through: documents, or each caption of the pairs among them.
        self.entries: tuple[np.ndarray, np.ndarray] | None = None
        if self.config.captions == "all":
            times = np.maximum(several, 1)
            documents = np.repeat(np.arange(len(times), dtype=np.int32), times)
            self.entries = documents, np.arange(len(documents)) - np.repeat(np.cumsum(times) - times, times)
        # Measured with the longest caption and prompt, so that what is left out does not change from epoch to epoch.
        self.full: np.ndarray = self.lengths.sequence_length()
        if self.prompts:
            self.full = self.full + self.prompt_lengths.max() * (captions > 0)
        if self.entries:
            self.full = self.full[self.entries[0]]
        self.kept = np.flatnonzero(self.full <= seq_len).astype(np.int32)
        if not len(self.kept):
            raise UserError(
                f"shard set '{source.documents.root}': every document is longer than train.seq_len {seq_len} "
                f"(the shortest takes {self.full.min()} positions)"
            )
        self.windows = -(-len(self.kept) // WINDOW)  # per epoch
        self.start_at(0, 0)
        self._window: tuple[int, tuple[list[list[Piece]], int]] = (-1, ([], 0))
        self._order: tuple[int, np.ndarray] = (-1, self.kept)

    def start_at(self, window: int, rows: int) -> None:
        """Start packing at a window that has `rows` rows before it."""
        self.first, self.before = window, rows
        self.ends: list[int] = []  # rows up to the end of each window from `first` on that was packed
        self.filled = 0  # positions that documents take in those

    def __getitem__(self, k: int) -> list[Piece]:
        window, before = self.window_of(k)
        rows, _ = self._pack(window)
        return rows[k - before]

    def window_of(self, k: int) -> tuple[int, int]:
        """The number of the window that holds row k, counted over epochs, and the rows before it."""
        if k < self.before:
            self.start_at(0, 0)
        while not self.ends or self.ends[-1] <= k:
            rows, filled = self._pack(self.first + len(self.ends))
            self.ends.append((self.ends[-1] if self.ends else self.before) + len(rows))
            self.filled += filled
        i = bisect_right(self.ends, k)
        return self.first + i, self.ends[i - 1] if i else self.before

    @property
    def packed(self) -> int:
        """Rows of the windows packed so far."""
        return self.ends[-1] - self.before if self.ends else 0

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, _random(self.seed, self.index, epoch).permutation(self.kept))
        return self._order[1]

    def _pack(self, number: int) -> tuple[list[list[Piece]], int]:
        if self._window[0] != number:
            self._window = (number, self._pack_window(number))
        return self._window[1]

    def _pack_window(self, number: int) -> tuple[list[list[Piece]], int]:
        """Window `number`, counted over epochs: its rows, and the positions that its documents take."""
        epoch, window = divmod(number, self.windows)
        chosen = self._epoch_order(epoch)[window * WINDOW : (window + 1) * WINDOW]
        random = _random(self.seed, self.index, epoch, 1 + window)
        documents, readings, lengths = self._choose_readings(
            chosen, random, _random(self.seed, self.index, epoch, 1 + window, 1)
        )
        rows = fill_rows(lengths, self.seq_len)
        shuffled = [
            [Piece(self.index, documents[i], readings[i]) for i in rows[r]] for r in random.permutation(len(rows))
        ]
        return shuffled, int(lengths.sum())

    def _choose_readings(
        self, chosen: np.ndarray, random: np.random.Generator, more: np.random.Generator
    ) -> tuple[list[int], list[Reading], np.ndarray]:
        """Of the entries `chosen`: the document, how it is read, and the positions that it then takes.

        `more` decides what only some sets have, so that the directions of pairs do not depend on it.
        """
        config, count = self.config, len(chosen)
        documents = chosen if self.entries is None else self.entries[0][chosen]
        lengths: Lengths[np.ndarray] = Lengths(*(column[documents] for column in self.lengths))
        is_pair, several, images = lengths.captions > 0, lengths.captions > 1, lengths.images
        positions, text = lengths.sequence_length(), lengths.text_tokens

        draw, first = random.random(images.sum()) < config.draw, np.cumsum(images) - images
        drawn_pair = is_pair.copy()
        drawn_pair[is_pair] = draw[first[is_pair]]
        drop_text = drawn_pair & (random.random(count) < config.caption_dropout)

        caption = (more.random(count) * lengths.captions).astype(np.int64)
        if self.entries is not None:
            caption = self.entries[1][chosen]
        if several.any():
            shorter = np.zeros_like(text)
            at = self.first_caption[documents[several]] + caption[several]
            shorter[several] = text[several] - 1 - self.caption_lengths[at]
            positions, text = positions - shorter, text - shorter

        share, (only_text, only_image) = more.random(count), (config.text_dropout, config.image_dropout)
        both = (share >= only_text + only_image) & (share < only_text + only_image + config.both_dropout)
        droppable_text = np.where(is_pair, text - 1, lengths.droppable_text)
        drop_text |= ~is_pair & (droppable_text > 0) & ((share < only_text) | both)
        without_image = ((share >= only_text) & (share < only_text + only_image)) | both
        drop_image = (lengths.droppable_image > 0) & without_image
        positions = positions - drop_text * droppable_text - drop_image * lengths.droppable_image

        prompts: list[tuple[int, ...] | None] = [None] * count
        if self.prompts:
            which = (more.random(count) * len(self.prompts)).astype(np.int64)
            asked = is_pair & ~drawn_pair
            positions = positions + asked * self.prompt_lengths[which]
            prompts = [self.prompts[p] if yes else None for p, yes in zip(which.tolist(), asked.tolist(), strict=True)]

        draw, ends = draw.tolist(), first + images
        readings = [
            Reading(tuple(draw[begin:end]), text_dropped, image_dropped, which_caption, prompt, config.loss)
            for begin, end, text_dropped, image_dropped, which_caption, prompt in zip(
                first.tolist(), ends.tolist(), drop_text.tolist(), drop_image.tolist(), caption.tolist(), prompts,
                strict=True,
            )
        ]  # fmt: skip
        return documents.tolist(), readings, positions


def is_position(value: Any) -> bool:
    """Whether it can be a `PackedRows.position`, of whatever sets."""
    try:
        row, order, (block, taken), windows = (value[name] for name in ("row", "order", "block", "windows"))
        numbers, before = [row, block, *taken], [rows for _, rows in windows]
        numbers += [number for pair in windows for number in pair]
    except (LookupError, TypeError, ValueError):
        return False
    if not isinstance(order, str) or any(type(number) is not int or number < 0 for number in numbers):
        return False
    in_block = row // _MIX_BLOCK == block and sum(taken) == block * _MIX_BLOCK
    # Every window has a row at least, and none is before the rows that were taken.
    packed = len(windows) == len(taken) and sum(before) <= row and all(window <= rows for window, rows in windows)
    return in_block and packed


class PackedRows:
    """The endless stream of rows over all sets: `rows[r]` are row r's pieces.

    The sets' weights are their shares of the rows; without weights in proportion to their positions, so that their
    epochs end together. A set with a larger share than that simply starts its next epoch sooner.
    """

    def __init__(self, sources: Sequence[Source], marks: Marks, seq_len: int, seed: int):
        self.seq_len, self.seed = seq_len, seed
        self.sets = [_SetRows(source, i, marks, seq_len, seed) for i, source in enumerate(sources)]
        sizes = [[len(rows.full), len(rows.kept), int(rows.full[rows.kept].sum())] for rows in self.sets]
        weights = [source.config.weight or size for source, (_, _, size) in zip(sources, sizes, strict=True)]
        self.bounds = np.cumsum(np.array(weights, dtype=np.float64) / sum(weights))[:-1]
        settings = [{**asdict(source.config), "path": "", "loss": ""} for source in sources]
        of = [seq_len, seed, self.bounds.tolist(), sizes, settings]
        self.order = hashlib.sha256(repr(of).encode()).hexdigest()[:16]  # equal where rows of one number are
        self._start_blocks(0, [0] * len(self.sets))
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitem__(self, r: int) -> list[Piece]:
        chosen = int(self._mix(r // _MIX_BLOCK)[r % _MIX_BLOCK])
        return self.sets[chosen][int(self._taken(r)[chosen])]

    def position(self, r: int) -> dict:
        """Where row r is: what `resume` needs, in plain numbers and text."""
        taken = self._taken(r)
        block = r // _MIX_BLOCK
        return {
            "row": r,
            "order": self.order,
            "block": [block, self._blocks[block - self._first].tolist()],
            "windows": [list(rows.window_of(k)) for rows, k in zip(self.sets, taken.tolist(), strict=True)],
        }

    def resume(self, position: dict) -> bool:
        """Go on from there without packing what is before it; False where it is of another order of rows."""
        if position["order"] != self.order:
            return False
        self._start_blocks(*position["block"])
        for rows, (window, before) in zip(self.sets, position["windows"], strict=True):
            rows.start_at(window, before)
        return True

    def _start_blocks(self, block: int, taken: list[int]) -> None:
        self._first, self._blocks = block, [np.array(taken)]  # rows of each set before each block from there on

    def _taken(self, r: int) -> np.ndarray:
        """(sets,) rows of each set before row r."""
        block, place = divmod(r, _MIX_BLOCK)
        if block < self._first:
            self._start_blocks(0, [0] * len(self.sets))
        while len(self._blocks) <= block - self._first:
            taken = np.bincount(self._mix(self._first + len(self._blocks) - 1), minlength=len(self.sets))
            self._blocks.append(self._blocks[-1] + taken)
        within = np.bincount(self._mix(block)[:place], minlength=len(self.sets))
        return self._blocks[block - self._first] + within

    def _mix(self, block: int) -> np.ndarray:
        """(_MIX_BLOCK,) which set each row of a block comes from: stratified, so shares hold to a row or two."""
        if self._block[0] != block:
            random = _random(self.seed, len(self.sets), 0, 0, block)
            strata = (random.permutation(_MIX_BLOCK) + random.random(_MIX_BLOCK)) / _MIX_BLOCK
            self._block = (block, np.searchsorted(self.bounds, strata, side="right"))
        return self._block[1]

    @property
    def dropped(self) -> int:
        """Documents of all sets that are longer than a row and never read."""
        return sum(len(rows.full) - len(rows.kept) for rows in self.sets)

    @property
    def fill(self) -> float:
        """Share of positions that documents take, over the windows packed so far."""
        packed = sum(rows.packed for rows in self.sets) * self.seq_len
        return sum(rows.filled for rows in self.sets) / packed if packed else 0.0
