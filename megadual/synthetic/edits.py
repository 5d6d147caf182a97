"""Edits of a scene: one thing changes, and what comes out is known exactly."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from megadual.synthetic.drawings import visible_on
from megadual.synthetic.files import png_bytes
from megadual.synthetic.scenes import (
    BOTTOM,
    LEFT,
    PLACES,
    RICH,
    RIGHT,
    TOP,
    Preset,
    Region,
    Scene,
    draw_group,
    draw_scene,
    grounds_for,
    relation,
    render,
)

INSTRUCTIONS = {
    "add": ["add {what} {where}", "put {what} {where}"],
    "remove": ["remove {what}", "take {what} away"],
    "move": ["move {what} {where}", "bring {what} {where}"],
    "recolour": ["make the ground {what}", "change the ground to {what}"],
}


@dataclass
class Change:
    """What is done to which thing, and the scenes before and after. `what` of a recolouring is the colour."""

    task: str  # add, remove, move or recolour
    what: str
    where: str
    source: Scene
    result: Scene


@dataclass
class Edit:
    """A change and the instruction to make it."""

    instruction: str
    change: Change


def draw_edit(rng: random.Random, preset: Preset = RICH) -> Edit:
    """A random edit of a random scene."""
    task = rng.choices(list(TASKS), weights=[30, 25, 20, 25])[0]
    change = None
    while change is None:
        scene = draw_scene(rng, preset)
        if task == "add" and scene.kind == "relation":  # one half of it is free then
            scene = Scene.of(scene.ground, [rng.choice(scene.groups)])
        change = TASKS[task](rng, scene, preset)
    return Edit(rng.choice(INSTRUCTIONS[task]).format(what=change.what, where=change.where), change)


def edit_row(edit: Edit, size: int) -> dict[str, str | bytes]:
    """A row in InstructPix2Pix's columns."""
    return {
        "original_image": png_bytes(render(edit.change.source, size)),
        "edit_prompt": edit.instruction,
        "edited_image": png_bytes(render(edit.change.result, size)),
    }


def edit_record(edit: Edit) -> dict:
    """What the row's images show."""
    return {"edit_prompt": edit.instruction, **asdict(edit.change)}


def _apart(first: Region, second: Region) -> bool:
    return first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]


def _add(rng: random.Random, scene: Scene, preset: Preset) -> Change | None:
    """A second group in a half that is free."""
    first = scene.groups[0]
    free = [half for half in (LEFT, RIGHT, TOP, BOTTOM) if _apart(half, first.region)]
    if len(scene.groups) > 1 or not free:
        return None
    names = [name for name in preset.names if name != first.name and visible_on(scene.ground, name)]
    second = draw_group(rng, rng.choice(names), rng.choice(free), rng.choice(preset.added), preset)
    where = f"{relation(second.region, first.region)} the {first.noun}"
    groups = [first, second]
    if relation(first.region, second.region) not in preset.relations:  # told from the other, as all such scenes are
        groups.reverse()
    return Change("add", second.phrase, where, scene, Scene.of(scene.ground, groups))


def _remove(rng: random.Random, scene: Scene, preset: Preset) -> Change | None:
    """One of several groups."""
    if len(scene.groups) == 1:
        return None
    gone = rng.choice(scene.groups)
    left = [group for group in scene.groups if group is not gone]
    return Change("remove", f"the {gone.noun}", "", scene, Scene.of(scene.ground, left))


def _move(rng: random.Random, scene: Scene, preset: Preset) -> Change | None:
    """From one place to another, where it lies as it did."""
    if scene.kind != "place":
        return None
    (group,) = scene.groups
    place = rng.choice([name for name in preset.places if PLACES[name] != group.region])
    region, ((left, top, side),) = PLACES[place], group.boxes
    left, top = (round(at + to - was, 4) for at, to, was in zip((left, top), region, group.region, strict=False))
    moved = replace(group, region=region, boxes=[(left, top, side)])
    where = f"to {place.partition(' ')[2]}"
    return Change("move", f"the {group.noun}", where, scene, Scene.of(scene.ground, [moved]))


def _recolour(rng: random.Random, scene: Scene, preset: Preset) -> Change | None:
    """Another ground."""
    ground = rng.choice([colour for colour in grounds_for(scene.groups, preset) if colour != scene.ground])
    return Change("recolour", ground, "", scene, Scene.of(ground, scene.groups))


TASKS: dict[str, Callable[[random.Random, Scene, Preset], Change | None]] = {
    "add": _add,
    "remove": _remove,
    "move": _move,
    "recolour": _recolour,
}
