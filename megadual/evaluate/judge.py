"""Whether a picture, as a detector sees it, shows the scene that was asked for."""

from collections.abc import Iterable

from megadual.evaluate.detector import Found, Seen
from megadual.synthetic.edits import Change
from megadual.synthetic.scenes import Group, Scene, relation

AXES = {
    "single": "one thing was asked for: it is there, and nothing else",
    "two": "two kinds were asked for: both are there",
    "counting": "several things of a kind: as many are there as were asked for, of every kind",
    "colours": "the ground has the colour that was asked for",
    "position": "a place, a relation or a row: everything lies where it should",
    "negation": "something was said not to be there: it is not",
}
NEAR = 0.15  # of the picture's side: how far what should stay as it was may have moved


def judge(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Every axis of AXES that the scene asks for, and `all`: everything that it asks for and nothing else."""
    groups = scene.groups
    there = {group.name: len(seen.of(group.name)) for group in groups}
    whole = sight(scene, seen)
    axes = {"colours": whole["ground"]}
    if len(groups) == 1 and groups[0].count == 1:
        axes["single"] = whole["count"]
    if len(groups) == 2:
        axes["two"] = all(there.values())
    if any(group.count > 1 for group in groups):
        axes["counting"] = all(there[group.name] == group.count for group in groups)
    if scene.kind != "alone":
        axes["position"] = whole["place"]
    if scene.without:
        axes["negation"] = not seen.of(scene.without)
    return axes | {"all": whole["all"]}


def sight(scene: Scene, seen: Seen) -> dict[str, bool]:
    """What is seen of a scene, judged as a description of it is: kinds, how many of each, ground and place."""
    counts = {group.name: group.count for group in scene.groups}
    right = {
        "kind": seen.counts.keys() == counts.keys(),
        "count": seen.counts == counts,
        "ground": seen.ground == scene.ground,
        "place": scene.kind == "alone" or lies_right(scene, seen),
    }
    return right | {"all": all(right.values())}


def lies_right(scene: Scene, seen: Seen) -> bool:
    """Whether every kind is there, and the drawings of each lie where the scene has them."""
    found = [seen.of(group.name) for group in scene.groups]
    if not all(found):
        return False
    if len(found) == 1:
        left, top, right, bottom = scene.groups[0].region
        return all(left <= each.x <= right and top <= each.y <= bottom for each in found[0])
    neighbours = list(zip(scene.groups, found, strict=True))
    return all(
        _stand(first, relation(of.region, to.region), second)
        for (of, first), (to, second) in zip(neighbours, neighbours[1:], strict=False)
    )


def _stand(first: Iterable[Found], how: str, second: Iterable[Found]) -> bool:
    """Whether all of the first lie 'above', ... all of the second."""
    if how in ("to the left of", "to the right of"):
        a, b = [each.x for each in first], [each.x for each in second]
    else:
        a, b = [each.y for each in first], [each.y for each in second]
    return max(a) < min(b) if how in ("to the left of", "above") else min(a) > max(b)


def judge_edit(change: Change, seen: Seen) -> dict[str, bool]:
    """`change`: what was asked for has happened; `rest`: all else is as it was; `all`: both."""
    kept, new, gone = _compared(change.source, change.result)
    if change.task == "recolour":
        changed = seen.ground == change.result.ground
    else:
        arrived = all(len(seen.of(group.name)) == group.count for group in new)
        changed = arrived and not any(seen.of(group.name) for group in gone)
        if new:
            changed = changed and lies_right(change.result, seen)
        if change.task == "move":  # places overlap: what was not moved may lie rightly
            changed = changed and _moved(change, seen)
    others = set(seen.counts) - {group.name for group in (*kept, *new, *gone)}
    rest = not others and all(stays(group, seen) for group in kept)
    if change.task != "recolour":
        rest = rest and seen.ground == change.source.ground
    return {"change": changed, "rest": rest, "all": changed and rest}


def _moved(change: Change, seen: Seen) -> bool:
    """Whether the one thing is nearer to where it should be than to where it was."""
    (group,) = change.result.groups

    def distance(scene: Scene) -> float:
        ((x, y, side),) = scene.groups[0].boxes
        return sum((each.x - x - side / 2) ** 2 + (each.y - y - side / 2) ** 2 for each in seen.of(group.name))

    return distance(change.result) < distance(change.source)


def _compared(source: Scene, result: Scene) -> tuple[list[Group], list[Group], list[Group]]:
    """The groups that stay as they were, those that are new (or elsewhere), and those that are gone."""
    before = {group.name: group.boxes for group in source.groups}
    kept = [group for group in result.groups if before.get(group.name) == group.boxes]
    new = [group for group in result.groups if before.get(group.name) != group.boxes]
    after = {group.name for group in result.groups}
    return kept, new, [group for group in source.groups if group.name not in after]


def stays(group: Group, seen: Seen) -> bool:
    """Whether each of its drawings is seen near where it was, and no more of them."""
    left = seen.of(group.name)
    if len(left) != len(group.boxes):
        return False
    for x, y, side in group.boxes:
        near = [each for each in left if max(abs(each.x - x - side / 2), abs(each.y - y - side / 2)) < NEAR]
        if not near:
            return False
        left.remove(min(near, key=lambda each: abs(each.x - x - side / 2) + abs(each.y - y - side / 2)))
    return True
