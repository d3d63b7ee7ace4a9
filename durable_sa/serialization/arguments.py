"""The arguments of steps as they are kept for operators: the beginning of their canonical JSON."""

from __future__ import annotations

from typing import Any, Final, cast

from pydantic_core import from_json

from .canonical import NO_ARGUMENTS
from .codec import in_ascii

KEPT_CHARACTERS: Final = 100
"""Each costs at least a byte of each checkpoint, which has 120 bytes without arguments."""


def summary(arguments: str) -> str | None:
    """Return what is kept of encoded arguments; None if there are none.

    It is ASCII, so that a database of any encoding can store it.
    """
    return in_ascii(arguments[:KEPT_CHARACTERS]) if arguments and arguments != NO_ARGUMENTS else None


def arguments_of(summary: object) -> dict[str, Any] | None:
    """Return the arguments by `args`, `kwargs` and `cut`, which is True if their end was not kept.

    None if there are none, or if what is stored was written by hand.
    """
    if not isinstance(summary, str):
        return None
    cut = False
    try:
        stored = from_json(summary)
    except ValueError:
        cut = True
        try:
            stored = from_json(summary, allow_partial="trailing-strings")
        except ValueError:
            return None
    match stored:
        case [list(), dict()] | [list()]:
            kept = cast("list[Any]", stored)
            return {"args": kept[0], "kwargs": kept[1] if len(kept) > 1 else {}, "cut": cut}
        case _:
            return None
