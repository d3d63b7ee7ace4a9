"""Limits: the policies of queues, and the states of their keys."""

from __future__ import annotations

from typing import Any, Final

from ...errors import InvalidConfiguration
from ...results import LimitKeyState
from ...statements import limiting
from ...statements import overview as statements
from ..view import View

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
    """Load the policies of one queue, and a page of its keys: those behind `limit_after`, in the `limit_state`, or all.

    With `limit_key`, only that key.
    """
    state, key, after = view.query.text("limit_state"), view.query.text("limit_key"), view.query.exact("limit_after")
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
