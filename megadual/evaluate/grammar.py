"""What a caption of a scene says, by the grammar that captions are composed in; nothing else counts as said."""

import re
from dataclasses import dataclass

from megadual.synthetic.drawings import DRAWINGS, GROUNDS, article, plural
from megadual.synthetic.scenes import NUMBERS, OPPOSITES, PLACES, RELATIONS, SIZES, Scene

_ONE = {name: name for name in DRAWINGS}
_MANY = {plural(name): name for name in DRAWINGS}
_COUNTS = {word: count for count, word in NUMBERS.items() if count > 1}
_SIZES = [size for size in SIZES if size]


@dataclass(frozen=True)
class Things:
    """So many drawings of a name."""

    name: str
    count: int
    size: str = ""


@dataclass(frozen=True)
class Said:
    """`where`: None, a place, "in a row", or how the first things stand to the second."""

    ground: str
    things: tuple[Things, ...]
    where: str | None
    without: str = ""

    @classmethod
    def of(cls, scene: Scene) -> "Said":
        said = parse(scene.caption)
        assert said is not None, scene.caption
        return said

    @property
    def kinds(self) -> list[str]:
        return sorted(each.name for each in self.things)

    @property
    def counts(self) -> dict[str, int]:
        return {each.name: each.count for each in self.things}

    @property
    def sizes(self) -> dict[str, str]:
        return {each.name: each.size for each in self.things}

    @property
    def places(self) -> tuple:
        """Where what is: equal for all ways of saying the same."""
        names = tuple(each.name for each in self.things)
        if self.where in RELATIONS:
            return min((self.where, *names), (OPPOSITES[self.where], *names[::-1]))
        return (self.where, *names)


def parse(caption: str) -> Said | None:
    """What a caption says; None where it is not of the grammar."""
    match = re.fullmatch(rf"(.+?)(?:, without ([^,]+))?, on ({'|'.join(GROUNDS)})", caption.strip())
    if not match or (match[2] and match[2] not in _MANY):
        return None
    said, without, ground = match[1], _MANY.get(match[2], ""), match[3]
    if said.endswith(" in a row"):
        listed = re.fullmatch(r"(.+), (.+) and (.+) in a row", said)
        return _said(ground, listed.groups() if listed else (), "in a row", without)
    if match := re.fullmatch(rf"(.+) ({'|'.join(RELATIONS)}) (.+)", said):
        return _said(ground, (match[1], match[3]), match[2], without)
    place = next((place for place in sorted(PLACES, key=len, reverse=True) if said.endswith(f" {place}")), None)
    return _said(ground, (said.removesuffix(f" {place}"),), place, without)


def _said(ground: str, phrases: tuple[str, ...], where: str | None, without: str) -> Said | None:
    things = [_things(phrase) for phrase in phrases]
    names = {each.name for each in things if each}
    if not things or None in things or len(names) < len(things) or without in names:
        return None
    return Said(ground, tuple(things), where, without)


def _things(phrase: str) -> Things | None:
    first, _, rest = phrase.partition(" ")
    if first in _COUNTS:
        return Things(_MANY[rest], _COUNTS[first]) if rest in _MANY else None
    size = next((size for size in _SIZES if rest.startswith(f"{size} ")), "")
    name = rest.removeprefix(f"{size} ") if size else rest
    return Things(name, 1, size) if name in _ONE and phrase == article(rest) else None
