"""Scenes of drawings: what is where on which ground, the caption that says so, and its picture."""

import random
from dataclasses import asdict, dataclass

from PIL import Image

from megadual.synthetic.drawings import DRAWINGS, GROUNDS, article, drawing, plural, visible_on
from megadual.synthetic.files import Members, json_bytes, png_bytes

SUPERSAMPLE = 2  # scenes are composed at this many times their size, then reduced

NEGATED = 0.1  # share of pairs whose caption also says what is not there
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
SIZES = {"small": 0.55, "large": 1.0}  # share of its cell that a drawing fills whose size is told

Region = tuple[float, float, float, float]  # left, top, right, bottom as shares of the scene

WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
TOP, BOTTOM = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
RELATIONS = {
    "to the left of": (LEFT, RIGHT),
    "to the right of": (RIGHT, LEFT),
    "above": (TOP, BOTTOM),
    "below": (BOTTOM, TOP),
}
OPPOSITES = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
TOLD_FIRST = ("to the left of", "above")  # of two opposites the one by which compositions are compared
PLACES = {
    "at the top left": (0.0, 0.0, 0.5, 0.5),
    "at the top right": (0.5, 0.0, 1.0, 0.5),
    "at the bottom left": (0.0, 0.5, 0.5, 1.0),
    "at the bottom right": (0.5, 0.5, 1.0, 1.0),
    "at the top": (0.25, 0.0, 0.75, 0.5),
    "at the bottom": (0.25, 0.5, 0.75, 1.0),
    "on the left": (0.0, 0.25, 0.5, 0.75),
    "on the right": (0.5, 0.25, 1.0, 0.75),
}
ROW = {
    "on the left": (0 / 3, 0.25, 1 / 3, 0.75),
    "in the middle": (1 / 3, 0.25, 2 / 3, 0.75),
    "on the right": (2 / 3, 0.25, 3 / 3, 0.75),
}


@dataclass(frozen=True)
class Preset:
    """What scenes are drawn from; of each tuple one is chosen at random."""

    names: tuple[str, ...]
    grounds: tuple[str, ...]
    arrangements: dict[str, int]  # how often each is drawn: alone, place, relation, row
    places: tuple[str, ...]
    relations: tuple[str, ...]  # of the first of two kinds to the second
    alone: tuple[int, ...]  # how many of a kind that is alone
    pairs: tuple[tuple[int, int], ...]  # how many of each of two kinds
    added: tuple[int, ...]  # how many of a kind that an edit adds
    sizes: tuple[str, ...]  # of single drawings, "" where it is not told
    fill: float  # share of its cell that a drawing fills whose size is not told
    largest: float  # share of the scene that a cell is at most taken to be
    loose: float  # share of the room that is left in its cell in which a drawing lies at random, the middle one


PRESETS = {
    "rich": Preset(
        names=tuple(DRAWINGS),
        grounds=tuple(GROUNDS),
        arrangements={"alone": 30, "place": 20, "relation": 40, "row": 10},
        places=tuple(PLACES),
        relations=tuple(RELATIONS),
        alone=(1, 1, 2, 3, 4),
        pairs=((1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3)),
        added=(1, 1, 2),
        sizes=("small", "", "", "large"),
        fill=0.8,
        largest=1.0,
        loose=1.0,
    ),
    # One or two large drawings that differ in colour and outline even where they are blurred, each in the middle of its
    # place: what minutes of training can learn.
    "simple": Preset(
        names=(
            "red heart", "purple heart", "orange circle", "blue circle", "red square", "green square", "star", "tree",
            "pig", "bear", "ball", "hat",
        ),
        grounds=("white", "grey", "red", "orange", "blue", "purple"),
        arrangements={"alone": 25, "place": 25, "relation": 50},
        places=("at the top", "at the bottom", "on the left", "on the right"),
        relations=("to the left of", "above"),
        alone=(1, 2),
        pairs=((1, 1),),
        added=(1,),
        sizes=("",),
        fill=0.95,
        largest=0.5,
        loose=0.3,
    ),
}  # fmt: skip
RICH = PRESETS["rich"]


@dataclass
class Group:
    """`count` drawings of one kind in one region; boxes are (left, top, side) shares of the scene."""

    name: str
    count: int
    size: str
    region: Region
    boxes: list[tuple[float, float, float]]

    @property
    def noun(self) -> str:
        """'cat', 'red apples'."""
        return self.name if self.count == 1 else plural(self.name)

    @property
    def phrase(self) -> str:
        """'a large cat', 'two red apples'."""
        words = f"{self.size} {self.noun}".strip()
        return f"{NUMBERS[self.count]} {words}" if self.count > 1 else article(words)


