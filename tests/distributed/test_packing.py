"""A packed row through the model is its documents, each alone."""

import pytest
import torch

from megadual.data.dataset import collate
from megadual.data.layout import to_sequence
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed
from megadual.testing.shards import SPECIAL


def packed_and_alone(run):
    """`row_and_documents` of the first rows."""
    engine, data = tiny.build(run)
    with torch.no_grad():
        found = [row_and_documents(engine.chunks[0], data, row) for row in range(4)]
    engine.shutdown()
    return found


def row_and_documents(model, data, row: int):
    """Mean losses (text, then the streams') of a row, of its documents alone; how far their hidden states differ."""
    (packed,), pieces = data.step(row), data.rows[row]
    assert len(pieces) > 1
    hidden, start, difference, alone = model.hidden_states(packed), 0, 0.0, torch.zeros(1 + len(tiny.STREAMS))
    for piece in pieces:
        document = data.sets[piece.set][piece.document]
        sequence = to_sequence(document, SPECIAL, piece.reading)
        batch = collate([sequence], SPECIAL, [document.key])
        alone += sums(model, batch)
        part = hidden[start : start + len(sequence)]
        difference = max(difference, (part - model.hidden_states(batch)).abs().max().item())
        start += len(sequence)
    drawn = max(len(packed.predicts_codes_at), 1)
    counts = torch.tensor([max(len(packed.predicts_text_at), 1), *(drawn * stream.depth for stream in tiny.STREAMS)])
    return (sums(model, packed) / counts).tolist(), (alone / counts).tolist(), difference


def sums(model, batch) -> torch.Tensor:
    losses = model(batch)
    return torch.stack([losses.text.view(()), *(losses.visual[stream.name].sum() for stream in tiny.STREAMS)])


def test_packed_documents_are_as_if_alone(tmp_path):
    shards = tiny.write_tiny_set(tmp_path / "set")
    run = tiny.tiny_run(tmp_path, shards, "train.seq_len=128", "train.global_batch_tokens=128")
    rows = run_distributed(packed_and_alone, 1, run)[0]
    assert any(packed[1] > 0 for packed, _, _ in rows)  # some are drawn
    for packed, alone, difference in rows:
        assert packed == pytest.approx(alone, abs=1e-6)
        assert difference < 1e-5
