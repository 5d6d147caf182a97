"""Context parallelism: which positions of a micro-batch a rank holds, and which keys its queries attend to.

The T positions are cut into 2 * size equal parts, of which rank r holds parts r and 2 * size - 1 - r. A causal
document that is longer than a part so costs every rank the same attention: of contiguous shares, the last rank's
would cost it nearly twice the average. Documents within a part are attended to by one rank alone.

How much of a rank's parts is drawn is chance. The visual heads, which cost most there, run on equally many positions on
each rank: the hidden states of all are gathered for them, in the order in which keys are.
"""

import dataclasses
import itertools

import torch

from megadual.data.dataset import MicroBatch


def _held_parts(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def context_share(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """The part of `batch`, as every context-parallel rank reads it, that rank `rank` of `size` computes."""
    if size == 1:
        return batch
    total = batch.tokens.size(0)
    width = total // (2 * size)
    starts = [part * width for part in _held_parts(rank, size)]
    held = torch.cat([torch.arange(start, start + width) for start in starts])  # positions of the batch, in our order

    joined = [part for other in range(size) for part in _held_parts(other, size)]  # as all ranks' keys are joined
    key_at = torch.empty(total, dtype=torch.int64)  # where a position's key is among those
    key_at[torch.cat([torch.arange(part * width, (part + 1) * width) for part in joined])] = torch.arange(total)

    queries, keys = [], []  # of each piece of a document that lies within one of our parts
    for start in starts:
        for first, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            piece_begin, piece_end = max(first, start), min(end, start + width)
            if piece_begin < piece_end:
                queries.append(piece_end - piece_begin)
                keys.append(key_at[first:piece_end])

    held_at = torch.full((total,), -1)  # where a position of the batch is in our share, -1 where it is not
    held_at[held] = torch.arange(len(held))

    def of_share(positions: torch.Tensor) -> torch.Tensor:
        own = held_at[positions]
        return own[own >= 0]

    drawn = len(batch.predicts_codes_at)
    own_drawn = slice(drawn * rank // size, drawn * (rank + 1) // size)
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[held],
        positions=batch.positions[held],
        codes={stream: codes_TD[held] for stream, codes_TD in batch.codes.items()},
        text_targets=batch.text_targets[held],
        image_at=of_share(batch.image_at),
        predicts_text_at=of_share(batch.predicts_text_at),
        predicts_codes_at=key_at[batch.predicts_codes_at[own_drawn]],  # among all ranks' positions
        draw_targets={stream: codes_PD[own_drawn] for stream, codes_PD in batch.draw_targets.items()},
        cu_seqlens=torch.tensor([0, *queries]).cumsum(0).int(),
        key_seqlens=torch.tensor([0, *map(len, keys)]).cumsum(0).int(),
        keys_at=torch.cat(keys),
    )
