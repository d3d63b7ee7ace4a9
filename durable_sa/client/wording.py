"""Durations and calls as people read them, on the command line and in the dashboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast


def span(seconds: float | None) -> str:
    """Format a duration in its two largest units, such as `2 h 5 min`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s"
    rest, parts = round(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        if len(parts) == 2 or (parts and not count):
            break
    return " ".join(parts)


def call_text(arguments: object) -> str:
    """Format the arguments of a step as in a call, such as `(17, currency="EUR")`; others, redacted, as JSON."""
    match arguments:
        case {"args": list(), "kwargs": dict(), "cut": bool()}:
            given = cast("Mapping[str, Any]", arguments)
            shown = [_json(value) for value in given["args"]]
            shown += [f"{name}={_json(value)}" for name, value in given["kwargs"].items()]
            return f"({', '.join([*shown, '...'] if given['cut'] else shown)})"
        case _:
            return f"({_json(arguments)})"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