@dataclass
class Scene:
    """What one image shows, and the caption that says so."""

    caption: str
    kind: str  # alone, place, relation or row
    ground: str
    groups: list[Group]
    without: str = ""  # a drawing that it does not show, where its pair says so

    @property
    def told(self) -> str:
        """The caption of its pair, which may also say what is not there."""
        if not self.without:
            return self.caption
        said, _, ground = self.caption.rpartition(", on ")
        return f"{said}, without {plural(self.without)}, on {ground}"

    @property
    def composition(self) -> str:
        """The caption that it shares with all scenes that are composed alike: told from the left or the upper group."""
        if self.kind != "relation" or (stands := relation(*(group.region for group in self.groups))) in TOLD_FIRST:
            return self.caption
        said, _, ground = self.caption.rpartition(", on ")
        first, _, second = said.partition(f" {stands} ")
        return f"{second} {OPPOSITES[stands]} {first}, on {ground}"

    @classmethod
    def of(cls, ground: str, groups: list[Group]) -> "Scene":
        """The scene of these groups, which are one, two that lie apart, or three in a row."""
        phrases = [group.phrase for group in groups]
        if len(groups) == 3:
            kind, said = "row", "{}, {} and {} in a row".format(*phrases)
        elif len(groups) == 2:
            kind, said = "relation", f"{phrases[0]} {relation(groups[0].region, groups[1].region)} {phrases[1]}"
        else:
            place = next((name for name, region in PLACES.items() if region == groups[0].region), None)
            kind, said = ("place", f"{phrases[0]} {place}") if place else ("alone", phrases[0])
        return cls(f"{said}, on {ground}", kind, ground, groups)

    def where(self, group: Group) -> str | None:
        """'at the top left', 'below the red apples', 'in the middle'; None of a group that may lie anywhere."""
        if self.kind == "relation":
            (other,) = (each for each in self.groups if each is not group)
            return f"{relation(group.region, other.region)} the {other.noun}"
        places = {"place": PLACES, "row": ROW}.get(self.kind, {})
        return next((name for name, region in places.items() if region == group.region), None)


def relation(first: Region, second: Region) -> str:
    """Where the first of two regions lies, which lie apart: 'to the left of' the second."""
    if first[2] <= second[0]:
        return "to the left of"
    if second[2] <= first[0]:
        return "to the right of"
    return "above" if first[3] <= second[1] else "below"


def draw_group(rng: random.Random, name: str, region: Region, count: int, preset: Preset = RICH) -> Group:
    """Lay `count` drawings out in the cells of a region, each moved at random within its cell."""
    left, top, right, bottom = region
    width, height = right - left, bottom - top
    columns = {1: 1, 4: 2}.get(count, count if width >= height else 1)
    rows = count // columns
    cell_w, cell_h = width / columns, height / rows
    size = rng.choice(preset.sizes) if count == 1 else ""
    side = SIZES.get(size, preset.fill) * min(cell_w, cell_h, preset.largest)

    def within(free: float) -> float:
        return rng.random() * free * preset.loose + free * (1 - preset.loose) / 2

    boxes = [
        (
            round(left + column * cell_w + within(cell_w - side), 4),
            round(top + row * cell_h + within(cell_h - side), 4),
            round(side, 4),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return Group(name, count, size, region, boxes)


def draw_scene(rng: random.Random, preset: Preset = RICH) -> Scene:
    """A random scene: one group alone, one group at a place, two groups in a relation, or three in a row."""
    kind = rng.choices(list(preset.arrangements), weights=list(preset.arrangements.values()))[0]
    names = rng.sample(preset.names, 3)
    if kind == "alone":
        layout = [(names[0], WHOLE, rng.choice(preset.alone))]
    elif kind == "place":
        layout = [(names[0], PLACES[rng.choice(preset.places)], 1)]
    elif kind == "relation":
        layout = list(zip(names, RELATIONS[rng.choice(preset.relations)], rng.choice(preset.pairs), strict=False))
    else:
        layout = [(name, region, 1) for name, region in zip(names, ROW.values(), strict=True)]
    groups = [draw_group(rng, *group, preset) for group in layout]
    return Scene.of(rng.choice(grounds_for(groups, preset)), groups)


def draw_pair(rng: random.Random, preset: Preset = RICH) -> Scene:
    """A random scene whose caption may also say what is not there."""
    scene = draw_scene(rng, preset)
    if rng.random() < NEGATED:
        scene.without = absent(rng, scene, preset)
    return scene


def absent(rng: random.Random, scene: Scene, preset: Preset = RICH) -> str:
    """A drawing that the scene does not show."""
    return rng.choice([name for name in preset.names if name not in {group.name for group in scene.groups}])


def grounds_for(groups: list[Group], preset: Preset = RICH) -> list[str]:
    """The grounds on which all of the groups can be seen."""
    return [ground for ground in preset.grounds if all(visible_on(ground, group.name) for group in groups)]


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    canvas = Image.new("RGBA", (size * SUPERSAMPLE,) * 2, GROUNDS[scene.ground])
    for group in scene.groups:
        for left, top, side in group.boxes:
            image = drawing(group.name, max(1, round(side * canvas.width)))
            canvas.alpha_composite(image, (round(left * canvas.width), round(top * canvas.height)))
    return canvas.convert("RGB").reduce(SUPERSAMPLE)


def pair_members(key: str, scene: Scene, size: int) -> Members:
    """A pair as a webdataset sample: the image, its caption, the scene."""
    return [
        (f"{key}.png", png_bytes(render(scene, size))),
        (f"{key}.txt", scene.told.encode()),
        (f"{key}.json", json_bytes(asdict(scene))),
    ]
