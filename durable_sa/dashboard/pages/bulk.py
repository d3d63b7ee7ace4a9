"""The page before an action on all tasks that match: how many there are, and what will be done."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from starlette.exceptions import HTTPException

from ...results import TaskFilter, TaskStatus
from ...statements import overview as statements
from ..forms import FIELDS, Fields, query
from ..view import View

STATES: Final = {
    "cancel": (TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.SLEEPING),
    "retry": (TaskStatus.FAILED, TaskStatus.CANCELLED),
    "delete": (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED),
}
"""The states in which an action does something."""
COUNTED: Final = 10_000


async def load(view: View) -> dict[str, Any]:
    """Count the tasks that an `action` would be done to."""
    action = view.query.required("action")
    if action not in STATES:
        raise HTTPException(400, f"{action!r} is none of {', '.join(STATES)}.")
    if not view.access.may(action):
        raise HTTPException(403, f"You may not {action} tasks.")
    until = view.query.text("until") or datetime.now(UTC).isoformat()
    chosen = apt(action, view.query, until)
    counted = None
    if chosen is not None:
        counted = await view.rows("number", statements.count(view.access.tasks(chosen), COUNTED), shared=False)
    matched: int | None = 0 if chosen is None else None if counted is None else next(iter(counted[0].values()))
    filters = view.query.only(FIELDS)
    return {
        "action": action,
        "matched": None if matched is None else min(matched, COUNTED),
        "more": matched is not None and matched > COUNTED,
        "filters": filters,
        "query": query(filters),
        "until": until,
    }


def apt(action: str, fields: Fields, until: str) -> TaskFilter | None:
    """Return the filter of the tasks to which an action applies, None if there can be none.

    Tasks that were spawned, or that ended, after the time `until` do not match: a task that is retried and fails once
    more is not retried without an end.
    """
    chosen = fields.filter()
    states = [state for state in STATES[action] if not chosen.states or state in chosen.states]
    if not states:
        return None
    bound = "spawned_before" if action == "cancel" else "ended_before"
    limit = Fields([(bound, until)]).filter()
    latest: datetime | None = getattr(limit, bound)
    given: datetime | None = getattr(chosen, bound)
    if latest is not None and (given is None or latest < given):
        more: dict[str, Any] = {bound: latest}
        chosen = replace(chosen, **more)
    return replace(chosen, state=states)
