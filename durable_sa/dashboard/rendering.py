"""Pages as HTML, in which every value is text, and as JSON."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final, cast
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic_core import to_json

from ..client.wording import call_text
from . import charts
from .forms import query
from .values import pretty
from .words import duration

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Characters that cannot be seen, that change the order of what stands beside them, or that no page can contain."""

_SYMBOLS: Final = {
    "pending": "○",
    "running": "●",
    "sleeping": "◐",
    "waiting": "◐",
    "completed": "✓",
    "failed": "✕",
    "timeout": "✕",
    "cancelled": "⊘",
    "live": "●",
    "silent": "◐",
    "lost": "✕",
    "ok": "✓",
    "problem": "✕",
    "late": "◐",
    "paused": "‖",
    "open": "●",
    "full": "■",
    "throttled": "◐",
    "closed": "⊘",
}


def shown(value: object) -> object:
    """Return a value as text for a page, with characters that cannot be seen as escapes; markup stays as it is."""
    match value:
        case None:
            return ""
        case Markup():
            return value
        case bool():
            return "yes" if value else "no"
        case str():
            return _HIDDEN.sub(_escaped, value)
        case int() | float():
            return value
        case _:
            return _HIDDEN.sub(_escaped, str(value))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def _time(value: object) -> object:
    """Return a time in UTC, which the browser turns into that of its place; anything else is shown as it is."""
    if not isinstance(value, datetime):
        return value
    at = value.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        at.isoformat(timespec="milliseconds"), f"{at:%Y-%m-%d %H:%M:%S}Z"
    )


def _state(status: str) -> Markup:
    """Return a status as a word with a symbol, so that it can be told without its colour."""
    symbol = _SYMBOLS.get(status, "·")
    return Markup('<span class="state {}"><i aria-hidden="true">{}</i>{}</span>').format(
        status if status in _SYMBOLS else "other", symbol, escape(shown(status))
    )


def _number(value: int | None, most: int = 1000) -> str:
    """Return a number that was counted up to `most`."""
    return "" if value is None else f"{most:,}+" if value > most else f"{value:,}"


def _short(value: uuid.UUID | str) -> str:
    """Return the part of an id by which it can be told from others: its end, which is random."""
    return f"…{str(value)[-12:]}"


def _anchor(parts: Sequence[object]) -> str:
    """Return the id of an element from the kind and the names of what it is about, however long they are.

    A page that refreshes itself knows rows by it, so that what is opened or typed stays with its row.
    """
    return f"a-{hashlib.sha256(repr([str(part) for part in parts]).encode()).hexdigest()[:16]}"


def _json(value: Any) -> str:
    return pretty(value)


@cache
def environment() -> Environment:
    """Return the templates."""
    found = Environment(
        loader=PackageLoader("durable_sa.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = found.filters  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    filters.update(
        time=_time,
        state=_state,
        number=_number,
        short=_short,
        duration=duration,
        call=call_text,
        pretty=_json,
        anchor=_anchor,
        since=_since,
        sparkline=_sparkline,
        bars=_bars,
        lines=_lines,
    )
    return found


def _since(value: datetime | None, now: datetime) -> str:
    return "" if value is None else duration(abs((now - value).total_seconds()))


def _sparkline(minutes: Sequence[Mapping[str, Any]]) -> charts.Bars:
    """Return the bars of the last hour of a queue, from the minutes in which tasks ended."""
    since = charts.HOUR.since(datetime.now(UTC))
    completed, failed = [0] * charts.HOUR.periods, [0] * charts.HOUR.periods
    for row in minutes:
        at = int((row["minute"] - since).total_seconds() // charts.HOUR.seconds)
        if 0 <= at < charts.HOUR.periods:
            completed[at], failed[at] = row["completed"], row["failed"]
    return charts.bars(completed, failed)


def _bars(periods: Sequence[Mapping[str, Any]]) -> charts.Bars:
    return charts.bars([row["completed"] for row in periods], [row["failed"] for row in periods])


def _lines(periods: Sequence[Mapping[str, Any]], name: str, greatest: float) -> list[str]:
    return charts.points([row[name] for row in periods], greatest)


class Urls:
    """The paths of the dashboard below the place at which it is mounted."""

    def __init__(self, base: str) -> None:
        self.base = base.rstrip("/")

    def __call__(self, path: str, /, **parameters: object) -> str:
        """Return a path with a query."""
        encoded = query(list(parameters.items()))
        return f"{self.base}{path}{'?' if encoded else ''}{encoded}"

    def task(self, task_id: uuid.UUID) -> str:
        """Return the path of a task."""
        return self(f"/tasks/{task_id}")

    def queue(self, name: str) -> str:
        """Return the path of a queue."""
        return self(self.queue_path(name))

    def queue_path(self, name: str) -> str:
        """Return the path of a queue below the place of the dashboard."""
        return f"/queues/{quote(name, safe='')}"


def render(template: str, context: Mapping[str, Any]) -> bytes:
    """Return a page as HTML."""
    return environment().get_template(template).render(context, now=datetime.now(UTC)).encode(errors="replace")


def as_json(data: Mapping[str, Any]) -> bytes:
    """Return the data of a page as JSON, with times in ISO 8601 and durations in seconds."""
    return to_json(_encodable(data), timedelta_mode="float", inf_nan_mode="null")


def _encodable(value: object) -> Any:
    """Return a value whose texts can be encoded: lone surrogates become escapes."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case Mapping():
            return {_encodable(str(key)): _encodable(item) for key, item in cast("Mapping[Any, Any]", value).items()}
        case list() | tuple():
            return [_encodable(item) for item in cast("list[object]", value)]
        case _:
            return value
