"""The messages, values, streams and lines of a task, as sections of its page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, cast
from uuid import UUID

from ...client.history import decoded
from ...statements.task_parts import PARTS
from ..values import Values
from ..view import View

MOST_ITEMS: Final = 20
"""The last items of a stream that are shown."""
MOST_LINES: Final = 200
"""The last lines that are shown."""


async def load_parts(view: View, task_id: UUID, values: Values) -> dict[str, Any]:
    """Load the sections; each is None if the database takes too long."""
    payloads = view.access.payloads
    rows = await view.rows(
        "messages, values, streams and lines", PARTS, shared=False, task_id=task_id, payloads=payloads
    )
    parts: dict[str, Any] = {"messages": None, "published": None, "streams": None, "log": None}
    if rows is None:
        return parts
    by_kind: dict[str, list[dict[str, Any]]] = {"message": [], "value": [], "stream": [], "line": []}
    for row in rows:
        by_kind[row["part"]].append(row)
    parts["messages"] = [
        {"topic": row["name"], "sent_at": row["at"], **_shown(row, values, "message")} for row in by_kind["message"]
    ]
    parts["published"] = [
        {"name": row["name"], "updated_at": row["at"], **_shown(row, values, "value")} for row in by_kind["value"]
    ]
    parts["streams"] = [_stream(row, values) for row in by_kind["stream"]]
    lines = [line for row in by_kind["line"] for line in _lines(row, values)]
    position = max((row["position"] for row in by_kind["line"]), default=0)
    parts["log"] = {"position": position, "lines": lines[-MOST_LINES:] if payloads else None}
    return parts


def _shown(row: dict[str, Any], values: Values, part: str) -> dict[str, Any]:
    data: dict[str, Any] = {"size": row["size"]}
    if row["content"] is not None:
        data["value"] = values.prepare(part, decoded(row["content"]), row["name"])
    return data


def _stream(row: dict[str, Any], values: Values) -> dict[str, Any]:
    data = {"name": row["name"], "position": row["position"], "ended": row["ended"], "written_at": row["at"]}
    items = _list(row)
    if items is not None:
        data["items"] = values.prepare("stream", items[-MOST_ITEMS:], row["name"])
    return data


def _lines(row: dict[str, Any], values: Values) -> list[dict[str, Any]]:
    found = values.prepare("log", _list(row) or [])
    if not isinstance(found, list):
        return []
    lines = [cast("dict[str, Any]", line) for line in cast("list[object]", found) if isinstance(line, dict)]
    return [
        {"time": _time(line.get("time")), **{name: line.get(name) for name in ("level", "message", "attempt")}}
        for line in lines
    ]


def _time(value: object) -> object:
    """Return the time of a line, or what `redact` has made of it."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC) if isinstance(value, str) else value
    except (ValueError, OverflowError):
        return value


def _list(row: dict[str, Any]) -> list[Any] | None:
    found = None if row["content"] is None else decoded(row["content"])
    return cast("list[Any]", found) if isinstance(found, list) else None
