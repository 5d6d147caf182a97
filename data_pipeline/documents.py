"""A sample as its reader lays it out: who says what, with undecoded images."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from megadual.streams import ImageUse, Role, TurnBit


class Unusable(Exception):
    """The sample is broken: it goes to the quarantine list with this reason."""


class Missing(Unusable):
    """A file that the sample names is not there."""


class LeftOut(Exception):
    """The sample is sound but a filter leaves it out: counted under this reason."""


@dataclass
class RawImage:
    """An encoded image, or what reads it; and what it is for."""

    data: bytes | Callable[[], bytes]
    use: ImageUse = ImageUse.EITHER
    linked: bool = False  # a page's link into the web, which may be dead

    def load(self) -> bytes:
        """Read it, where that is still to be done."""
        if callable(self.data):
            self.data = self.data()
        if not self.data:
            raise Unusable("the image has 0 bytes")
        return self.data


Part = TypeVar("Part")  # str, or an image in any state


def join(parts: list[Part], between: str = "") -> list[Part]:
    """Parts in which texts that touch are made one, with `between` where no space parts them."""
    joined: list = []
    for part in parts:
        if not (isinstance(part, str) and joined and isinstance(joined[-1], str)):
            joined.append(part)
        elif joined[-1][-1:].strip() and part[:1].strip():
            joined[-1] += between + part
        else:
            joined[-1] += part
    return joined


def strip(parts: list[Part]) -> list[Part]:
    """Parts without the space before the first text and behind the last one, as the chat template leaves it out."""
    parts, texts = list(parts), [place for place, part in enumerate(parts) if isinstance(part, str)]
    if texts:
        parts[texts[0]] = parts[texts[0]].lstrip()
        parts[texts[-1]] = parts[texts[-1]].rstrip()
    return parts


@dataclass
class RawTurn:
    """What one speaker says: texts and images in order, no two texts side by side, none empty."""

    role: Role
    parts: list[str | RawImage]
    bits: TurnBit = TurnBit.LOSS
    between: str = ""  # what parts two texts where an image between them is left out

    def __post_init__(self):
        self.parts = [part for part in strip(join(self.parts, self.between)) if part != ""]

    @property
    def images(self) -> list[RawImage]:
        return [part for part in self.parts if isinstance(part, RawImage)]


@dataclass
class RawDocument:
    """Turns in order. A pair is its image and then its captions, each a turn, the image in the first."""

    key: str
    turns: list[RawTurn]
    meta: dict = field(default_factory=dict)
    left_out_images: Counter = field(default_factory=Counter)

    @property
    def images(self) -> list[RawImage]:
        return [image for turn in self.turns for image in turn.images]

    @property
    def is_pair(self) -> bool:
        return self.turns[0].role == Role.CAPTION

    @property
    def is_page(self) -> bool:
        return self.turns[0].role == Role.DOCUMENT

    def load(self) -> None:
        """Read all images. Dead links of a page are left out of it and counted, unless no image is left."""
        dead, missing = [], None
        for image in self.images:
            try:
                image.load()
            except Missing as reason:
                if not image.linked:
                    raise
                dead.append(image)
                missing = missing or reason
        if dead and len(dead) == len(self.images):
            raise Unusable(f"none of the page's images is there: {missing}") from missing
        for turn in self.turns if dead else []:
            alive = [part for part in turn.parts if not any(part is image for image in dead)]
            turn.parts = join(alive, turn.between)
        self.left_out_images.update({"not_downloaded": len(dead)} if dead else {})

    def digest(self) -> bytes:
        """Equal for documents of the same turns; their images must be loaded."""
        state = hashlib.blake2b(digest_size=16)
        for turn in self.turns:
            state.update(f"turn {turn.role} {turn.bits} ".encode())
            for part in turn.parts:
                data = part.load() if isinstance(part, RawImage) else part.encode()
                state.update(f"{part.use if isinstance(part, RawImage) else 'text'} {len(data)} ".encode())
                state.update(data)
        return state.digest()
