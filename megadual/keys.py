"""What the keys of a config mean and may be, beside their fields; read by megadual/config.py."""

import copy
import dataclasses
import math
from typing import Any

MISSING = "???"  # OmegaConf's word for a key that has to be given
LARGEST = 1 << 63  # of whole numbers, as tensors hold them


@dataclasses.dataclass(frozen=True)
class Key:
    """What a key means, and what it may be: for lists and mappings what each of their values may be."""

    about: str
    least: float | None = None
    over: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; null passes unless there are choices without it."""
        if isinstance(value, (list, dict)):
            values = value.values() if isinstance(value, dict) else value
            return next(filter(None, map(self._problem, values)), None)
        if isinstance(value, str) and not value.strip() and self.choices is None:
            return "is empty; give it a value, or leave the key out"
        return self._problem(value)

    def _problem(self, value: Any) -> str | None:
        if self.choices is not None:
            return None if value in self.choices else f"is unknown; known: {', '.join(map(str, self._named()))}"
        if isinstance(value, str):
            return "holds a NUL character" if "\0" in value else None
        if value is None or isinstance(value, bool):
            return None
        fits = (
            (self.least is None or value >= self.least)
            and (self.over is None or value > self.over)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )  # nan fits no bound
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be {', '.join(filter(None, ['a finite number', self.bounds]))}"
        if fits and abs(value) >= LARGEST and isinstance(value, int):
            return "does not fit into 64 bits"
        return None if fits else f"must be {self.bounds}"

    @property
    def bounds(self) -> str:
        """In words; empty where there are none."""
        if self.choices is not None:
            return ", ".join(map(str, self._named()))
        if self.least is not None and self.most is not None:
            return f"between {_number(self.least)} and {_number(self.most)}"
        words = []
        if self.least is not None:
            words.append("0 or more" if self.least == 0 else f"at least {_number(self.least)}")
        for word, bound in (("over", self.over), ("at most", self.most), ("below", self.below)):
            words += [f"{word} {_number(bound)}"] if bound is not None else []
        return " and ".join(words)

    def _named(self) -> list:
        return [choice for choice in self.choices or () if choice is not None]


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def key(default: Any = MISSING, about: str = "", **may_be) -> Any:
    """A field of a schema: its default (none: it has to be given), what it means, and `Key`'s bounds or choices."""
    metadata = {"key": Key(about, **may_be)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
