"""Inputs that change between runs, and runs that meet on one set."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import fsspec
import pytest

from data_pipeline import run, store
from data_pipeline.config import PipelineConfig
from data_pipeline.encode import Encoder
from data_pipeline.plan import describe, make_plan
from data_pipeline.store import open_store
from megadual.config import load_config
from megadual.errors import UserError
from megadual.run.lock import RunLock
from megadual.testing.models import CAPTIONS, write_dualtoken
from megadual.testing.raw import plain_image, write_folder, write_json_lines
from megadual.text import save_text_tokenizer, train_text_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_dualtoken(folder / "dualtoken")
    save_text_tokenizer(train_text_tokenizer(CAPTIONS, 300), folder / "text_tokenizer")
    return folder


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """The same worker, in this process; locks that beat fast."""

    def encode(config: PipelineConfig, plan) -> tuple[dict, str]:
        encoder = Encoder(config, plan.identity)
        for shard in plan.todo:
            for _ in encoder.encode_shard(shard):
                pass
        return {}, "in this process"

    monkeypatch.setattr(run, "encode_todo", encode)
    monkeypatch.setattr(store, "RunLock", partial(RunLock, beat_s=0.1))


@pytest.fixture
def config(tokenizers, tmp_path):
    """Two inputs, of which the second names an image."""
    (tmp_path / "in").mkdir()
    write_json_lines(tmp_path / "in" / "a.jsonl", ["one", "two"])
    (tmp_path / "in" / "b.jsonl").write_text('{"image": "1.png", "caption": "x"}\n{"text": "y"}\n')
    write_folder(tmp_path / "images", {"1.png": plain_image(1)})

    def make(*overrides: str) -> PipelineConfig:
        return load_config(PipelineConfig, None, [
            f"inputs=[{tmp_path}/in/*.jsonl]", f"output={tmp_path}/set", f"dualtoken={tokenizers}/dualtoken",
            f"text_tokenizer={tokenizers}/text_tokenizer", f"read.image_root={tmp_path}/images", *overrides,
        ])  # fmt: skip

    return make


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_changed_input_is_told_and_read_again_where_asked(config, tmp_path, monkeypatch):
    """Of the same size even; the set is then byte for byte what a first run makes."""
    run.tokenize(config())
    old = hashes(tmp_path / "set")
    write_json_lines(tmp_path / "in" / "a.jsonl", ["one", "TWO"])

    with pytest.raises(UserError, match=r"1 input has changed .*a.jsonl': its content is another\); changed=redo"):
        run.tokenize(config())
    said = describe(config("changed=redo"), make_plan(config("changed=redo")))
    assert "1 input has changed since" in said and "2 input shards, 1 to do" in said
    assert "to do: text (changed: its content is another)" in said
    run.tokenize(config("changed=keep"))
    assert hashes(tmp_path / "set") == old

    encode, seen = run.encode_todo, []

    def watched(config, plan):
        seen.append(({path for path in hashes(tmp_path / "set") if "/" not in path}, [s.name for s in plan.todo]))
        assert old.items() >= {(path, sha) for path, sha in hashes(tmp_path / "set").items() if path.startswith("a/")}
        if len(seen) == 1:
            raise KeyboardInterrupt
        return encode(config, plan)

    monkeypatch.setattr(run, "encode_todo", watched)
    with pytest.raises(KeyboardInterrupt):  # readers find no half set, and the next run goes on
        run.tokenize(config("changed=redo"))
    run.tokenize(config("changed=redo"))
    assert seen == [({"quarantine.jsonl"}, ["a"])] * 2
    assert not (tmp_path / "set" / "_tmp").exists()
    monkeypatch.setattr(run, "encode_todo", encode)
    run.tokenize(config(f"output={tmp_path}/new"))
    assert hashes(tmp_path / "set") == hashes(tmp_path / "new") != old


def test_other_images_and_other_sizes_are_changes(config, tmp_path):
    run.tokenize(config())
    write_folder(tmp_path / "others", {"1.png": plain_image(2)})
    with pytest.raises(UserError, match="2 inputs have changed .*the first: .*read.image_root was .*images and is"):
        run.tokenize(config(f"read.image_root={tmp_path}/others"))
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "y"}\n')
    assert make_plan(config()).changed == {"b": "it had 49 bytes and has 14"}


def test_markers_of_earlier_versions_say_nothing_of_changes(config, tmp_path):
    run.tokenize(config())
    marker = tmp_path / "set" / "a" / "_SUCCESS"
    told = json.loads(marker.read_text())
    del told["read"], told["identity"]["recipe"]["read"]["image_formats"]
    marker.write_text(json.dumps(told))
    write_json_lines(tmp_path / "in" / "a.jsonl", ["another"])
    assert not make_plan(config()).changed


def test_a_store_replaces_what_another_input_made(config, tmp_path):
    """Its marker is the first to go and the last to come, and nothing of the old folder stays."""
    files, steps = fsspec.filesystem("memory"), []
    memory = open_store("memory://set")
    for made in ("old", "new"):
        folder = tmp_path / made
        write_folder(folder, {"_SUCCESS": made.encode(), "1.mds": b"x", f"{made}.mds": b"x"})
        memory.files = Recorded(files, steps)
        steps.clear()
        memory.commit(folder, "a")
    assert [path.rpartition("/")[2] for path in files.find("/set/a")] == ["1.mds", "_SUCCESS", "new.mds"]
    assert steps[0] == ("rm_file", "_SUCCESS") and steps[-1] == ("put_file", "_SUCCESS")
    steps.clear()
    memory.commit(tmp_path / "new", "a")  # by a second worker
    assert steps == []


class Recorded:
    """A file system that notes what is written or removed."""

    def __init__(self, files, steps: list):
        self.files, self.steps = files, steps

    def __getattr__(self, name: str):
        method = getattr(self.files, name)
        if name not in ("rm_file", "put_file"):
            return method

        def noted(*arguments):
            self.steps.append((name, arguments[-1].rpartition("/")[2]))
            return method(*arguments)

        return noted


def test_one_run_is_at_a_set(config, tmp_path):
    """A second is refused, also one that has nothing to do, and takes nothing of the first one's."""
    run.tokenize(config())
    with open_store(str(tmp_path / "set")).run():
        working = tmp_path / "set" / "_tmp" / "c.somewhere"
        working.mkdir()
        with pytest.raises(UserError, match=r"output '.*/set' is in use by process .*another output"):
            run.tokenize(config())
        assert working.exists()
    run.tokenize(config())
    assert not working.exists()


def test_inputs_that_hold_nothing_are_told_by_the_dry_run(config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(b"")
    said = describe(config(), make_plan(config()))
    assert "a.jsonl  0.0 MB  to do: unusable: the file is empty: it has 0 bytes\n" in said
    assert re.search(r"no estimate: '.*a.jsonl' is empty$", said)
    (tmp_path / "in" / "folder.jsonl").mkdir()
    said = describe(config(), make_plan(config()))
    assert re.search(r"folder.jsonl .*cannot be read now: IsADirectoryError(.|\n)*no estimate: IsADirectoryError", said)
