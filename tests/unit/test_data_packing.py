"""Packing and batching: every document once per epoch, the same rows however they are read."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from megadual.data import packing
from megadual.data.dataset import PackedDataset
from megadual.data.layout import IGNORE, Reading, to_sequence
from megadual.data.mds_reader import ShardSet
from megadual.data.packing import PackedRows, fill_rows, is_position
from megadual.data.source import Source
from megadual.errors import UserError
from megadual.streams import Role, Stream
from megadual.testing.shards import SPECIAL, random_conversations, random_documents, write_shard_set
from megadual.train.config import SetConfig

SEQ = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shard_set(tmp_path_factory.mktemp("data") / "set", random_documents(500))


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    return write_shard_set(tmp_path_factory.mktemp("data") / "small", random_documents(60, seed=9, images=(1, 2)))


def source(root, streams=None, prompts=(), **settings):
    return Source(ShardSet(root, streams), SetConfig(str(root), **settings), list(prompts))


def rows_of(*roots, weights=None, seed=0, seq_len=SEQ, **settings):
    weights = weights or [None] * len(roots)
    sources = [source(root, weight=weight, **settings) for root, weight in zip(roots, weights, strict=True)]
    return PackedRows(sources, SPECIAL, seq_len, seed)


def dataset(root, micro=1, rows=4, rank=0, ranks=1, seed=0, **settings):
    return PackedDataset([source(root, **settings)], SPECIAL, SEQ, micro, rows, seed, rank, ranks)


def epoch(rows):
    """The rows of the first epoch of a single set."""
    rows[0]
    while len(rows.sets[0].ends) < rows.sets[0].windows:
        rows[rows.sets[0].ends[-1]]
    return [rows[r] for r in range(rows.sets[0].ends[rows.sets[0].windows - 1])]


def test_rows_take_what_fills_them_best():
    assert fill_rows(np.array([5, 4, 6, 2, 3, 10]), 10) == [[0, 3, 4], [1, 2], [5]]
    lengths = np.random.default_rng(0).integers(40, 90, 3000)
    rows = fill_rows(lengths, 512)
    assert sorted(sum(rows, [])) == list(range(3000)) and max(lengths[row].sum() for row in rows) <= 512
    assert len(rows) == -(-lengths.sum() // 512)  # no more rows than there have to be


@pytest.mark.parametrize("window", [64, 8192])
def test_an_epoch_reads_every_document_once(root, monkeypatch, window):
    monkeypatch.setattr(packing, "WINDOW", window)
    rows = rows_of(root)
    first = epoch(rows)
    assert Counter(piece.document for row in first for piece in row) == Counter(range(500))
    second = [rows[r] for r in range(len(first), 2 * len(first))]
    if window < 500:  # the epochs' first windows hold other documents
        begin, again = ({piece.document for row in part[:6] for piece in row} for part in (first, second))
        assert len(begin & again) < len(begin) / 2


def test_fill_of_short_documents(root):
    data = dataset(root, rows=1)
    rows = len(epoch(data.rows))
    filled = sum(data.step(s)[0].filled for s in range(rows))
    assert data.fill == pytest.approx(filled / (rows * SEQ)) and data.fill >= 0.97


def test_directions_follow_the_rule(root):
    pieces = list(itertools.chain(*epoch(rows_of(root, draw=0.3, caption_dropout=0.25))))
    drawn = [piece for piece in pieces if piece.reading.draw[0]]
    assert 0.24 < len(drawn) / len(pieces) < 0.36
    assert 0.15 < sum(piece.reading.drop_text for piece in drawn) / len(drawn) < 0.35
    assert not any(piece.reading.drop_text for piece in pieces if not piece.reading.draw[0])
    assert all(not any(piece.reading.draw) for piece in itertools.chain(*epoch(rows_of(root, draw=0.0))))


def test_only_drawn_pairs_lose_their_caption(small_root):
    pieces = list(itertools.chain(*epoch(rows_of(small_root, draw=1.0, caption_dropout=1.0))))
    assert {len(piece.reading.draw) for piece in pieces} == {1, 2}
    assert all(piece.reading.drop_text == (len(piece.reading.draw) == 1) for piece in pieces)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Conversations, edits and pairs of three captions; and the documents."""
    documents = random_conversations(400, seed=5)
    return write_shard_set(tmp_path_factory.mktemp("data") / "talks", documents), documents


PROMPTS = [(70, 71, 72), (80,)]


