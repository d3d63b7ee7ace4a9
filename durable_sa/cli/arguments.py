"""Arguments that have a form of their own: spans of time, points in time, JSON, headers."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import typer

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)?")


def duration(text: str) -> timedelta:
    """`90`, `90s`, `15m`, `12h`, `7d`, `2w`: seconds where no unit is given."""
    if match := _SPAN.fullmatch(text.strip().lower()):
        with contextlib.suppress(OverflowError):
            return timedelta(seconds=float(match[1]) * _UNITS[match[2] or "s"])
    raise typer.BadParameter(f"{text!r} is no span of time. Write 90s, 15m, 12h or 7d.")


def retention(text: str) -> timedelta | Literal["never"]:
    """A span of time, or `never`."""
    return "never" if text.strip().lower() == "never" else duration(text)


def moment(text: str) -> datetime | timedelta:
    """A time of day and date with its offset, or a span of time before now."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return duration(text)
    if parsed.tzinfo is None:
        raise typer.BadParameter(f"{text!r} does not say in which time zone. Add an offset: {text}Z")
    return parsed


def json_value(text: str) -> Any:
    """JSON, or `@FILE` that has some, or `@-` for what comes on stdin."""
    if text.startswith("@"):
        try:
            text = sys.stdin.read() if text == "@-" else Path(text[1:]).read_text()
        except OSError as error:
            raise typer.BadParameter(f"{text[1:]}: {error.strerror}") from error
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _Twice:
        raise typer.BadParameter("An object in that JSON has the same key twice, and only one could count.") from None
    except (ValueError, RecursionError) as error:
        # Of the text itself nothing is shown: it may be secret.
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise typer.BadParameter(f"That is no JSON{place}. A string is written '\"so\"'.") from None


class _Twice(Exception):  # noqa: N818 - never leaves this module
    """A key occurs twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Twice
    return made


def headers(pairs: list[str]) -> dict[str, str]:
    """`NAME=VALUE` pairs."""
    for pair in pairs:
        if "=" not in pair:
            raise typer.BadParameter("A header is written NAME=VALUE.")
    try:
        return _object([(name, value) for name, _, value in (pair.partition("=") for pair in pairs)])
    except _Twice:
        raise typer.BadParameter("The same header is given twice.") from None
