"""The overview, queues and workers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from starlette.exceptions import HTTPException

from ...client.history import decoded
from ...statements import minutes
from ...statements import overview as statements
from .. import charts
from ..view import DAY, View
from . import limits
from .schedules import upcoming

_OLD_SECONDS = 300.0
_NAMES = 100
"""Names of tasks beside a chart."""


async def overview(view: View) -> dict[str, Any]:
    """Load the queues, the workers, the next ticks, and what wants attention."""
    found = await view.rows("queues", statements.QUEUES, age=DAY)
    live = await _workers(view)
    ticks = await view.rows("schedules", statements.SCHEDULES)
    schedules = None if ticks is None else upcoming(ticks)
    return {
        "queues": found,
        "throughput": await _throughput(view),
        "workers": live,
        "schedules": None if schedules is None else [row for row in schedules if row["next_tick_at"] is not None][:8],
        "attention": list(_attention(found or [], live or [])),
    }


def _attention(queues: list[dict[str, Any]], workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what an operator should look at, as sentences with the page that shows more."""
    found: list[dict[str, Any]] = []
    for row in queues:
        name, oldest = row["queue_name"], row["oldest_ready_seconds"] or 0.0
        if row["paused_at"] is not None:
            found.append({"text": f"Queue {name!r} is paused.", "queue_name": name})
        elif row["ready"] and not row["workers"]:
            found.append({"text": f"No worker serves queue {name!r}, and tasks of it are due.", "queue_name": name})
        elif oldest > _OLD_SECONDS:
            text = f"Tasks of queue {name!r} have been due for {int(oldest // 60)} minutes."
            found.append({"text": text, "queue_name": name})
    silent = [row["name"] for row in workers if row["status"] == "silent"]
    return [*found, *({"text": f"Worker {name} is silent.", "worker": name} for name in silent)]


async def queues(view: View) -> dict[str, Any]:
    """Load the queues."""
    return {
        "queues": await view.rows("queues", statements.QUEUES, age=DAY),
        "throughput": await _throughput(view),
    }


async def _throughput(view: View) -> dict[str, list[dict[str, Any]]] | None:
    """Load the numbers of tasks of each queue that ended in each minute of the last hour."""
    since = charts.HOUR.since(datetime.now(UTC))
    rows = await view.rows("the last hour", minutes.LATEST, since=since)
    if rows is None:
        return None
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.pop("queue_name"), []).append(row)
    return {name: sorted(of_queue, key=lambda row: row["minute"]) for name, of_queue in found.items()}


async def queue(view: View) -> dict[str, Any]:
    """Load one queue with its limits, workers and schedules."""
    name: str = view.path["queue_name"]
    if not view.access.sees_queue(name) or "\0" in name:
        raise HTTPException(404, f"There is no queue {name!r}.")
    found = await view.rows("queues", statements.QUEUE, age=DAY, queue_name=name)
    chosen = next((row for row in found or () if row["queue_name"] == name), None)
    if chosen is None and found is not None:
        raise HTTPException(404, f"There is no queue {name!r}.")
    chart = await _chart(view, name)
    live, ticks = await _workers(view), await view.rows("schedules", statements.SCHEDULES)
    return {
        "queue_name": name,
        "queue": chosen,
        "chart": chart,
        **await limits.of_queue(view, name),
        "workers": None if live is None else [row for row in live if name in row["queue_names"]],
        "schedules": None if ticks is None else [row for row in upcoming(ticks) if row["queue_name"] == name],
    }


async def _chart(view: View, queue_name: str) -> dict[str, Any]:
    """Load the tasks of a queue that ended in the periods of a window, `1h` unless another is chosen, and their names.

    Raises:
        HTTPException: 400, there is no such window.
    """
    chosen = view.query.text("window") or charts.HOUR.name
    window = next((window for window in charts.WINDOWS if window.name == chosen), None)
    if window is None:
        known = ", ".join(window.name for window in charts.WINDOWS)
        raise HTTPException(400, f"There is no window {chosen[:80]!r}. There are {known}.")
    task_name, since = view.query.text("task_name"), window.since(datetime.now(UTC))
    rows = await view.rows(
        "the chart", minutes.OF_QUEUE, queue_name=queue_name, task_name=task_name, since=since, seconds=window.seconds
    )
    about = {"window": window.name, "seconds": window.seconds, "since": since, "task_name": task_name}
    if rows is None:
        return {**about, "periods": None, "tasks": None}
    names = [
        {"task_name": row["task_name"], **charts.numbers(row)}
        for row in sorted(rows, key=lambda row: (-(row["completed"] + row["failed"]), row["task_name"] or ""))
        if row["task_name"] is not None
    ]
    return {
        **about,
        "periods": charts.periods((row for row in rows if row["task_name"] is None), window, since),
        "tasks": names[:_NAMES],
    }


async def workers(view: View) -> dict[str, Any]:
    """Load the workers."""
    return {"workers": await _workers(view)}


async def _workers(view: View) -> list[dict[str, Any]] | None:
    rows = await view.rows("workers", statements.WORKERS)
    if rows is None:
        return None
    for row in rows:
        lost, silent = row["lost_at"] is not None, row.pop("expired")
        row["status"] = "lost" if lost else "silent" if silent else "live"
        served = len(row["queue_names"])
        row["queue_names"] = [name for name in row["queue_names"] if view.access.sees_queue(name)]
        steps = decoded(row.pop("long_steps"))
        # The list does not say of which queue a step is.
        is_whole = len(row["queue_names"]) == served
        row["steps"] = len(cast("list[object]", steps)) if is_whole and isinstance(steps, list) else 0
    return rows