@pytest.mark.parametrize("settings", [
    {}, {"captions": "all", "draw": 0.2}, {"prompts": PROMPTS, "draw": 0.3}, {"loss": "full"},
    {"text_dropout": 0.3, "image_dropout": 0.3, "both_dropout": 0.4, "caption_dropout": 0.5},
])  # fmt: skip
def test_what_a_document_takes_is_known_before_it_is_read(talks, settings):
    """Rows are cut by noted lengths; each document takes as many, however it is read."""
    root, documents = talks
    rows = PackedRows([source(root, **settings)], SPECIAL, SEQ, 0)
    pieces = list(itertools.chain(*epoch(rows)))
    lengths = [len(to_sequence(documents[piece.document], SPECIAL, piece.reading)) for piece in pieces]
    assert sum(lengths) == rows.sets[0].filled
    assert all(piece.reading.loss == settings.get("loss", "assistant") for piece in pieces)


def test_of_several_captions_one_an_epoch_or_all(talks):
    root, documents = talks
    pairs = {i for i, document in enumerate(documents) if document.is_pair}
    first = list(itertools.chain(*epoch(rows_of(root))))
    chosen = [(piece.document, piece.reading.caption) for piece in first if piece.document in pairs]
    assert sorted(document for document, _ in chosen) == sorted(pairs)
    assert {caption for _, caption in chosen} == {0, 1, 2}
    rows = rows_of(root)
    begin = len(epoch(rows))
    second = [(p.document, p.reading.caption) for r in range(begin, 2 * begin) for p in rows[r] if p.document in pairs]
    assert len(set(chosen) & set(second)) < len(pairs) / 2  # another one in the next epoch
    every = itertools.chain(*epoch(rows_of(root, captions="all")))
    found = Counter((piece.document, piece.reading.caption) for piece in every if piece.document in pairs)
    assert found == Counter((document, caption) for document in pairs for caption in range(3))
    (caption,) = {tuple(each) for each in [documents[3].captions()[2].tolist()]}
    read = to_sequence(documents[3], SPECIAL, Reading((False,), caption=2)).tokens.tolist()
    assert tuple(read[-1 - len(caption) : -1]) == caption


def test_edits_lose_their_instruction_or_source(talks):
    root, documents = talks
    settings = dict(text_dropout=0.2, image_dropout=0.3, both_dropout=0.1, caption_dropout=0.0)
    pieces = list(itertools.chain(*epoch(rows_of(root, **settings))))
    edits = [piece for piece in pieces if piece.document % 4 == 1]
    found = Counter((piece.reading.drop_text, piece.reading.drop_image) for piece in edits)
    shares = {(True, False): 0.2, (False, True): 0.3, (True, True): 0.1, (False, False): 0.4}
    for kind, share in shares.items():
        assert found[kind] / len(edits) == pytest.approx(share, abs=0.11)
    others = [piece.reading for piece in pieces if piece.document % 4 in (0, 3)]  # nothing of theirs may be dropped
    assert not any(reading.drop_text or reading.drop_image for reading in others)
    edit = documents[1]
    whole, bare = (to_sequence(edit, SPECIAL, Reading((False, True), gone, gone)).tokens.tolist() for gone in (0, 1))
    user, assistant = (SPECIAL.headers[role].tolist() for role in (Role.USER, Role.ASSISTANT))
    end = [SPECIAL.im_end, SPECIAL.newline.item()]
    target = [SPECIAL.image_gen_start, *[SPECIAL.image] * 6, SPECIAL.image_gen_end]
    assert bare == [*user, *end, *assistant, *target, *end, SPECIAL.end_of_text]
    assert whole[3] == SPECIAL.image_start and whole[-len(bare) + 5 :] == bare[5:]


def test_described_pairs_are_asked(root):
    pieces = list(itertools.chain(*epoch(rows_of(root, draw=0.3, prompts=PROMPTS))))
    assert all((piece.reading.prompt is None) == piece.reading.draw[0] for piece in pieces)
    assert {piece.reading.prompt for piece in pieces} == {None, *PROMPTS}
    (document,) = random_documents(1, grid=(1, 2), caption=(2, 2))
    document.text_ids[1:] = (60, 61)
    s, user, assistant = SPECIAL, SPECIAL.headers[Role.USER].tolist(), SPECIAL.headers[Role.ASSISTANT].tolist()
    read = to_sequence(document, SPECIAL, Reading((False,), prompt=(70, 71)))
    end = [s.im_end, s.newline.item()]
    asked = [*user, s.image_start, s.image, s.image, s.image_end, 70, 71, *end, *assistant]
    assert read.tokens.tolist() == [*asked, 60, 61, *end, s.end_of_text]
    targets = [IGNORE] * (len(asked) - 1) + [60, 61, s.im_end, IGNORE, IGNORE, IGNORE]
    assert read.text_targets.tolist() == targets


