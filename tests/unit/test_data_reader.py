"""The memory-mapped reader: bitwise what was written, and refusals that name the file."""

import json

import numpy as np
import pytest

from megadual.data.layout import Reading, to_sequence
from megadual.data.mds_reader import ShardSet
from megadual.errors import UserError
from megadual.streams import LENGTHS
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
        assert_same(read[i].row(), documents[i].row())


def assert_same(row: dict, written: dict) -> None:
    assert row.keys() == written.keys()
    for name, value in written.items():
        if isinstance(value, np.ndarray):
            assert row[name].dtype == value.dtype
        np.testing.assert_array_equal(row[name], value)


def test_streams_that_are_not_asked_for_are_not_read(root, documents):
    read = ShardSet(root, ["pixel"])
    for i, document in enumerate(documents):
        written = document.row()
        del written["semantic"]
        assert_same(read[i].row(), written)
    with pytest.raises(UserError, match=r"no codes of the streams \['depth'\], only of \['pixel', 'semantic'\]"):
        ShardSet(root, ["pixel", "depth"])


def test_lengths_are_those_of_the_built_sequences(root, documents):
    lengths = ShardSet(root).lengths.sequence_length()
    built = [len(to_sequence(document, SPECIAL, Reading((True,) * len(document.grids)))) for document in documents]
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
    raw[record + 4 * 8] = 0xFF  # after the sizes of eight columns: the first byte of the first, grids
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


def test_lengths_must_be_there_and_whole(root):
    file = root / "part" / LENGTHS
    np.save(file, np.load(file)[1:])
    with pytest.raises(UserError, match="lengths.npy' holds 202 x 7 numbers where its documents need 203 x 7"):
        ShardSet(root)
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="lengths.npy' is damaged"):
        ShardSet(root)
    file.unlink()
    with pytest.raises(UserError, match="lengths.npy' does not exist.*tokenize.py"):
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
