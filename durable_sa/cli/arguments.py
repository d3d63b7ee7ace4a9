"""Parsers of arguments: durations, times, JSON, headers."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import typer

from ..errors import InvalidConfiguration
from ..validation import MAX_DURATION, timestamp

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])?(?:i?b)?")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)?")


def duration(text: str) -> timedelta:
    """Parse a duration such as `90s`, `15m`, `12h`, `7d` or `2w`; a number alone is in seconds."""
    if match := _SPAN.fullmatch(text.strip().lower()):
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
        if seconds > MAX_DURATION:
            raise typer.BadParameter(f"{text!r} is longer than 100 years.")
        return timedelta(seconds=seconds)
    raise typer.BadParameter(f"{text!r} is not a duration. Write, for example, 90s, 15m, 12h or 7d.")


def size(text: str) -> int:
    """Parse an amount of memory such as `512M` or `1.5G`, in units of 1024; a number alone is in bytes."""
    if match := _SIZE.fullmatch(text.strip().lower()):
        return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
    raise typer.BadParameter(f"{text!r} is not an amount of memory. Write, for example, 512M or 2G.")


def numbered(text: str) -> tuple[str, int]:
    """Parse a name and a number, such as `llm=10`."""
    name, separator, number = text.rpartition("=")
    if not (separator and name and number.strip().isdigit()):
        raise typer.BadParameter(f"{text!r} is not a name and a number. Write, for example, llm=10.")
    return name, int(number)


def retention(text: str) -> timedelta | Literal["never"]:
    """Parse a duration or `never`."""
    return "never" if text.strip().lower() == "never" else duration(text)


def moment(text: str) -> datetime | timedelta:
    """Parse an ISO 8601 time with a UTC offset, or a duration before now."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return duration(text)
    if parsed.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no time zone. Add an offset: {parsed.isoformat()}Z")
    try:
        return timestamp(parsed, "time")
    except InvalidConfiguration:
        raise typer.BadParameter(f"{text!r} is not between the years 1000 and 9000.") from None


def json_value(text: str) -> Any:
    """Parse JSON; `@FILE` reads it from a file, `@-` from stdin."""
    source = {"@-": "stdin"}.get(text, text[1:]) if text.startswith("@") else None
    if source is not None:
        try:
            # Some programs write a byte order mark.
            text = (sys.stdin.read() if text == "@-" else Path(source).read_text("utf-8")).removeprefix("\ufeff")
        except OSError as error:
            raise typer.BadParameter(f"{source}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise typer.BadParameter(f"{source}: it is not JSON, because it is not UTF-8.") from None
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _DuplicateKey:
        raise typer.BadParameter("An object in the JSON has the same key twice. Remove one of them.") from None
    except (ValueError, RecursionError) as error:
        # The message does not quote the text, because it may be secret.
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        if source is not None:
            raise typer.BadParameter(f"{source}: it is not valid JSON{place}.") from None
        raise typer.BadParameter(
            f"The value is not valid JSON{place}. Quote strings twice for the shell: '\"text\"'."
        ) from None


class _DuplicateKey(Exception):  # noqa: N818 - never leaves this module
    """A key occurs twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _DuplicateKey
    return result


def headers(pairs: list[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` pairs."""
    for pair in pairs:
        if "=" not in pair:
            raise typer.BadParameter("Write headers as NAME=VALUE.")
    try:
        return _object([(name, value) for name, _, value in (pair.partition("=") for pair in pairs)])
    except _DuplicateKey:
        raise typer.BadParameter("The same header is given twice.") from None
