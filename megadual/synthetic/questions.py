"""Questions about a scene, whose answers are known exactly, as conversations of several turns."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

from megadual.synthetic.drawings import article, plural
from megadual.synthetic.files import Members, json_bytes, png_bytes
from megadual.synthetic.scenes import (
    NUMBERS,
    OPPOSITES,
    RICH,
    Group,
    Preset,
    Scene,
    absent,
    draw_scene,
    relation,
    render,
)

ABSENT = 0.2  # share of the questions of a count that are about something that is not there


@dataclass
class Question:
    """One turn of each speaker."""

    kind: str  # count, colour, where, what or yes_no
    asked: str
    answer: str


@dataclass
class Conversation:
    """Questions about one scene, no two alike."""

    scene: Scene
    questions: list[Question]


def draw_conversation(rng: random.Random, preset: Preset = RICH) -> Conversation:
    """One to four questions about a random scene."""
    scene, questions = draw_scene(rng, preset), {}
    for kind in rng.choices(list(KINDS), weights=[3, 2, 3, 3, 4], k=rng.choice([1, 2, 2, 3, 3, 4])):
        drawn = KINDS[kind](rng, scene, preset)
        if drawn is not None:
            questions.setdefault(drawn[0], Question(kind, *drawn))
    return Conversation(scene, list(questions.values())) if questions else draw_conversation(rng, preset)


def conversation_members(key: str, conversation: Conversation, size: int) -> Members:
    """A webdataset sample in LLaVA's format, with the scene and the questions' kinds beside what is said."""
    said = []
    for question in conversation.questions:
        image = "" if said else "<image>\n"
        said += [{"from": "human", "value": image + question.asked}, {"from": "gpt", "value": question.answer}]
    described = {
        "id": key,
        "image": f"{key}.png",
        "conversations": said,
        "kinds": [question.kind for question in conversation.questions],
        "scene": asdict(conversation.scene),
    }
    return [
        (f"{key}.png", png_bytes(render(conversation.scene, size))),
        (f"{key}.json", json_bytes(described)),
    ]


Drawn = tuple[str, str] | None  # question and answer, where the scene allows such a question


def _is(group: Group) -> str:
    return "Is" if group.count == 1 else "Are"


def _count(rng: random.Random, scene: Scene, preset: Preset) -> Drawn:
    if rng.random() < ABSENT:
        return f"How many {plural(absent(rng, scene, preset))} are there?", "none"
    if len(scene.groups) > 1 and rng.random() < 0.3:
        return "How many things are there in all?", NUMBERS[sum(group.count for group in scene.groups)]
    group = rng.choice(scene.groups)
    return f"How many {plural(group.name)} are there?", NUMBERS[group.count]


def _colour(rng: random.Random, scene: Scene, preset: Preset) -> Drawn:
    return rng.choice(["What colour is the ground?", "Which colour does the ground have?"]), scene.ground


def _where(rng: random.Random, scene: Scene, preset: Preset) -> Drawn:
    group = rng.choice(scene.groups)
    where = scene.where(group)
    return (f"Where {_is(group).lower()} the {group.noun}?", where) if where else None


def _what(rng: random.Random, scene: Scene, preset: Preset) -> Drawn:
    """What there is, in reading order; or what is at a place."""
    group = rng.choice(scene.groups)
    where = scene.where(group)
    if where and rng.random() < 0.5:
        return f"What is {where}?", _some(group)
    in_order = [_some(group) for group in sorted(scene.groups, key=lambda group: group.region[1::-1])]
    listed = " and ".join([", ".join(in_order[:-1]), in_order[-1]]) if len(in_order) > 1 else in_order[0]
    return rng.choice(["What is in the picture?", "What do you see?"]), listed


def _some(group: Group) -> str:
    """'a cat', 'two red apples', without their size."""
    return article(group.noun) if group.count == 1 else group.phrase


def _yes_no(rng: random.Random, scene: Scene, preset: Preset) -> Drawn:
    """As many of each form are true as are not, so that the question alone tells nothing."""
    true, group = rng.random() < 0.5, rng.choice(scene.groups)
    forms = ["there", "number", "ground"] + (["relation"] if len(scene.groups) > 1 else [])
    form = rng.choice(forms)
    if form == "there":
        asked = f"Is there {article(group.name if true else absent(rng, scene, preset))}?"
    elif form == "number":
        count = group.count if true else rng.choice([n for n in range(1, 5) if n != group.count])
        noun = group.name if count == 1 else plural(group.name)
        asked = f"{'Is' if count == 1 else 'Are'} there exactly {NUMBERS[count]} {noun}?"
    elif form == "ground":
        others = [ground for ground in preset.grounds if ground != scene.ground]
        asked = f"Is the ground {scene.ground if true else rng.choice(others)}?"
    else:
        other = rng.choice([each for each in scene.groups if each is not group])
        stands = relation(group.region, other.region)
        asked = f"{_is(group)} the {group.noun} {stands if true else OPPOSITES[stands]} the {other.noun}?"
    return asked, "yes" if true else "no"


KINDS: dict[str, Callable[[random.Random, Scene, Preset], Drawn]] = {
    "count": _count,
    "colour": _colour,
    "where": _where,
    "what": _what,
    "yes_no": _yes_no,
}
