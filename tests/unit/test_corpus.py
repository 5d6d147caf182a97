"""The embedded corpus: reproducible, distinct, and true to its captions."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from megadual.errors import UserError
from megadual.synthetic import corpus


def read_tar(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def captions(members: dict[str, bytes]) -> list[str]:
    return [data.decode() for name, data in members.items() if name.endswith(".txt")]


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        corpus.make_corpus(tmp_path / name, train=30, heldout=5, size=32, seed=seed)
    for file in ("train-00000.tar", "heldout-00000.tar", "broken-00000.tar", "corpus.json"):
        first, same, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == same
        assert first != other


def test_captions_are_distinct_across_parts(tmp_path):
    summary = corpus.make_corpus(tmp_path, train=1200, heldout=50, size=16, seed=0)
    assert summary["shards"] == ["train-00000.tar", "train-00001.tar", "heldout-00000.tar"]
    every = [caption for shard in summary["shards"] for caption in captions(read_tar(tmp_path / shard))]
    assert len(every) == 1250
    assert len(set(every)) == 1250


def test_heldout_does_not_depend_on_train(tmp_path):
    for train in (10, 40):
        corpus.make_corpus(tmp_path / str(train), train=train, heldout=5, size=16)
    small, large = ((tmp_path / name / "heldout-00000.tar").read_bytes() for name in ("10", "40"))
    assert small == large


def test_samples_show_what_they_say(tmp_path):
    """Most of the image is the caption's ground, and in each group's boxes there is something else."""
    corpus.make_corpus(tmp_path, train=40, heldout=1, size=64)
    members = read_tar(tmp_path / "train-00000.tar")
    for name in [name for name in members if name.endswith(".json")]:
        scene = json.loads(members[name])
        image = Image.open(io.BytesIO(members[name.replace(".json", ".png")]))
        assert image.size == (64, 64)
        assert scene["caption"].endswith(f", on {scene['ground']}")
        ground = tuple(int(corpus.GROUNDS[scene["ground"]][i : i + 2], 16) for i in (1, 3, 5))
        assert max(image.getcolors(64 * 64))[1] == ground or len(scene["groups"]) == 1  # one may fill the scene
        for group in scene["groups"]:
            assert len(group["boxes"]) == group["count"]
            for left, top, side in group["boxes"]:
                box = image.crop(tuple(round(64 * x) for x in (left, top, left + side, top + side)))
                assert any(colour != ground for _, colour in box.getcolors(64 * 64))


def test_relations_are_true():
    rng = random.Random(0)
    scenes = [scene for scene in (corpus.draw_scene_plan(rng) for _ in range(400)) if scene.kind == "relation"]
    assert len(scenes) > 100
    for scene in scenes:
        first, second = (
            [sum(box[axis] + box[2] / 2 for box in group.boxes) / group.count for axis in (0, 1)]
            for group in scene.groups
        )
        if " to the left of " in scene.caption:
            assert first[0] < second[0]
        elif " to the right of " in scene.caption:
            assert first[0] > second[0]
        elif " above " in scene.caption:
            assert first[1] < second[1]
        else:
            assert first[1] > second[1]


@pytest.mark.parametrize(
    "name, expected",
    [("cat", "cats"), ("palm tree", "palm trees"), ("mouse", "mice"), ("strawberry", "strawberries"), ("fox", "foxes")],
)
def test_plural(name, expected):
    assert corpus.plural(name) == expected


def test_impossible_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="size 8"):
        corpus.make_corpus(tmp_path, size=8)
