"""The memory-mapped reader: bitwise what was written, and refusals that name the file."""

import dataclasses
import json

import numpy as np
import pytest

from megadual.data.mds_reader import ShardSet
from megadual.errors import UserError
from megadual.streams import sequence_length, to_sequence
from megadual.testing.shards import SPECIAL, random_documents, write_shard_set


@pytest.fixture(scope="module")
def documents():
    long = random_documents(3, seed=1, grid=(20, 20), caption=(200, 400))  # shapes that need two bytes
    return random_documents(200, images=(0, 3)) + long


@pytest.fixture
def root(tmp_path, documents):
    return write_shard_set(tmp_path / "set", documents, shard_bytes=8192)


def test_documents_come_back_bitwise(root, documents):
    read = ShardSet(root)
    assert len(read) == len(documents) and len(read.shards) > 3
    for i in np.random.default_rng(0).permutation(len(documents)):
        for field in dataclasses.fields(documents[i]):
            written, back = getattr(documents[i], field.name), getattr(read[i], field.name)
            if isinstance(written, np.ndarray):
                assert written.dtype == back.dtype
                np.testing.assert_array_equal(written, back)
            else:
                assert written == back


def test_lengths_are_those_of_the_built_sequences(root, documents):
    lengths = sequence_length(*ShardSet(root).lengths)
    built = [len(to_sequence(document, SPECIAL, [True] * len(document.grids))) for document in documents]
    assert lengths.tolist() == built


def test_cut_shard_is_named(root):
    shard = sorted(root.glob("part/*.mds"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"{shard.name}.*damaged"):
        ShardSet(root)


def test_damaged_offsets_are_named(root):
    shard = sorted(root.glob("part/*.mds"))[0]
    raw = bytearray(shard.read_bytes())
    raw[8:12] = b"\xff\xff\xff\x7f"
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=f"{shard.name}.*offsets"):
        ShardSet(root)


def test_a_damaged_array_is_named(root):
    shard = sorted(root.glob("part/*.mds"))[1]
    raw = bytearray(shard.read_bytes())
    record = int.from_bytes(raw[12:16], "little")  # of document 2
    raw[record + 4 * 6] = 0xFF  # after the sizes of six columns: the first byte of the first, grids
    shard.write_bytes(raw)
    read = ShardSet(root).shards[1]
    read[1], read[3]
    with pytest.raises(UserError, match=f"{shard.name}' is damaged at its document 2.*255"):
        read[2]


def test_missing_shard_is_named(root):
    shard = sorted(root.glob("part/*.mds"))[2]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}.*does not exist"):
        ShardSet(root)


def test_unfinished_and_missing_sets_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="nowhere.*tokenize.py"):
        ShardSet(tmp_path / "nowhere")
    (root / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest.json"):
        ShardSet(root)


def test_empty_set_is_refused(root):
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    with pytest.raises(UserError, match="no documents"):
        ShardSet(root)


def test_another_tokenizer_is_refused(root):
    read = ShardSet(root)
    read.check("none", "runs/a", "none", "runs/b")
    with pytest.raises(UserError, match="dualtoken of 'random'.*'runs/a' \\(0123abc"):
        read.check("0123abc", "runs/a", "none", "runs/b")
    with pytest.raises(UserError, match="text_tokenizer of 'random'.*'runs/b'"):
        read.check("none", "runs/a", "0123abc", "runs/b")
