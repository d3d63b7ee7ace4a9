"""Limits: the policies of queues, and the states of their keys."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from ...errors import InvalidConfiguration
from ...results import LimitKeyState, TaskInfo, TaskStatus
from ...statements import limiting
from ...statements import overview as statements
from ..view import View
from ..words import Limited

MOST_KEYS: Final = 100
STATES: Final[tuple[LimitKeyState, ...]] = ("closed", "full", "throttled", "open")


async def load(view: View) -> dict[str, Any]:
    """Load the queues with limits, with their policies, and how many keys are in each state."""
    limits = await view.rows("limits", statements.LIMITS)
    if limits is None:
        return {"queues": None}
    queues: dict[str, dict[str, Any]] = {}
    for row in limits:
        name = row.pop("queue_name")
        queue = queues.setdefault(name, {"queue_name": name, "policies": [], "keys": {}})
        if row["scope"] is not None:
            queue["policies"].append(row)
    if queues:
        counted = await view.sections.read(
            "keys",
            lambda connection: view.fetch(connection, limiting.COUNT_KEYS, {"queue_names": list(queues)}),
            key=tuple(queues),
        )
        for row in counted or ():
            queues[row["queue_name"]]["keys"][row["state"]] = row["keys"]
    return {"queues": list(queues.values())}


async def of_queue(view: View, name: str) -> dict[str, Any]:
    """Load the policies of one queue, and a page of its keys: those after `limit_after`, in the `limit_state`, or all.

    With `limit_key`, only that key.
    """
    state, key, after = view.query.text("limit_state"), view.query.text("limit_key"), view.query.text("limit_after")
    if state is not None and state not in STATES:
        raise InvalidConfiguration("limit_state", f"{state[:80]!r} is none of {', '.join(STATES)}")
    if key is not None:
        state = after = None
    chosen = {"limit_state": state, "limit_key": key, "limit_after": after, "limit_next": None}
    found = await view.rows("limits", statements.LIMITS_OF_QUEUE, queue_name=name)
    if found is not None and not found:
        return {"limits": [], "limit_keys": [], **chosen}
    keys = await view.rows(
        "limit keys",
        limiting.LIST_KEYS,
        queue_name=name,
        state=state,
        first=key or after or "",
        after=after,
        most=1 if key is not None else MOST_KEYS + 1,
    )
    if keys is not None:
        if key is not None:
            keys = [row for row in keys if row["limit_key"] == key]
        elif len(keys) > MOST_KEYS:
            keys = keys[:MOST_KEYS]
            chosen["limit_next"] = keys[-1]["limit_key"]
    policies = None if found is None else [row for row in found if row["scope"] is not None]
    return {"limits": policies, "limit_keys": keys, **chosen}


async def of_task(view: View, task: TaskInfo, queue: dict[str, Any], now: datetime) -> list[Limited]:
    """Load the states of the limit key of a task that has not begun, and of its queue.

    The numbers of slots, which other tasks hold, are left out if a user may see only some tasks.
    """
    if not queue["limited"] or task.status != TaskStatus.PENDING:
        return []
    key, figures = task.limit_key or "", not view.access.only_tasks

    def slots(running: int, most: int) -> tuple[int, int] | None:
        return (running, most) if figures else None

    rows = None
    if key:
        parameters: dict[str, Any] = {"state": None, "first": key, "after": None, "most": 1}
        rows = await view.rows("limit key", limiting.LIST_KEYS, shared=False, queue_name=task.queue_name, **parameters)
    found = [
        Limited(f"key {key!r}", row["state"], row["opens_at"], slots(row["running"], row["concurrency"]))
        for row in rows or ()
        if row["limit_key"] == key
    ]
    most, running, opens_at = queue["concurrency"], queue["running"] or 0, queue["opens_at"]
    name = f"queue {task.queue_name!r}"
    if most is not None and running >= most:
        found.append(Limited(name, "full", slots=slots(running, most)))
    elif opens_at is not None and opens_at > now:
        found.append(Limited(name, "throttled", opens_at))
    return found