def test_too_long_documents_are_left_out_and_counted(tmp_path):
    long = random_documents(7, seed=3, grid=(12, 12))
    data = dataset(write_shard_set(tmp_path / "set", random_documents(100) + long))
    assert data.dropped == 7
    assert max(piece.document for row in epoch(data.rows) for piece in row) < 100
    with pytest.raises(UserError, match="longer than train.seq_len 128.*shortest"):
        dataset(write_shard_set(tmp_path / "long", long))


def test_random_access_restart_and_seed(root):
    rows = rows_of(root)
    straight = [rows[r] for r in range(200)]
    resumed = rows_of(root)
    assert [resumed[r] for r in range(137, 200)] == straight[137:]
    assert [resumed[r] for r in (150, 3, 199, 0)] == [straight[r] for r in (150, 3, 199, 0)]
    assert [rows_of(root, seed=1)[r] for r in range(20)] != straight[:20]


def test_a_position_is_gone_on_from_without_packing_what_is_before(root, small_root, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 64)
    straight = rows_of(root, small_root)
    for r in (0, 700, 1023, 1024, 2600):  # within and at the ends of windows, epochs and mixed blocks
        expected = [straight[k] for k in range(r, r + 40)]
        resumed = rows_of(root, small_root)
        position = json.loads(json.dumps(straight.position(r)))
        assert is_position(position) and resumed.resume(position)
        assert [resumed[k] for k in range(r, r + 40)] == expected
        assert sum(len(rows.ends) for rows in resumed.sets) <= 12  # of hundreds
        assert resumed[5] == straight[5]
    assert 0 < resumed.fill <= 1
    for other in (rows_of(root), rows_of(root, small_root, seed=1), rows_of(root, small_root, weights=[1.0, 1.0])):
        assert not other.resume(straight.position(700))


def test_mixing_holds_the_shares(root, small_root):
    rows = rows_of(root, small_root, weights=[3.0, 1.0])
    taken = [rows[r][0].set for r in range(1024 + 200)]
    assert abs(sum(taken[:1024]) - 256) <= 1
    assert [rows_of(root, small_root, weights=[3.0, 1.0])[r] for r in range(1000, 1100)] == [
        rows[r] for r in range(1000, 1100)
    ]
    per_set = [row for r in range(1024) if (row := rows[r])[0].set == 1]
    counts = Counter(piece.document for row in per_set for piece in row)
    assert set(counts) == set(range(60)) and max(counts.values()) - min(counts.values()) <= 1 + len(per_set) // 100


