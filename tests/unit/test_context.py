"""Context parallelism without processes: the shares make up the micro-batch, and attend to what they should."""

import numpy as np
import pytest
import torch

from megadual.data.dataset import collate
from megadual.data.layout import Reading, to_sequence
from megadual.model.attention import PackedDocuments, attend_each
from megadual.model.context import context_share
from megadual.testing.shards import SPECIAL, random_documents


@pytest.fixture
def batch():
    """96 positions: three documents with images to draw, the last one cut to fit."""
    documents = random_documents(12, grid=(3, 4), images=(0, 2), caption=(5, 20))
    sequences, total = [], 0
    for document in documents:
        sequence = to_sequence(document, SPECIAL, Reading((True,) * len(document.grids)))
        if total + len(sequence) <= 96:
            sequences.append(sequence)
            total += len(sequence)
    rest = to_sequence(random_documents(1, images=(0, 0), caption=(95 - total, 95 - total))[0], SPECIAL, Reading(()))
    return collate([*sequences, rest], SPECIAL, [str(i) for i in range(len(sequences) + 1)])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_make_up_the_batch(batch, size):
    shares = [context_share(batch, rank, size) for rank in range(size)]
    width = 96 // (2 * size)
    parts = [part for rank in range(size) for part in (rank, 2 * size - 1 - rank)]
    joined = torch.cat([torch.arange(part * width, (part + 1) * width) for part in parts])  # as ranks' are gathered
    assert [len(share.tokens) for share in shares] == [96 // size] * size
    for name in ("tokens", "positions", "text_targets"):
        together = torch.cat([getattr(share, name) for share in shares])
        assert sorted(together.tolist()) == sorted(getattr(batch, name).tolist())
    for name in ("image_at", "predicts_text_at", "predicts_codes_at"):
        assert sum(len(getattr(share, name)) for share in shares) == len(getattr(batch, name)) > 0
    for share in shares:
        assert (share.text_targets[share.predicts_text_at] >= 0).all()
        assert (share.tokens[share.image_at] == SPECIAL.image).all()
        assert len(share.predicts_codes_at) - len(batch.predicts_codes_at) // size in (0, 1)
        for stream, targets in share.draw_targets.items():
            assert len(targets) == len(share.predicts_codes_at)
            for at, code in zip(share.predicts_codes_at, targets, strict=True):
                assert torch.equal(code, batch.codes[stream][joined[at] + 1])


@pytest.mark.parametrize("size", [2, 4])
def test_attention_of_the_shares_is_that_of_the_batch(batch, size):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 96, 2, 8, generator=generator)
    whole = attend_each(q, k, v, PackedDocuments(cu_seqlens_q=batch.cu_seqlens, cu_seqlens_kv=batch.cu_seqlens), 0.3)
    width = 96 // (2 * size)
    parts = [[r, 2 * size - 1 - r] for r in range(size)]
    held = [torch.cat([torch.arange(p * width, (p + 1) * width) for p in pair]) for pair in parts]
    joined = torch.cat(held)  # the order in which ranks' keys are gathered
    for rank in range(size):
        share = context_share(batch, rank, size)
        documents = PackedDocuments(cu_seqlens_q=share.cu_seqlens, cu_seqlens_kv=share.key_seqlens)
        got = attend_each(q[held[rank]], k[joined][share.keys_at], v[joined][share.keys_at], documents, 0.3)
        torch.testing.assert_close(got, whole[held[rank]])


def test_one_long_document_costs_every_rank_the_same():
    document = random_documents(1, images=(0, 0), caption=(127, 127))[0]
    batch = collate([to_sequence(document, SPECIAL, Reading(()))], SPECIAL, ["long"])
    work = []
    for rank in range(4):
        share = context_share(batch, rank, 4)
        queries, keys = np.diff(share.cu_seqlens), np.diff(share.key_seqlens)
        work.append(int((queries * keys - queries * (queries - 1) // 2).sum()))
    assert work == [128 * 129 // 2 // 4] * 4
