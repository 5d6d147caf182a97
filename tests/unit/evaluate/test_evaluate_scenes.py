"""Scenes as a benchmark: what is right is judged by boxes and captions alone, and every fault is found on its axis."""

import dataclasses
import json
import random

import pytest
import torch

from megadual.errors import UserError
from megadual.evaluate.__main__ import main
from megadual.evaluate.detector import GRID, Detector, Found, Seen, ground_of, targets
from megadual.evaluate.grammar import Said, Things, parse
from megadual.evaluate.held_out import Trained
from megadual.evaluate.judge import judge, judge_edit, sight
from megadual.evaluate.scene_scores import description, drawing_scores, question_scores, table
from megadual.synthetic.corpus import make_corpus
from megadual.synthetic.drawings import DRAWINGS, GROUNDS
from megadual.synthetic.edits import draw_edit
from megadual.synthetic.scenes import PRESETS, Scene, draw_pair, draw_scene, render
from megadual.testing.models import write_export

SCENES = [draw_pair(random.Random(seed)) for seed in range(300)]
EDITS = [draw_edit(random.Random(seed)) for seed in range(200)]
NAMES = sorted(DRAWINGS)


def seen(scene: Scene) -> Seen:
    """What a perfect detector sees."""
    found = [
        Found(group.name, left + side / 2, top + side / 2, 1.0)
        for group in scene.groups
        for left, top, side in group.boxes
    ]
    return Seen(scene.ground, found)


def test_captions_are_read_as_they_were_composed():
    for scene in SCENES:
        said, told = parse(scene.caption), parse(scene.told)
        assert told == dataclasses.replace(said, without=scene.without) and bool(scene.without) == (told != said)
        things = {group.name: (group.count, group.size) for group in scene.groups}
        assert {each.name: (each.count, each.size) for each in said.things} == things and said.ground == scene.ground


@pytest.mark.parametrize(
    "caption, said",
    [
        ("a fish above two fish, on red", None),  # no scene has two groups of a kind
        ("two mice to the left of an owl, on grey",
         Said("grey", (Things("mouse", 2), Things("owl", 1)), "to the left of")),
        ("a large unicorn at the top left, on pink", Said("pink", (Things("unicorn", 1, "large"),), "at the top left")),
        ("a cat at the top, on pink", Said("pink", (Things("cat", 1),), "at the top")),
        ("a cat, a dog and an egg in a row, on white",
         Said("white", (Things("cat", 1), Things("dog", 1), Things("egg", 1)), "in a row")),
        ("two cat, on red", None), ("cats, on red", None), ("a owl, on red", None), ("a cat on red", None),
        ("a cat, without foxes, on red", Said("red", (Things("cat", 1),), None, "fox")),
        ("a cat, without cats, on red", None), ("a cat, without a fox, on red", None),
        ("a cat, on mauve", None), ("five small cats, on red", None), ("a cat, a dog in a row, on red", None),
        ("", None),
    ],
)  # fmt: skip
def test_nothing_but_the_grammar_counts(caption, said):
    assert parse(caption) == said


def test_the_same_said_the_other_way_round_is_right():
    scene = next(scene for scene in SCENES if scene.kind == "relation")
    turned = Scene.of(scene.ground, scene.groups[::-1])
    assert turned.caption != scene.caption and description(scene, turned.caption)["all"]
    swapped = scene.caption.replace(scene.groups[0].phrase, "@").replace(scene.groups[1].phrase, scene.groups[0].phrase)
    wrong = description(scene, swapped.replace("@", scene.groups[1].phrase))
    assert not wrong["place"] and not wrong["all"] and wrong["kind"] and wrong["count"] and wrong["ground"]
    assert description(scene, "a cat and")["all"] is False
    denied = next(name for name in NAMES if name not in {group.name for group in scene.groups})
    assert description(scene, dataclasses.replace(scene, without=denied).told)["all"]


def test_a_perfect_picture_is_right_on_every_axis():
    judged = [judge(scene, seen(scene)) for scene in SCENES]
    assert all(all(each.values()) for each in judged + [sight(scene, seen(scene)) for scene in SCENES])
    scores = drawing_scores(judged)
    assert scores["overall"] == scores["all_right"] == 1 and all(axis["of"] > 20 for axis in scores["axes"].values())


