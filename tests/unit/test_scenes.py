"""What is said about scenes is true: found again in their boxes and pixels, never in the words that made them."""

import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from megadual.synthetic.drawings import DRAWINGS, GROUNDS, plural
from megadual.synthetic.edits import draw_edit
from megadual.synthetic.questions import draw_conversation
from megadual.synthetic.scenes import PRESETS, Scene, draw_scene, render
from megadual.synthetic.stories import draw_story

COUNTS = {"none": 0, "no": 0, "one": 1, "a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NAMES = {plural(name): name for name in DRAWINGS} | {name: name for name in DRAWINGS}
RELATION = "to the left of|to the right of|above|below"


def centres(scene: Scene, noun: str) -> np.ndarray:
    """(drawings of that name, 2) across and down."""
    of = [
        (left + side / 2, top + side / 2) for g in scene.groups if g.name == NAMES[noun] for left, top, side in g.boxes
    ]
    return np.array(of).reshape(-1, 2)


def stands(first: np.ndarray, relation: str, second: np.ndarray) -> bool:
    """All of the first lie on that side of all of the second."""
    axis, before = {
        "to the left of": (0, True), "to the right of": (0, False), "above": (1, True), "below": (1, False),
    }[relation]  # fmt: skip
    first, second = first[:, axis], second[:, axis]
    return bool(first.max() < second.min() if before else first.min() > second.max())


def lies(centres_N2: np.ndarray, where: str, scene: Scene) -> bool:
    """Whether `at the top left`, `in the middle`, `below the cats` is true of drawings."""
    if match := re.fullmatch(rf"({RELATION}) the (.+)", where):
        return stands(centres_N2, match[1], centres(scene, match[2]))
    ((across, down),) = centres_N2
    third = 1 / 3 if len(scene.groups) == 3 else 1 / 2
    words = where.split()
    return (
        ("left" not in words or across < third)
        and ("right" not in words or across > 1 - third)
        and ("top" not in words or down < third)
        and ("bottom" not in words or down > 1 - third)
        and ("middle" not in words or third < across < 1 - third)
    )


def ground_of(scene: Scene) -> str:
    """The commonest colour of a ground along the picture's border."""
    pixels = np.asarray(render(scene, 64))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    named = {tuple(bytes.fromhex(code[1:])): name for name, code in GROUNDS.items()}
    return Counter(name for pixel in border.tolist() if (name := named.get(tuple(pixel)))).most_common(1)[0][0]


def is_right(scene: Scene, asked: str, answer: str) -> bool:
    """Work the answer out again."""
    if match := re.fullmatch(r"How many (.+) are there\?", asked):
        return len(centres(scene, match[1])) == COUNTS[answer]
    if asked == "How many things are there in all?":
        return sum(len(group.boxes) for group in scene.groups) == COUNTS[answer]
    if "colour" in asked:
        return ground_of(scene) == answer
    if match := re.fullmatch(r"Where (?:is|are) the (.+)\?", asked):
        return lies(centres(scene, match[1]), answer, scene)
    if asked in ("What is in the picture?", "What do you see?"):
        listed = [re.fullmatch(r"(\w+) (.+)", each).groups() for each in re.split(r", | and ", answer)]
        found = {NAMES[noun]: COUNTS[number] for number, noun in listed}
        return found == {group.name: len(group.boxes) for group in scene.groups}
    if match := re.fullmatch(r"What is (.+)\?", asked):
        number, noun = re.fullmatch(r"(\w+) (.+)", answer).groups()
        of = centres(scene, noun)
        return len(of) == COUNTS[number] and lies(of, match[1], scene)
    if match := re.fullmatch(r"Is there an? (.+)\?", asked):
        truth = len(centres(scene, match[1])) > 0
    elif match := re.fullmatch(r"(?:Is|Are) there exactly (\w+) (.+)\?", asked):
        truth = len(centres(scene, match[2])) == COUNTS[match[1]]
    elif match := re.fullmatch(r"Is the ground (\w+)\?", asked):
        truth = ground_of(scene) == match[1]
    else:
        first, relation, second = re.fullmatch(rf"(?:Is|Are) the (.+) ({RELATION}) the (.+)\?", asked).groups()
        truth = stands(centres(scene, first), relation, centres(scene, second))
    return {"yes": truth, "no": not truth}[answer]


@pytest.fixture(scope="module", params=PRESETS.values(), ids=PRESETS)
def conversations(request):
    rng = random.Random(0)
    return [draw_conversation(rng, request.param) for _ in range(1500)]


def test_answers_are_right(conversations):
    asked = Counter()
    for talk in conversations[:400]:
        for question in talk.questions:
            assert is_right(talk.scene, question.asked, question.answer), (talk.scene.caption, question)
            asked[question.kind] += 1
        assert len({question.asked for question in talk.questions}) == len(talk.questions)
    assert set(asked) == {"count", "colour", "where", "what", "yes_no"} and min(asked.values()) > 80


def test_a_wrong_answer_is_noticed(conversations):
    """`is_right` looks at the scene: answers about another scene are mostly wrong."""
    wrong = [
        is_right(scene, question.asked, question.answer)
        for talk, scene in zip(conversations[:200], [talk.scene for talk in conversations[200:400]], strict=True)
        for question in talk.questions
        if question.kind in ("count", "colour") and question.answer != "none"
    ]
    assert sum(wrong) < 0.2 * len(wrong)


def test_yes_and_no_are_balanced(conversations):
    """Over all, and for each form of question: its first two words and whether it is about the ground, a number, ..."""
    answers = defaultdict(list)
    for talk in conversations:
        for question in talk.questions:
            if question.kind == "yes_no":
                form = next(word for word in ("exactly", "ground", "there", "the") if word in question.asked.split())
                answers[form].append(question.answer == "yes")
    assert len(answers) == 4
    for form, yes in answers.items():
        assert len(yes) > 100 and abs(np.mean(yes) - 0.5) < 3 * 0.5 / len(yes) ** 0.5, form


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_relations_are_true(preset):
    rng = random.Random(0)
    scenes = [scene for scene in (draw_scene(rng, preset) for _ in range(400)) if scene.kind == "relation"]
    assert len(scenes) > 100
    for scene in scenes:
        (relation,) = re.findall(RELATION, scene.caption)
        assert stands(
            *(centres(scene, g.name) for g in scene.groups[:1]), relation, centres(scene, scene.groups[1].name)
        )


def boxes(scene: Scene) -> set[tuple]:
    return {(group.name, *box) for group in scene.groups for box in group.boxes}


@pytest.fixture(scope="module", params=PRESETS.values(), ids=PRESETS)
def edits(request):
    rng = random.Random(0)
    return [draw_edit(rng, request.param) for _ in range(240)]


def test_edits_change_what_they_say(edits):
    seen = Counter()
    for edit in edits:
        source, result, task = edit.change.source, edit.change.result, edit.change.task
        before, after = boxes(source), boxes(result)
        words = edit.instruction
        if task == "recolour":
            assert before == after and ground_of(source) != ground_of(result) == words.split()[-1]
        else:
            assert ground_of(source) == ground_of(result)
        if task == "remove":
            (gone,) = {name for name, *_ in before - after}
            assert after < before and gone not in {name for name, *_ in after}
            assert re.search(rf"the ({gone}|{plural(gone)})\b", words)
        if task == "add":
            (new,) = {name for name, *_ in after - before}
            assert before < after and new not in {name for name, *_ in before}
            number, noun, relation, other = re.fullmatch(
                rf"(?:add|put) (\w+) (?:small |large )?(.+?) ({RELATION}) the (.+)", words
            ).groups()
            assert NAMES[noun] == new and COUNTS[number] == len(after - before)
            assert stands(centres(result, noun), relation, centres(result, other))
        if task == "move":
            ((was, *_, side_before),), ((name, *_, side_after),) = before, after
            assert (was, side_before) == (name, side_after) and before != after
            place = words.partition(" to the ")[2]
            assert lies(centres(result, name), f"at the {place}", result)
        seen[task] += 1
    assert min(seen.values()) > 20 and len(seen) == 4


def test_edits_change_nothing_else(edits):
    """Pixel for pixel, but in the boxes of what came, went or moved; a recolouring, where the ground was."""
    size = 64
    for edit in edits[:100]:
        source, result = (np.asarray(render(scene, size)) for scene in (edit.change.source, edit.change.result))
        changed = (source != result).any(-1)
        assert changed.any()
        if edit.change.task == "recolour":
            old, new = (list(bytes.fromhex(GROUNDS[s.ground][1:])) for s in (edit.change.source, edit.change.result))
            step = np.subtract(new, old)
            share = (result.astype(int) - source) @ step / (step @ step)  # how much of a pixel is ground
            assert np.abs(result - (source + share[..., None] * step)).max() < 2  # and nothing but that has changed
            assert share.min() > -0.02 and 0.98 < share.max() < 1.02
            continue
        for _, left, top, side in boxes(edit.change.source) ^ boxes(edit.change.result):
            first_x, first_y = int(left * size) - 1, int(top * size) - 1  # a pixel for rounding
            last = int(side * size) + 4
            changed[max(first_y, 0) : first_y + last, max(first_x, 0) : first_x + last] = False
        assert not changed.any(), edit.instruction


def test_stories_change_one_thing_at_a_time():
    rng = random.Random(0)
    lengths = Counter()
    for _ in range(100):
        story = draw_story(rng)
        assert len(story.sentences) == len(story.scenes) and story.scenes[0].caption in story.sentences[0]
        for sentence, before, after in zip(story.sentences[1:], story.scenes, story.scenes[1:], strict=False):
            changed = {name for name, *_ in boxes(before) ^ boxes(after)}
            assert len(changed) + (before.ground != after.ground) == 1
            assert all(name in sentence or plural(name) in sentence for name in changed)
            assert changed or after.ground in sentence
        lengths[len(story.scenes)] += 1
    assert set(lengths) == {2, 3, 4}
