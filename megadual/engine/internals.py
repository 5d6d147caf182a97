"""Reaching into a library's private parts, so that one that is gone fails by name."""

from importlib.metadata import version
from typing import Any

from megadual.errors import UserError


def reach(library: str, known: str, holder: Any, *names: str) -> Any:
    """`holder`'s attribute `names[0]`, of that `names[1]`, and so on.

    UserError where `library`, a package of which MegaDual knows the versions `known`, has none of that name.
    """
    for name in names:
        if not hasattr(holder, name):
            owner = getattr(holder, "__name__", type(holder).__name__)
            raise UserError(f"{library} {version(library)} has no {owner}.{name}: MegaDual knows {known}")
        holder = getattr(holder, name)
    return holder
