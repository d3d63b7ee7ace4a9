"""The list of tasks, by filters in the URL."""

from __future__ import annotations

import uuid
from typing import Any, Final, cast

from sqlalchemy.engine import Connection

from ...client.reading import search_tasks
from ...errors import InvalidConfiguration
from ...results import Page, TaskInfo, TaskStatus
from ...statements.reading import SEARCHED, Order
from ..forms import FIELDS, query
from ..view import Redirect, View, relatives, task_data, without_hidden

PAGE: Final = 50
QUICK: Final = 0.06
"""Seconds within which the tasks that match are looked for among all; if it takes longer, among a part of them."""
BOUNDED: Final = 0.5
"""The same for tasks before a time: those of the next day are read first, because a client's clock may be ahead."""


async def load(view: View) -> dict[str, Any]:
    """Load a page of tasks. `find` is an id or a key, as it is typed into the box for searching.

    Some filters are known to no index, so that all tasks would have to be read. Then the page is of those among the
    next `SEARCHED` that match, and says so; with `search=all` it takes its time, with `search=part` it does not try.
    """
    fields = view.query
    if (wanted := fields.text("find")) is not None:
        raise Redirect(_place(wanted))
    where = view.access.tasks(fields.filter())
    order = cast("Order", fields.text("order") or "newest")
    after, limit, search = fields.text("after"), _limit(fields.text("limit")), fields.text("search")

    def among_all(connection: Connection) -> Page[TaskInfo]:
        return view.durable.list_tasks_with(connection, where, order=order, limit=limit, after=after)

    def among_some(connection: Connection) -> tuple[Page[TaskInfo], bool]:
        return search_tasks(connection, view.durable.schema, where, order, limit, after)

    page, is_part = None, False
    if order == "running" or search == "all":
        page = await view.read("tasks", among_all, statements=2)
    else:
        if search != "part":
            bounded = fields.text("spawned_before") or fields.text("ended_before")
            page = await view.read("tasks", among_all, statements=2, within=BOUNDED if bounded else QUICK)
        found = None
        if page is None and not view.sections.late:
            found = await view.read("tasks", among_some, statements=2)
        if found is not None:
            page, is_part = found[0], not found[1]
    items = [] if page is None else page.items
    if view.access.only_tasks or view.access.queues is not None:
        visible = await view.visible({task_id for task in items for task_id in relatives(task)})
        items = [without_hidden(task, visible) for task in items]
    filters = fields.only(FIELDS)
    following = None if page is None or page.next is None else page.next
    return {
        "tasks": None if page is None else [task_data(task) for task in items],
        "next": following,
        "searched": SEARCHED if is_part else None,
        "order": order,
        "filters": _by_name(filters),
        "states": list(TaskStatus),
        "query": query(filters),
        "after": after,
    }


def _place(wanted: str) -> str:
    try:
        return f"/tasks/{uuid.UUID(wanted.strip())}"
    except ValueError:
        return f"/tasks?{query([('key', wanted)])}"


def _limit(text: str | None) -> int:
    if text is None:
        return PAGE
    if not text.isdecimal() or len(text) > 4 or not 1 <= int(text) <= 1000:
        raise InvalidConfiguration("limit", f"{text[:80]!r} is no number from 1 to 1000")
    return int(text)


def _by_name(pairs: list[tuple[str, str]]) -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = {}
    for name, value in pairs:
        if name == "state":
            cast("list[str]", found.setdefault("state", [])).append(value)
        else:
            found[name] = value
    return found