@pytest.mark.parametrize("ranks, micro", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_together_read_the_same_rows(root, ranks, micro):
    def rows_in(batches):
        """What each row holds, in an order that does not depend on who reads it."""
        rows = []
        for batch in batches:
            tensors = [batch.tokens, batch.positions, batch.text_targets, batch.codes["semantic"], batch.codes["pixel"]]
            rows += zip(*([row.tolist() for row in tensor.split(SEQ)] for tensor in tensors), strict=True)
        return sorted(rows)

    whole = dataset(root, rows=4)
    parts = [dataset(root, micro=micro, rows=4, rank=rank, ranks=ranks) for rank in range(ranks)]
    for s in (0, 7, 3):
        expected = whole.step(s)
        got = [batch for part in parts for batch in part.step(s)]
        assert len(got) == 4 // micro
        assert sorted(key for batch in expected for key in batch.keys) == sorted(
            key for batch in got for key in batch.keys
        )
        assert rows_in(expected) == rows_in(got)


def test_rows_that_do_not_divide_are_refused(root):
    with pytest.raises(UserError, match=r"6 rows per step .*micro_batch_size\(2\) x data-parallel\(2\)"):
        dataset(root, micro=2, rows=6, ranks=2)


def test_iterate_reads_ahead_the_same_steps(root):
    data = dataset(root)
    steps = dataset(root).iterate(5)
    for s, (batches, position) in zip(range(5, 9), steps, strict=False):
        assert position["row"] == 4 * (s + 1)
        for got, expected in zip(batches, data.step(s), strict=True):
            assert torch.equal(got.tokens, expected.tokens) and got.keys == expected.keys
    steps.close()


def test_a_batch_is_its_documents_laid_end_to_end(root):
    data = dataset(root, micro=2, rows=2)
    (batch,) = data.step(3)
    pieces = data.rows[6] + data.rows[7]
    starts, documents = batch.cu_seqlens.tolist(), iter(pieces)
    draw = torch.zeros(2 * SEQ, dtype=torch.bool)
    draw[batch.predicts_codes_at + 1] = True
    assert batch.image_at.tolist() == (batch.tokens == SPECIAL.image).nonzero().flatten().tolist()
    assert batch.predicts_text_at.tolist() == (batch.text_targets != IGNORE).nonzero().flatten().tolist()
    assert starts[0] == 0 and starts[-1] == 2 * SEQ == len(batch.tokens)
    filled = 0
    for start, end in itertools.pairwise(starts):
        part = slice(start, end)
        assert batch.positions[part].tolist() == list(range(end - start))
        if batch.tokens[start] == SPECIAL.end_of_text:  # the tail of a row
            assert (batch.tokens[part] == SPECIAL.end_of_text).all() and end % SEQ == 0
            assert (batch.text_targets[part] == IGNORE).all() and not draw[part].any()
            continue
        piece = next(documents)
        sequence = to_sequence(data.sets[0][piece.document], SPECIAL, piece.reading)
        for found, expected in (
            (batch.tokens, sequence.tokens), (batch.text_targets, sequence.text_targets), (draw, sequence.draw_loss),
        ):  # fmt: skip
            np.testing.assert_array_equal(found[part].numpy(), expected)
        for stream, codes in sequence.codes.items():
            np.testing.assert_array_equal(batch.codes[stream][part].numpy(), codes)
        filled += end - start
    assert next(documents, None) is None and batch.filled == filled


def test_sets_of_other_depths_do_not_mix(root, tmp_path):
    deeper = write_shard_set(tmp_path / "deeper", random_documents(500, streams=[Stream("semantic", 3, 64, 8)]))
    data = PackedDataset([source(root, ["semantic"]), source(deeper)], SPECIAL, SEQ, 8, 8, 0)
    with pytest.raises(UserError, match="'random-0/.*' has [23] semantic codes a position, not [23]"):
        data.step(0)


def test_another_batch_size_goes_on_at_the_same_row(root):
    """Resumed with larger steps, no document is left out and none read twice."""
    first, resumed = dataset(root, rows=4), dataset(root, rows=12)
    *_, (_, position) = zip(range(3), first.iterate(), strict=False)
    assert resumed.resume(3, position[1])
    keys = [batch.keys for part in (map(first.step, range(3)), map(resumed.step, (3, 4))) for s in part for batch in s]
    whole = dataset(root, rows=1)
    assert keys == [whole.step(r)[0].keys for r in range(3 * 4 + 2 * 12)]
    assert resumed.rows_before(5) == 36


def test_targets_of_a_pair_in_every_direction(tmp_path):
    (document,) = random_documents(1, grid=(1, 2), caption=(2, 2))
    document.text_ids[1:] = (70, 71)
    root = write_shard_set(tmp_path / "set", [document])
    look, draw, dropped = (
        dataset(root, rows=1, draw=p, caption_dropout=d).step(0)[0] for p, d in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
    )
    n, s, no = 7, SPECIAL, IGNORE
    assert look.tokens[:n].tolist() == [s.image_start, s.image, s.image, s.image_end, 70, 71, s.end_of_text]
    assert look.text_targets[:n].tolist() == [no, no, s.image_end, 70, 71, s.end_of_text, no]
    assert look.codes["pixel"][1:3].tolist() == document.codes["pixel"].tolist() and not len(look.predicts_codes_at)
    assert draw.tokens[:n].tolist() == [70, 71, s.image_gen_start, s.image, s.image, s.image_gen_end, s.end_of_text]
    assert draw.text_targets[:n].tolist() == [71, s.image_gen_start, no, no, s.image_gen_end, s.end_of_text, no]
    assert draw.predicts_codes_at.tolist() == [2, 3]
    assert dropped.tokens[:5].tolist() == [s.image_gen_start, s.image, s.image, s.image_gen_end, s.end_of_text]
    assert dropped.predicts_codes_at.tolist() == [0, 1]
    assert (look.filled, draw.filled, dropped.filled) == (7, 7, 5)
    assert dropped.codes["semantic"][1:3].tolist() == document.codes["semantic"].tolist()


def test_a_document_that_does_not_fit_itself_is_named(tmp_path):
    (document,) = random_documents(1)
    document.text_ids[-1] = SPECIAL.image
    root = write_shard_set(tmp_path / "set", [document])
    with pytest.raises(UserError, match="random-0/000000.*2 image tokens"):
        dataset(root, rows=1).step(0)
