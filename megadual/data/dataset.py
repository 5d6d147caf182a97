"""The trainer's batches: which rows a data-parallel rank reads at a step, laid out as tensors.

Shape suffixes: T flattened positions of a micro-batch (rows x seq_len), D code depth of a stream, n documents.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import NoReturn

import numpy as np
import torch

from megadual.data.contents import AGAIN
from megadual.data.dealing import deal
from megadual.data.layout import Sequence, lay_out
from megadual.data.packing import PackedRows, Piece
from megadual.data.source import Source
from megadual.errors import UserError
from megadual.streams import CAPTIONS, LENGTHS, Marks, SpecialIds

STEPS_AHEAD = 4  # whose files are fetched out of a store


@dataclass
class MicroBatch:
    """`rows` packed rows as one flat sequence; attention and positions restart at every document.

    The unused tail of a row is a document of its own: end-of-text tokens without targets.
    """

    tokens: torch.Tensor  # (T,) int64, <image> at image positions
    positions: torch.Tensor  # (T,) int64, from 0 in every document
    cu_seqlens: torch.Tensor  # (n + 1,) int32, where documents start, then T
    codes: dict[str, torch.Tensor]  # stream -> (T, D) int64, zero at text positions
    text_targets: torch.Tensor  # (T,) int64, IGNORE where the next position is not text
    image_at: torch.Tensor  # (V,) int64, where an image position is
    predicts_text_at: torch.Tensor  # (P,) int64, where the next position is text
    predicts_codes_at: torch.Tensor  # (P',) int64, where the next position is drawn: its codes are targets
    draw_targets: dict[str, torch.Tensor]  # stream -> (P', D) int64, those codes
    keys: list[str]  # of the documents, in order
    lengths: list[int]  # of the documents; what is left of T is padding
    longest: int  # of the documents and the padding
    # Set where context-parallel ranks share a micro-batch (megadual.model.context); else keys are as the positions.
    key_seqlens: torch.Tensor | None = None  # (n + 1,) int32, where the documents' keys start
    keys_at: torch.Tensor | None = None  # (S,) int64, which of all ranks' keys they are

    @property
    def filled(self) -> int:
        """Positions that are not padding."""
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> "MicroBatch":
        def moved(value):
            if isinstance(value, dict):
                return {stream: moved(tensor) for stream, tensor in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return MicroBatch(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def collate(sequences: list[Sequence], special: SpecialIds, keys: list[str]) -> MicroBatch:
    """Sequences laid end to end; `keys` are those of the ones that are documents, "" that of padding."""
    return _micro_batch(Sequence.joined(sequences), [len(sequence) for sequence in sequences], special, keys)


def _micro_batch(sequence: Sequence, lengths: list[int], special: SpecialIds, keys: list[str]) -> MicroBatch:
    """A micro-batch of what is laid out on `sequence`, parts of `lengths`."""
    ends = np.cumsum([0] + lengths)
    # Indices are found here and not on the GPU, where finding them would wait for it.
    (drawn,) = sequence.draw_loss.nonzero()
    arrays = {
        "tokens": sequence.tokens,
        "positions": np.arange(ends[-1]) - ends[:-1].repeat(lengths),
        "cu_seqlens": ends.astype(np.int32),
        "text_targets": sequence.text_targets,
        "image_at": (sequence.tokens == special.image).nonzero()[0],
        "predicts_text_at": sequence.text_loss[1:].nonzero()[0],
        "predicts_codes_at": drawn - 1,
    }
    return MicroBatch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        codes={stream: _tensor(codes) for stream, codes in sequence.codes.items()},
        draw_targets={stream: _tensor(codes.take(drawn, axis=0)) for stream, codes in sequence.codes.items()},
        keys=[key for key in keys if key],
        lengths=[length for length, key in zip(lengths, keys, strict=True) if key],
        longest=max(lengths),
    )


def _tensor(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.int64))


class PackedDataset:
    """`step(s)` are this data-parallel rank's micro-batches of step s.

    Of the `rows_per_step` rows of a step every rank takes as many, dealt by how much of them is drawn, so that any
    number of ranks sees the same rows at the same step. A step depends on nothing that was read before.
    """

    def __init__(
        self,
        sources: list[Source],
        marks: Marks,
        seq_len: int,
        micro_batch_size: int,
        rows_per_step: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        if rows_per_step % (micro_batch_size * dp_size):
            raise UserError(
                f"{rows_per_step} rows per step are not divisible by "
                f"train.micro_batch_size({micro_batch_size}) x data-parallel({dp_size})"
            )
        self.sets = [source.documents for source in sources]
        self.remote = [documents for documents in self.sets if not documents.here]
        self.depths = {stream.name: stream.depth for stream in sources[0].streams}
        sizes = {"text_ids": sources[0].text_size, **{each.name: each.codebook_size for each in sources[0].streams}}
        self.limits = {column: size for column, size in sizes.items() if size is not None}
        self.rows = PackedRows(sources, marks, seq_len, seed)
        self.seq_len, self.micro_batch_size, self.marks = seq_len, micro_batch_size, marks
        self.rows_per_step = rows_per_step
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.offset = 0  # rows that steps so far took beyond `rows_per_step` each

    @property
    def dropped(self) -> int:
        """Documents that are longer than seq_len and never read."""
        return self.rows.dropped

    @property
    def fill(self) -> float:
        """Share of positions that documents take, over the windows packed so far."""
        return self.rows.fill

    def rows_before(self, s: int) -> int:
        """Rows that steps 0 to s - 1 take, of all ranks."""
        return self.offset + s * self.rows_per_step

    def resume(self, s: int, position: dict) -> bool:
        """Let step s begin where `position` says (`iterate`), however many rows the steps before it had.

        False where the sets, their settings, the seed or seq_len have changed, so that rows are others now.
        """
        self.offset = position["row"] - s * self.rows_per_step
        return self.rows.resume(position)

    def step(self, s: int) -> list[MicroBatch]:
        rows = self._own_rows(s)
        self._expect(rows)
        return self._batches(rows)

    def _own_rows(self, s: int) -> list[list[Piece]]:
        """The rows of step s that this rank reads."""
        start = self.rows_before(s)
        rows = [self.rows[start + r] for r in range(self.rows_per_step)]
        if self.dp_size == 1:
            return rows
        return [rows[r] for r in deal([self._drawn(row) for row in rows], self.dp_size)[self.dp_rank]]

    def _batches(self, rows: list[list[Piece]]) -> list[MicroBatch]:
        size, batches = self.micro_batch_size, []
        for i in range(0, len(rows), size):
            batches.append(self._read(rows[i : i + size]))
            for documents in self.remote:
                documents.let_go()
        return batches

    def _expect(self, rows: list[list[Piece]]) -> None:
        """Have what these rows are read from fetched, where it is in a store."""
        for index, documents in enumerate(self.sets):
            if documents in self.remote:
                documents.expect(piece.document for row in rows for piece in row if piece.set == index)

    def bytes_to_fetch(self, rows: int) -> int:
        """Of the files out of stores that the first so many rows are read from."""
        pieces = [piece for r in range(rows) for piece in self.rows[r]]
        return sum(
            file.bytes
            for index, documents in enumerate(self.sets)
            if documents in self.remote
            for file in documents.files_of(piece.document for piece in pieces if piece.set == index)
        )

    def _drawn(self, row: list[Piece]) -> float:
        """About how many of a row's positions are drawn."""
        images = [(sum(piece.reading.draw) / max(len(piece.reading.draw), 1), piece) for piece in row]
        return sum(share * int(self.sets[piece.set].lengths.positions[piece.document]) for share, piece in images)

    def row_of(self, index: int, k: int) -> MicroBatch:
        """Row k of those of the set number `index`."""
        row = self.rows.sets[index][k]
        self._expect([row])
        return self._read([row])

    def iterate(self, start_step: int = 0) -> Iterator[tuple[list[MicroBatch], dict]]:
        """Steps from `start_step` on, each read one step ahead in a thread, and the position after each.

        What sets in stores need for `STEPS_AHEAD` more steps is fetched meanwhile.
        """
        known: deque[tuple[list[list[Piece]], dict]] = deque()  # steps from the next one on: rows, the position after
        more = STEPS_AHEAD if self.remote else 0

        def read(s: int) -> tuple[list[MicroBatch], dict]:
            while len(known) <= more:
                later = s + len(known)
                known.append((self._own_rows(later), self.rows.position(self.rows_before(later + 1))))
            self._expect([row for rows, _ in known for row in rows])
            rows, position = known.popleft()
            return self._batches(rows), position

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as reader:
            ahead = reader.submit(read, start_step)
            while True:
                start_step += 1
                ready, ahead = ahead.result(), reader.submit(read, start_step)
                yield ready

    def _read(self, rows: list[list[Piece]]) -> MicroBatch:
        marks, keys, lengths = self.marks, [], []
        # All are decoded before the first is laid out: one in turn with the other takes a fifth longer, since a
        # processor's caches hold the code of either.
        documents = [[self.sets[piece.set][piece.document] for piece in row] for row in rows]
        whole = Sequence.padding(len(rows) * self.seq_len, self.depths or documents[0][0].depths, marks)
        for i, row in enumerate(rows):
            begin = end = i * self.seq_len
            for piece, document in zip(row, documents[i], strict=True):
                try:
                    document.check(marks)
                    end = lay_out(document, marks, piece.reading, whole, begin)
                    if end > (i + 1) * self.seq_len:
                        raise IndexError
                except IndexError as error:
                    raise UserError(
                        f"{self._where(piece)}: not as its folder's {LENGTHS} and {CAPTIONS} say"
                    ) from error
                except TypeError as error:
                    raise UserError(
                        f"{self._where(piece)}, '{document.key}': a column has other axes ({error}); {AGAIN}"
                    ) from error
                except ValueError as error:
                    raise UserError(f"{self._where(piece)}: {error}") from error
                keys.append(document.key)
                lengths.append(end - begin)
                begin = end
            if rest := (i + 1) * self.seq_len - end:
                keys.append("")
                lengths.append(rest)
        if self.limits and self._out_of_range(whole.largest()):
            self._refuse(rows)
        return _micro_batch(whole, lengths, marks, keys)

    def _out_of_range(self, largest: dict[str, int]) -> str | None:
        """The column whose largest value the model has no vector for."""
        return next((column for column, size in self.limits.items() if largest[column] >= size), None)

    def _refuse(self, rows: list[list[Piece]]) -> NoReturn:
        """UserError that names the document, of these rows, with a value out of range.

        Looked for only when a micro-batch has one: comparing each document would take longer than reading it.
        """
        for piece in itertools.chain.from_iterable(rows):
            document = self.sets[piece.set][piece.document]
            values = {"text_ids": document.text_ids, **document.codes}
            largest = {column: int(array.max(initial=0)) for column, array in values.items()}
            if column := self._out_of_range(largest):
                raise UserError(
                    f"{self._where(piece)}, '{document.key}', is damaged: {column} has the value {largest[column]:,}, "
                    f"the model has {self.limits[column]:,}, from 0 on; {AGAIN}"
                )
        raise AssertionError("a value out of range that is in no document")

    def _where(self, piece: Piece) -> str:
        return self.sets[piece.set].where(piece.document)