def test_each_fault_is_found_on_its_axis():
    for scene in SCENES:
        right, axes = seen(scene), judge(scene, seen(scene))
        other = next(name for name in NAMES if name not in {group.name for group in scene.groups})
        more = judge(scene, Seen(right.ground, [*right.found, Found(other, 0.5, 0.5, 1.0)]))
        assert not more["all"] and more["colours"] and not more.get("single", False)
        recoloured = judge(scene, Seen(next(g for g in GROUNDS if g != scene.ground), right.found))
        assert {axis for axis in axes if not recoloured[axis]} == {"colours", "all"}
        missing = judge(scene, Seen(right.ground, right.found[1:]))
        assert not missing["all"] and not missing.get("counting", False)
        mirrored = [dataclasses.replace(found, x=1 - found.x, y=1 - found.y) for found in right.found]
        if scene.without:
            denied = judge(scene, Seen(right.ground, [*right.found, Found(scene.without, 0.5, 0.5, 1.0)]))
            assert axes["negation"] and not denied["negation"]
        if scene.kind != "alone":
            assert {axis for axis, was in axes.items() if was != judge(scene, Seen(right.ground, mirrored))[axis]} == {
                "position",
                "all",
            }


def test_edits_are_right_where_the_change_is_made_and_nothing_else():
    for edit in EDITS:
        change = edit.change
        assert judge_edit(change, seen(change.result)) == {"change": True, "rest": True, "all": True}
        untouched = judge_edit(change, seen(change.source))
        assert not untouched["change"], edit.instruction
        assert untouched["rest"], edit.instruction
        result = seen(change.result)
        other = next(n for n in NAMES if n not in {g.name for s in (change.source, change.result) for g in s.groups})
        added = judge_edit(change, Seen(result.ground, [*result.found, Found(other, 0.5, 0.5, 1.0)]))
        assert added["change"] and not added["rest"] and not added["all"]
        if change.task == "recolour":
            moved = [dataclasses.replace(found, x=found.x + 0.3) for found in result.found]
            assert judge_edit(change, Seen(result.ground, moved)) == {"change": True, "rest": False, "all": False}
        else:
            ground = next(ground for ground in GROUNDS if ground != result.ground)
            assert judge_edit(change, Seen(ground, result.found)) == {"change": True, "rest": False, "all": False}


def test_questions_are_scored_beside_blind_answers():
    answers = [("yes_no", "yes", True), ("yes_no", "no", False), ("yes_no", "no", True), ("count", "none", True)]
    scores = question_scores([dict(zip(("kind", "answer", "right"), each, strict=True)) for each in answers])
    assert scores["yes_no"] == {"right": 2 / 3, "blind": 2 / 3, "of": 3} and scores["overall"]["blind"] == 3 / 4
    assert scores["negation"] == {"right": 2 / 3, "blind": None, "of": 3}


def test_targets_are_found_again():
    """What the network is taught is what is decoded: as if it had learned it perfectly."""
    detector = Detector(NAMES, 64, width=4)
    for scene in SCENES[:100]:
        wanted = torch.from_numpy(targets(scene, {name: number for number, name in enumerate(NAMES)}))
        output = torch.full((3 + len(NAMES), GRID, GRID), -5.0)
        output[0] = wanted[1] * 10 - 5 + wanted[0] * 0.1
        output[1:3] = wanted[2:4]
        rows, columns = (wanted[4] >= 0).nonzero(as_tuple=True)
        output[3 + wanted[4, rows, columns].long(), rows, columns] = 5.0
        found = Seen(scene.ground, detector._found(output))
        assert judge(scene, found)["all"], scene.caption
        for each, true in zip(*(sorted(s.found, key=lambda f: (f.x, f.y)) for s in (found, seen(scene))), strict=True):
            assert each.name == true.name and (each.x, each.y) == pytest.approx((true.x, true.y), abs=1e-4)


def test_the_ground_is_seen():
    assert all(ground_of(render(scene, 64)) == scene.ground for scene in SCENES[:100])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, train=150, heldout=2, size=16, questions=20, edits=20)
    return folder


