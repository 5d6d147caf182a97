"""Context parallelism: which positions of a micro-batch a rank holds, and which keys its queries attend to.

The T positions are cut into 2 * size equal parts, of which rank r holds parts r and 2 * size - 1 - r. A causal
document that is longer than a part so costs every rank the same attention: of contiguous shares, the last rank's
would cost it nearly twice the average. Documents within a part are attended to by one rank alone.
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
    at = torch.cat([torch.arange(start, start + width) for start in starts])
    held = [part for other in range(size) for part in _held_parts(other, size)]
    gathered = torch.empty(total, dtype=torch.int64)  # where a position's key lies once those of all ranks are joined
    gathered[torch.cat([torch.arange(part * width, (part + 1) * width) for part in held])] = torch.arange(total)

    queries, keys = [], []
    bounds = batch.cu_seqlens.tolist()
    for start in starts:
        for first, end in itertools.pairwise(bounds):
            begin, end = max(first, start), min(end, start + width)
            if begin < end:
                queries.append(end - begin)
                keys.append(gathered[first:end])

    here = torch.full((total,), -1)
    here[at] = torch.arange(len(at))

    def of_share(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = here[positions]
        return own[own >= 0], own >= 0

    draw_positions, drawn_here = of_share(batch.draw_positions)
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[at],
        positions=batch.positions[at],
        semantic=batch.semantic[at],
        pixel=batch.pixel[at],
        text_targets=batch.text_targets[at],
        image_positions=of_share(batch.image_positions)[0],
        text_positions=of_share(batch.text_positions)[0],
        draw_positions=draw_positions,
        draw_targets=batch.draw_targets[drawn_here],
        cu_seqlens=torch.tensor([0, *queries]).cumsum(0).int(),
        key_seqlens=torch.tensor([0, *map(len, keys)]).cumsum(0).int(),
        keys_at=torch.cat(keys),
    )
