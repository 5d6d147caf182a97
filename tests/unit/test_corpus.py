"""The embedded corpus: reproducible, distinct, and true to its captions."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image
from pyarrow import parquet

from megadual.errors import UserError
from megadual.evaluate.grammar import parse
from megadual.synthetic.corpus import KINDS, distinct, make_corpus
from megadual.synthetic.drawings import GROUNDS, plural
from megadual.synthetic.scenes import PRESETS, RELATIONS, Scene

EVERY_KIND = {"train": 60, "questions": 60, "edits": 60, "stories": 40, "heldout": 30}


def read_tar(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def captions(members: dict[str, bytes]) -> list[str]:
    return [data.decode() for name, data in members.items() if name.endswith(".txt")]


def scene_captions(folder, summary: dict, part: str) -> set[str]:
    """Of every scene that a part of a corpus shows, found by their key wherever the files keep it."""

    def found(value):
        if isinstance(value, dict):
            yield from [value["caption"]] if "caption" in value else []
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                yield from found(each)

    every = set()
    for kind in ("pairs", "questions", "stories"):
        for file in summary[kind]["files"]:
            if part in file:
                members = read_tar(folder / file)
                every.update(c for name, data in members.items() if ".json" in name for c in found(json.loads(data)))
    return every


def test_same_seed_same_bytes(tmp_path):
    few = dict.fromkeys(EVERY_KIND, 8)
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        make_corpus(tmp_path / name, **few, size=32, seed=seed, workers=workers)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    # each part of each kind, the edits' scenes; the broken samples, what is shown, the summary
    assert len(files) == 2 * 5 + 3
    for file in files:
        first, same, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == same
        assert first != other


def test_pictures_are_distinct_and_captions_across_parts(tmp_path):
    summary = make_corpus(tmp_path, train=1200, heldout=50, size=32, scenes="simple")
    assert summary["pairs"]["files"] == ["train-00000.tar", "train-00001.tar", "heldout-00000.tar"]
    train, more, held_out = (read_tar(tmp_path / file) for file in summary["pairs"]["files"])
    scenes = [data for name, data in (train | more | held_out).items() if name.endswith(".json")]
    assert len(scenes) == len(set(scenes)) == 1250
    trained = captions(train | more)
    assert len(set(trained)) < len(trained)  # there are few captions of simple scenes
    assert not set(trained) & set(captions(held_out))


def test_no_held_out_scene_is_trained_on(tmp_path):
    """Over all kinds: a scene asked about in one part is no pair, story or edit of the other."""
    summary = make_corpus(tmp_path, **EVERY_KIND | {"train": 2000, "heldout": 200}, size=16)
    held_out = scene_captions(tmp_path, summary, "heldout")
    edits = [json.loads(line) for line in (tmp_path / "edits-heldout-00000.jsonl").read_text().splitlines()]
    held_out |= {edit[side]["caption"] for edit in edits for side in ("source", "result")}
    trained = scene_captions(tmp_path, summary, "train")
    assert len(held_out) > 900 and len(trained) > 2000
    assert not held_out & trained


def test_nor_a_scene_told_the_other_way_round():
    def pairs(barred: set[str]) -> list[Scene]:
        return distinct(KINDS["pairs"], random.Random(0), 100, barred, PRESETS["rich"])

    scenes = [scene for scene in pairs(set()) if scene.kind == "relation"]
    otherwise = [Scene.of(scene.ground, scene.groups[::-1]) for scene in scenes]
    assert {scene.caption for scene in scenes}.isdisjoint(scene.caption for scene in otherwise)
    drawn = pairs({scene.composition for scene in otherwise})
    assert not [scene for scene in drawn if scene in scenes]


def test_heldout_does_not_depend_on_train(tmp_path):
    for train in (10, 40):
        make_corpus(tmp_path / str(train), train=train, questions=train, heldout=5, size=16)
    for file in ("heldout-00000.tar", "questions-heldout-00000.tar"):
        small, large = ((tmp_path / name / file).read_bytes() for name in ("10", "40"))
        assert small == large


def test_samples_show_what_they_say(tmp_path):
    """Most of the image is the caption's ground, and in each group's boxes there is something else."""
    make_corpus(tmp_path, train=40, heldout=1, size=64)
    members = read_tar(tmp_path / "train-00000.tar")
    for name in [name for name in members if name.endswith(".json")]:
        scene = json.loads(members[name])
        image = Image.open(io.BytesIO(members[name.replace(".json", ".png")]))
        assert image.size == (64, 64)
        assert scene["caption"].endswith(f", on {scene['ground']}")
        ground = tuple(int(GROUNDS[scene["ground"]][i : i + 2], 16) for i in (1, 3, 5))
        assert max(image.getcolors(64 * 64))[1] == ground or len(scene["groups"]) == 1  # one may fill the scene
        for group in scene["groups"]:
            assert len(group["boxes"]) == group["count"]
            for left, top, side in group["boxes"]:
                box = image.crop(tuple(round(64 * x) for x in (left, top, left + side, top + side)))
                assert any(colour != ground for _, colour in box.getcolors(64 * 64))


def test_files_have_the_published_formats(tmp_path):
    make_corpus(tmp_path, **dict.fromkeys(EVERY_KIND, 3), size=16)
    talk = json.loads(read_tar(tmp_path / "questions-train-00000.tar")["questions-train-000000.json"])
    assert talk["image"] == "questions-train-000000.png" and talk["id"] == "questions-train-000000"
    said = talk["conversations"]
    assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
    assert [turn["value"].count("<image>") for turn in said] == [1] + [0] * (len(said) - 1)
    assert said[0]["value"].startswith("<image>\n")

    table = parquet.read_table(tmp_path / "edits-train-00000.parquet")
    assert table.column_names == ["original_image", "edit_prompt", "edited_image"]
    image = table.column("edited_image")[0].as_py()
    assert set(image) == {"bytes", "path"} and Image.open(io.BytesIO(image["bytes"])).size == (16, 16)

    members = read_tar(tmp_path / "stories-train-00000.tar")
    story = json.loads(members["stories-train-000000.json"])
    assert all((text is None) != (image is None) for text, image in zip(story["texts"], story["images"], strict=True))
    assert all(f"stories-train-000000.{image}" in members for image in story["images"] if image)


@pytest.mark.parametrize(
    "name, expected",
    [("cat", "cats"), ("palm tree", "palm trees"), ("mouse", "mice"), ("strawberry", "strawberries"), ("fox", "foxes")],
)
def test_plural(name, expected):
    assert plural(name) == expected


def test_simple_scenes(tmp_path):
    """A dozen drawings on a few grounds, in every kind of sample; each scene is told, and so held out, in one way."""
    few, preset = dict.fromkeys(EVERY_KIND, 40), PRESETS["simple"]
    summary = make_corpus(tmp_path, **few, size=16, scenes="simple")
    assert summary["scenes"] == "simple" and summary["drawings"] == len(preset.names) == 12
    shown = scene_captions(tmp_path, summary, "")
    assert len(shown) > 200 and {parse(caption).ground for caption in shown} == set(preset.grounds)
    assert {things.name for caption in shown for things in parse(caption).things} == set(preset.names)
    assert {parse(caption).where for caption in shown} & set(RELATIONS) == set(preset.relations)


def test_impossible_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="size 8"):
        make_corpus(tmp_path, size=8)
