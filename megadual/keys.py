"""What the keys of a config mean and may be, beside their fields; read by megadual/config.py."""

import copy
import dataclasses
from typing import Any

MISSING = "???"  # OmegaConf's word for a key that has to be given


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
            return next(filter(None, map(self.problem, values)), None)
        if self.choices is not None:
            return None if value in self.choices else f"is unknown; known: {', '.join(map(str, self._named()))}"
        fits = (
            value is None
            or (self.least is None or value >= self.least)
            and (self.over is None or value > self.over)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        return None if fits else f"must be {self.bounds}"

    @property
    def bounds(self) -> str:
        """In words; empty where there are none."""
        if self.choices is not None:
            return ", ".join(map(str, self._named()))
        if self.least is not None and self.most is not None:
            return f"between {self.least:g} and {self.most:g}"
        words = []
        if self.least is not None:
            words.append("0 or more" if self.least == 0 else f"at least {self.least:g}")
        for word, bound in (("over", self.over), ("at most", self.most), ("below", self.below)):
            words += [f"{word} {bound:g}"] if bound is not None else []
        return " and ".join(words)

    def _named(self) -> list:
        return [choice for choice in self.choices or () if choice is not None]


def key(default: Any = MISSING, about: str = "", **may_be) -> Any:
    """A field of a schema: its default (none: it has to be given), what it means, and `Key`'s bounds or choices."""
    metadata = {"key": Key(about, **may_be)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
