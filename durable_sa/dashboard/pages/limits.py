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
    """Load the policies of one queue, and its keys in the `limit_state` of the query, or all."""
    state = view.query.text("limit_state")
    if state is not None and state not in STATES:
        raise InvalidConfiguration("limit_state", f"{state[:80]!r} is none of {', '.join(STATES)}")
    found = await view.rows("limits", statements.LIMITS_OF_QUEUE, queue_name=name)
    if found is not None and not found:
        return {"limits": [], "limit_keys": [], "limit_state": state}
    keys = await view.rows("limit keys", limiting.LIST_KEYS, queue_name=name, state=state, most=MOST_KEYS)
    policies = None if found is None else [row for row in found if row["scope"] is not None]
    return {"limits": policies, "limit_keys": keys, "limit_state": state}
