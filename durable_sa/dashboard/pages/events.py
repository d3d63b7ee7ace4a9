"""Events that were emitted, those that tasks wait for, and one of them with its waiters."""

from __future__ import annotations

from typing import Any, Final

from starlette.exceptions import HTTPException

from ...client.history import decoded
from ...statements import inspection
from ...statements import overview as statements
from ..view import View

_MOST_WAITERS: Final = 100


async def load(view: View) -> dict[str, Any]:
    """Load the latest events; with `name` and `queue_name`, one event."""
    name, queue_name = view.query.text("name"), view.query.text("queue_name")
    if name is not None and queue_name is not None:
        return await _one(view, name, queue_name)
    prefix = view.query.text("prefix") or ""
    return {
        "prefix": prefix,
        "events": await view.rows("events", statements.EVENTS, prefix=prefix),
        "awaited": await view.rows("awaited events", statements.AWAITED_EVENTS, prefix=prefix),
    }


async def _one(view: View, name: str, queue_name: str) -> dict[str, Any]:
    if not view.access.sees_queue(queue_name):
        raise HTTPException(404, f"There is no queue {queue_name!r}.")
    shared: dict[str, Any] = {"queue_name": queue_name, "name": name, "wanted": _MOST_WAITERS + 1}
    with_payloads = view.access.payloads
    found = await view.rows("event", inspection.EVENT, shared=not with_payloads, with_payloads=with_payloads, **shared)
    waiters = await view.rows("waiting tasks", inspection.EVENT_WAITERS, **shared)
    visible = await view.visible(row["task_id"] for row in waiters or ())
    event = {**found[0]} if found else None
    if event is not None:
        payload = decoded(event.pop("payload"))
        if with_payloads:
            event["payload"] = view.values("").prepare("event", payload, name)
    return {
        "name": name,
        "queue_name": queue_name,
        "event": event,
        "waiting": None if waiters is None else [row for row in waiters if row["task_id"] in visible][:_MOST_WAITERS],
        "more_wait": waiters is not None and len(waiters) > _MOST_WAITERS,
    }
