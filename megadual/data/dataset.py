"""The trainer's batches: which rows a data-parallel rank reads at a step, laid out as tensors.

Shape suffixes: T flattened positions of a micro-batch (rows x seq_len), D code depth of a stream, n documents.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch

from megadual.data.dealing import deal
from megadual.data.layout import IGNORE, Sequence, lay_out
from megadual.data.packing import PackedRows, Piece
from megadual.data.source import Source
from megadual.errors import UserError
from megadual.streams import LENGTHS, Marks, SpecialIds


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
    predicts_codes_at = np.flatnonzero(sequence.draw)
    arrays = {
        "tokens": sequence.tokens,
        "positions": np.arange(ends[-1]) - np.repeat(ends[:-1], lengths),
        "cu_seqlens": ends.astype(np.int32),
        "text_targets": sequence.text_targets,
        "image_at": np.flatnonzero(sequence.tokens == special.image),
        "predicts_text_at": np.flatnonzero(sequence.text_targets != IGNORE),
        "predicts_codes_at": predicts_codes_at,
    }
    drawn = predicts_codes_at + 1
    return MicroBatch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        codes={stream: torch.from_numpy(codes) for stream, codes in sequence.codes.items()},
        draw_targets={stream: torch.from_numpy(codes[drawn]) for stream, codes in sequence.codes.items()},
        keys=[key for key in keys if key],
        lengths=[length for length, key in zip(lengths, keys, strict=True) if key],
        longest=max(lengths),
    )


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
        start, size = self.rows_before(s), self.micro_batch_size
        rows = [self.rows[start + r] for r in range(self.rows_per_step)]
        own = rows
        if self.dp_size > 1:
            own = [rows[r] for r in deal([self._drawn(row) for row in rows], self.dp_size)[self.dp_rank]]
        return [self._read(own[i : i + size]) for i in range(0, len(own), size)]

    def _drawn(self, row: list[Piece]) -> float:
        """About how many of a row's positions are drawn."""
        images = [(sum(piece.reading.draw) / max(len(piece.reading.draw), 1), piece) for piece in row]
        return sum(share * int(self.sets[piece.set].lengths.positions[piece.document]) for share, piece in images)

    def row_of(self, index: int, k: int) -> MicroBatch:
        """Row k of those of the set number `index`."""
        return self._read([self.rows.sets[index][k]])

    def iterate(self, start_step: int = 0) -> Iterator[tuple[list[MicroBatch], dict]]:
        """Steps from `start_step` on, each read one step ahead in a thread, and the position after each."""

        def read(s: int) -> tuple[list[MicroBatch], dict]:
            return self.step(s), self.rows.position(self.rows_before(s + 1))

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as reader:
            ahead = reader.submit(read, start_step)
            while True:
                start_step += 1
                ready, ahead = ahead.result(), reader.submit(read, start_step)
                yield ready

    def _read(self, rows: list[list[Piece]]) -> MicroBatch:
        marks, keys, lengths = self.marks, [], []
        whole: Sequence | None = None
        for i, row in enumerate(rows):
            begin = end = i * self.seq_len
            for piece in row:
                document = self.sets[piece.set][piece.document]
                if whole is None:
                    whole = Sequence.padding(len(rows) * self.seq_len, document.depths, marks)
                try:
                    document.check(marks)
                    end = lay_out(document, marks, piece.reading, whole, begin)
                    if end > (i + 1) * self.seq_len:
                        raise ValueError(f"document '{document.key}' is longer than its folder's {LENGTHS} says")
                except ValueError as error:
                    raise UserError(f"shard set '{self.sets[piece.set].root}': {error}") from error
                keys.append(document.key)
                lengths.append(end - begin)
                begin = end
            if rest := (i + 1) * self.seq_len - end:
                keys.append("")
                lengths.append(rest)
        assert whole is not None  # a row has a document
        return _micro_batch(whole, lengths, marks, keys)