def test_held_out_is_held_out(corpus):
    """Nothing is composed as a scene of training, one scene of an edit may be; and always the same samples."""
    trained = Trained.on(corpus)
    shown = Trained(trained.names)
    for kind in ("pairs", "questions", "edits"):
        assert trained.draw(kind, 5, "a") == trained.draw(kind, 5, "a") != trained.draw(kind, 5, "b")
    first = shown.draw("pairs", 20, "a")
    barred = Trained(trained.names, frozenset(scene.composition for scene in first[::2]))
    assert not {scene.composition for scene in barred.draw("pairs", 40, "a")} & barred.compositions
    rows = [json.loads(line) for line in (corpus / "edits-train-00000.jsonl").read_text().splitlines()]
    captions = {row[side]["caption"] for row in rows for side in ("source", "result")}
    assert len(captions & trained.compositions) > len(captions) / 2  # the others are told the other way round
    assert all(" right of " in caption or " below " in caption for caption in captions - trained.compositions)
    assert len(trained.compositions) > 150 + 30
    edits = shown.draw("edits", 20, "a")
    sources = Trained(trained.names, frozenset(edit.change.source.composition for edit in edits))
    assert sources.draw("edits", 20, "a") == edits
    both = sources.compositions | {edit.change.result.composition for edit in edits}
    assert not [edit for edit in Trained(trained.names, both).draw("edits", 20, "a") if edit in edits]


def test_a_scene_is_composed_as_it_is_told_the_other_way_round():
    generator, told = random.Random(0), set()
    for _ in range(200):
        scene = draw_scene(generator)
        if scene.kind == "relation":
            other = Scene.of(scene.ground, scene.groups[::-1])
            assert other.caption != scene.caption and other.composition == scene.composition
            assert scene.composition in (scene.caption, other.caption)
            told.add(scene.composition == scene.caption)
        else:
            assert scene.composition == scene.caption
    assert told == {True, False}


def test_scenes_are_drawn_as_the_corpus_was(tmp_path):
    make_corpus(tmp_path, train=150, heldout=2, size=16, scenes="simple")
    trained = Trained.on(tmp_path)
    assert trained.preset is PRESETS["simple"]
    for edit in trained.draw("edits", 20, "a"):
        for scene in (edit.change.source, edit.change.result):
            assert scene.ground in trained.preset.grounds and {g.name for g in scene.groups} <= set(
                trained.preset.names
            )


def test_the_whole_way(corpus, model, tmp_path, capsys):
    """A detector that learned little, a model that learned nothing: all figures are there, the page shows pictures."""
    few = ["--steps", "2", "--batch-size", "4", "--device", "cpu", "--corpus", str(corpus)]
    main(["train-detector", "--output", str(tmp_path / "detector.pt"), *few])
    arguments = ["--model", str(model), "--detector", str(tmp_path / "detector.pt"), "--corpus", str(corpus)]
    main(["scenes", *arguments, "--output", str(tmp_path), "--scenes", "12", "--device", "cpu"])
    assert "described 0.0 %, answered " in capsys.readouterr().out
    report = json.loads((tmp_path / "scenes.json").read_text())
    scores = report["scores"]
    assert scores["describe"]["all"] == {"right": 0.0, "of": 12} and scores["ask"]["overall"]["of"] >= 12
    assert set(scores["draw"]["ceiling"]) == set(scores["edit"]["ceiling"]) == {"originals", "reconstructions"}
    assert (
        scores["edit"]["overall"]["of"] == 12
        and scores["draw"]["ceiling"]["originals"]["axes"]["colours"]["right"] == 1
    )
    rows = {(row.task, row.name): row for row in table(scores)}
    assert [row.task for row in rows.values() if row.whole] == ["describe", "ask", "draw", "edit"]
    assert rows["describe", "all"].chance == 0 and rows["draw", "overall"].chance < 1
    # What is not edited keeps the rest, by a detector that sees nothing.
    assert rows["edit", "both"].chance == 0 and rows["edit", "rest"].chance == rows["edit", "rest"].originals
    page = (tmp_path / "scenes.html").read_text()
    assert page.count("<img ") >= 4 * 12 and "all right" in page


def test_wrong_detectors_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist; make it with python -m megadual.evaluate train-detector"):
        Detector.load(tmp_path / "none.pt")
    (tmp_path / "text").write_text("no")
    with pytest.raises(UserError, match="is no detector of train-detector"):
        Detector.load(tmp_path / "text")
