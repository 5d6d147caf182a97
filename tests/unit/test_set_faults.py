"""Sets that are not what the pipeline writes: every fault is told in one line that names the file, before training."""

import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.store import open_store
from data_pipeline.verify import find_problems
from megadual.data.dataset import PackedDataset
from megadual.data.mds_reader import ShardSet
from megadual.data.source import Source
from megadual.data.verification import verify
from megadual.errors import UserError
from megadual.run.ranks import Ranks
from megadual.streams import CAPTIONS, LENGTHS
from megadual.testing.shards import SPECIAL, STREAMS, random_conversations, random_documents, write_shard_set
from megadual.train.config import SetConfig

INDEX, MANIFEST = "index.json", "manifest.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_shard_set(tmp_path_factory.mktemp("whole") / "set", random_conversations(40), shard_bytes=2048)


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "set")


class Unpickled:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def edited(name, change):
    """The file with its JSON changed: `change` alters it, or gives another."""

    def edit(root):
        value = json.loads((root / name).read_text())
        new = change(value)
        (root / name).write_text(json.dumps(value if new is None else new))

    return edit


def index(**changes):
    """Of the set's second shard, with values replaced; of `raw_data` those that are not the shard's own."""

    def change(value):
        shard = value["shards"][1]
        for key, new in changes.items():
            (shard if key in shard else shard["raw_data"])[key] = new

    return INDEX, edited(INDEX, change)


def hashes(to):
    return INDEX, edited(INDEX, setting("shards", 1, "raw_data", "hashes", to=to))


def manifest(change):
    return MANIFEST, edited(MANIFEST, change)


def without(*keys):
    def change(value):
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def setting(*keys, to):
    def change(value):
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


def replaced(name, content):
    return name, lambda root: (root / name).write_bytes(content)


def numbers(name, change):
    """An .npy file's numbers, changed."""

    def edit(root):
        file = root / "part" / name
        array = np.load(file)
        new = change(array)
        np.save(file, array if new is None else new, allow_pickle=True)

    return name, edit


def place(name, at, to):
    return numbers(name, lambda array: array.__setitem__(at, to))


def in_file(name, change):
    def edit(root):
        file = root / "part" / name
        file.write_bytes(change(file.read_bytes()))

    return name, edit


def zipped(root):
    with open(root / "part" / LENGTHS, "wb") as file:
        np.savez(file, np.zeros(3))


def a_folder(root):
    (root / "part" / LENGTHS).unlink()
    (root / "part" / LENGTHS).mkdir()


def duplicate(value):
    value["shards"][1]["raw_data"] = value["shards"][0]["raw_data"]


def another_column(value):
    value["shards"][1]["column_names"][3], value["shards"][1]["column_names"][4] = "b", "a"


def moved(value):
    for shard, more in zip(value["shards"], (1, -1), strict=False):
        shard["samples"] += more


HUGE_SHAPE = b"(9223372036854775807, 7), }"
FILES = ("shards", 0, "files")
FAULTS = {
    "index cut off": replaced(INDEX, b'{"version": 2, "shards": ['),
    "index empty": replaced(INDEX, b""),
    "index not text": replaced(INDEX, b"\xff\xfe\x00"),
    "index nested deeply": replaced(INDEX, b"[" * 100_000),
    "index a list": (INDEX, edited(INDEX, lambda value: value["shards"])),
    "index without shards": (INDEX, edited(INDEX, without("shards"))),
    "index of a later version": (INDEX, edited(INDEX, setting("version", to=3))),
    "shards a dict": (INDEX, edited(INDEX, setting("shards", to={}))),
    "shard a list": (INDEX, edited(INDEX, setting("shards", 1, to=[]))),
    "shard twice": (INDEX, edited(INDEX, duplicate)),
    "shard without its file": (INDEX, edited(INDEX, without("shards", 1, "raw_data"))),
    "shard of other columns": (INDEX, edited(INDEX, another_column)),
    "documents moved": ("shard.00000.mds", edited(INDEX, moved)),
    "out of the set": index(basename="../../etc/passwd"),
    "out of the set within": index(basename="part/../../set/part/shard.00001.mds"),
    "absolute": index(basename="/etc/passwd"),
    "NUL": index(basename="part/shard\0"),
    "name a number": index(basename=7),
    "name empty": index(basename=""),
    "count below 0": index(samples=-1),
    "count a text": index(samples="3"),
    "count a float": index(samples=3.0),
    "count a truth": index(samples=True),
    "count huge": index(samples=10**30),
    "count more than the bytes": index(samples=10**9),
    "size below 0": index(bytes=-5),
    "size huge": ("shard.00001.mds", index(bytes=10**15)[1]),
    "columns a dict": index(column_names={}),
    "columns numbers": index(column_names=[1] * 8),
    "encodings too few": index(column_encodings=["str"]),
    "compressed": index(compression="zstd"),
    "hash no hash": hashes({"sha256": "../x"}),
    "hashes a list": hashes(["sha256"]),
    "hash of another file": hashes({"sha256": "0" * 64}),
    "manifest cut off": replaced(MANIFEST, b'{"format": 1'),
    "manifest a list": replaced(MANIFEST, b"[]"),
    "manifest without documents": manifest(without("documents")),
    "documents below 0": manifest(setting("documents", to=-40)),
    "other documents": manifest(setting("documents", to=41)),
    "tokenizer a list": manifest(setting("dualtoken", to=[])),
    "tokenizer without fingerprint": manifest(without("text_tokenizer", "fingerprint")),
    "fingerprint a number": manifest(setting("dualtoken", "fingerprint", to=1)),
    "listed shards a dict": manifest(setting("shards", to={"part": []})),
    "folder out of the set": manifest(setting("shards", 0, "folder", to="..")),
    "folder twice": manifest(lambda value: value["shards"].append(value["shards"][0])),
    "file out of the set": manifest(setting(*FILES, 0, "file", to="../shard.00000.mds")),
    "file twice": manifest(setting(*FILES, 0, "file", to="shard.00001.mds")),
    "file not listed": manifest(without(*FILES, 0)),
    "file listed that is not there": manifest(setting(*FILES, 0, "file", to="shard.00099.mds")),
    "listed hash a number": manifest(setting(*FILES, 0, "sha256", to=0)),
    "lengths objects": numbers(LENGTHS, lambda array: np.array([Unpickled()], dtype=object)),
    "lengths a pickle": in_file(LENGTHS, lambda data: pickle.dumps(Unpickled())),
    "lengths a zip": (LENGTHS, zipped),
    "lengths floats": numbers(LENGTHS, lambda array: array.astype(np.float32)),
    "lengths of 8 bytes": numbers(LENGTHS, lambda array: array.astype(np.int64)),
    "lengths of another byte order": numbers(LENGTHS, lambda array: array.astype(">i4")),
    "lengths columns first": numbers(LENGTHS, np.asfortranarray),
    "lengths of one axis": numbers(LENGTHS, np.ravel),
    "lengths too many": numbers(LENGTHS, lambda array: np.concatenate([array, array[:1]])),
    "lengths below 0": place(LENGTHS, (3, 0), -1),
    "lengths huge": place(LENGTHS, (3, 2), 2**31 - 1),
    "lengths more than the shards' bytes": place(LENGTHS, (3, 2), 10**6),
    "more images than text": place(LENGTHS, (3, 1), 9),
    "captions without an image": place(LENGTHS, (1, 6), 5),
    "lengths cut off": in_file(LENGTHS, lambda data: data[:-3]),
    "lengths with more behind": in_file(LENGTHS, lambda data: data + b"more"),
    "lengths' header cut off": in_file(LENGTHS, lambda data: data[:40]),
    "lengths' header of no end": in_file(LENGTHS, lambda data: data.replace(b"(40, 7), }" + b" " * 17, HUGE_SHAPE)),
    "lengths empty": in_file(LENGTHS, lambda data: b""),
    "lengths a folder": (LENGTHS, a_folder),
    "captions missing": (CAPTIONS, lambda root: (root / "part" / CAPTIONS).unlink()),
    "captions objects": numbers(CAPTIONS, lambda array: np.array([Unpickled()] * len(array), dtype=object)),
    "captions below 0": place(CAPTIONS, 2, -1),
    "captions longer than noted": place(CAPTIONS, 2, 5),
    "captions too few": numbers(CAPTIONS, lambda array: array[1:]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_line_that_names_the_file(root, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ShardSet(root)
    file, cause = FAULTS[fault]
    cause(root)
    with pytest.raises(UserError, match=file) as told:
        ShardSet(root)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("marker", [b"", b"{", b"[]", b"{}", b"\xff", b'{"samples": "many"}'])
def test_a_damaged_marker_is_told(root, marker):
    (root / "part/_SUCCESS").write_bytes(marker)
    with pytest.raises(UserError, match="_SUCCESS of '.*set' is not"):
        find_problems(open_store(str(root)))


def row_of(documents, folder, **settings):
    """The first row of a set of these documents, read for a model of 256 text ids and STREAMS."""
    shards = ShardSet(write_shard_set(folder, documents, shard_bytes=2048), [stream.name for stream in STREAMS])
    source = Source(shards, SetConfig(str(folder)), [], list(STREAMS), 256)
    return [batch for s in range(4) for batch in PackedDataset([source], SPECIAL, 512, 2, 2, 0).step(s)]


DAMAGES = {
    "text id": (lambda d: d.text_ids.__setitem__(-1, 256), "text_ids has the value 256, the model has 256"),
    "text id far out": (lambda d: d.text_ids.__setitem__(-1, 2**32 - 1), "text_ids has the value 4,294,967,295"),
    "code": (lambda d: d.codes["pixel"].__setitem__((5, 1), 64), "pixel has the value 64, the model has 64"),
    "code far out": (lambda d: d.codes["semantic"].__setitem__((0, 0), 65535), "semantic has the value 65,535"),
    "use": (lambda d: d.image_use.__setitem__(0, 8), "image_use has the unknown value 8"),
    "no use": (lambda d: d.image_use.__setitem__(0, 4), "image_use has the unknown value 4"),
    "role": (lambda d: d.turns.__setitem__((0, 1), 6), "unknown role 6"),
    "bits": (lambda d: d.turns.__setitem__((0, 2), 9), "unknown bits 9"),
    "end": (lambda d: d.turns.__setitem__((0, 0), 99), "turns end at .99"),
    "grid": (lambda d: d.grids.__setitem__((0, 0), 3), "the grids say 9 positions"),
    "turns of one axis": (lambda d: setattr(d, "turns", d.turns.ravel()), "other axes"),
    "uses of two axes": (lambda d: setattr(d, "image_use", d.image_use.reshape(1, 1)), "other axes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_document_is_named_and_never_trained(tmp_path, damage):
    documents = random_documents(60, seed=3)
    row_of(documents, tmp_path / "sound")
    change, told = DAMAGES[damage]
    lengths = [document.lengths(SPECIAL) for document in documents]
    change(documents[20])
    documents[20].lengths = lambda marks: lengths[20]  # as was noted before the damage
    with pytest.raises(UserError, match=rf"part/shard.0\d*.mds', its document \d.*random-3/000020.*{told}") as error:
        row_of(documents, tmp_path / "set")
    assert "\n" not in str(error.value)


def test_a_document_longer_than_noted_is_named(root):
    noted = np.load(root / "part" / LENGTHS)
    noted[::4, 0] -= 5  # text ids of conversations
    np.save(root / "part" / LENGTHS, noted)
    source = Source(ShardSet(root), SetConfig(str(root)))
    data = PackedDataset([source], SPECIAL, 64, 1, 1, 0)
    with pytest.raises(UserError, match="part/shard.*its document .*lengths.npy"):
        for s in range(30):
            data.step(s)


class OneOfTwo(Ranks):
    """A rank that hears of no other."""

    def gather(self, value):
        return [value]


def test_verify_finds_the_file_whose_bytes_have_changed(root):
    cpu, beats = torch.device("cpu"), itertools.count()
    files = len(list(root.glob("part/*.mds"))) + 2
    assert verify([ShardSet(root)] * 2, Ranks(0, 1, cpu), lambda: next(beats)) == 2 * files and next(beats) > 0
    shard = sorted(root.glob("part/*.mds"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # in the last document's meta, which training does not even read
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"data.verify: .*part/{shard.name}: its SHA-256 is"):
        verify([ShardSet(root)], Ranks(0, 1, cpu), lambda: None)
    found = 0
    for rank in (0, 1):
        try:
            verify([ShardSet(root)], OneOfTwo(rank, 2, cpu), lambda: None)
        except UserError:
            found += 1
    assert found == 1  # each hashes its own share
