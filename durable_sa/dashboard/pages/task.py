"""One task: why it waits, its history on a scale of time, its errors, and its values if they may be shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy.engine import Connection
from starlette.exceptions import HTTPException

from ...client.reading import read_history
from ...errors import TaskNotFound
from ...results import HistoryEntry, TaskErrorInfo, TaskInfo
from ...statements import overview as statements
from ..timeline import Scale
from ..values import Values
from ..view import View, relatives, task_data, without_hidden
from ..words import reasons
from . import limits
from .parts import load_parts

PART: Final = 200
"""Entries of the history that are shown at once."""
_BAD: Final = ("failed", "cancelled", "timeout")


async def load(view: View) -> dict[str, Any]:
    """Load a task with its history, from entry number `from` on; `only=failed` and `text` choose among the entries."""
    task_id = view.path["task_id"]
    await view.require_task(task_id)
    payloads = view.access.payloads

    def work(connection: Connection) -> TaskInfo:
        return view.durable.get_task_with(connection, task_id, payloads=payloads)

    def history_of(connection: Connection) -> list[HistoryEntry]:
        return read_history(connection, view.durable.schema, task_id, payloads=payloads)

    try:
        task = await view.read("task", work)
        history = None if task is None else await view.read("history", history_of, statements=6)
    except TaskNotFound:
        raise HTTPException(404, f"There is no task {task_id}.") from None
    if task is None:
        return {"task_id": task_id, "task": None, "history": None}
    now = datetime.now(UTC)
    queue: dict[str, Any] | None = None
    if task.finished_at is None:
        rows = await view.rows("queue", statements.QUEUE_OF_TASK, shared=False, task_id=task_id)
        queue = rows[0] if rows else None
    limited = await limits.of_task(view, task, queue, now) if queue is not None else []
    related = [entry.detail["task_id"] for entry in history or () if "task_id" in entry.detail]
    visible = await view.visible([*related, *relatives(task)])
    task = without_hidden(task, visible)
    why = reasons(task, history or [], queue, now, limited)
    values = view.values(task.task_name)
    shown = task_data(task)
    if payloads and task.error is not None:
        shown["error"]["message"] = values.prepare("error", task.error.message, "message")
    data: dict[str, Any] = {
        "task": shown,
        "parent": None if task.parent_task_id is None else visible.get(task.parent_task_id),
        "reasons": [
            reason._asdict() if reason.task_id in visible else {**reason._asdict(), "task_id": None} for reason in why
        ],
        "payloads": payloads,
    }
    if payloads:
        data["values"] = _values(task, values)
    data |= await load_parts(view, task_id, values)
    # What may not be seen is not found either.
    entries = [_without_hidden(entry, visible) for entry in history or ()]
    chosen = _chosen(entries, view.query.text("only"), view.query.text("text"))
    first = _first(view.query.text("from"), len(chosen))
    part = chosen[first : first + PART]
    scale = Scale(part, min([task.created_at, *_begins(part)]) if first == 0 else min(_begins(part), default=now), now)
    data["history"] = None if history is None else [_entry(entry, visible, values, scale) for entry in part]
    data["entries"] = {"from": first, "shown": len(part), "found": len(chosen), "all": len(history or ())}
    data["gaps"] = [gap._asdict() for gap in scale.gaps]
    data["filters"] = {"only": view.query.text("only"), "text": view.query.text("text")}
    return data


def _begins(entries: Sequence[HistoryEntry]) -> list[datetime]:
    moments = (entry.began_at or entry.ended_at for entry in entries)
    return [moment for moment in moments if moment is not None]


def _first(text: str | None, number: int) -> int:
    first = int(text) if text is not None and text.isdecimal() and len(text) < 10 else 0
    return first if first < number else 0


def _chosen(history: Iterable[HistoryEntry], only: str | None, text: str | None) -> list[HistoryEntry]:
    found = list(history)
    if only == "failed":
        found = [entry for entry in found if entry.status in _BAD]
    if text is not None:
        wanted = text.casefold()
        found = [entry for entry in found if wanted in f"{entry.kind} {entry.name}".casefold()]
    return found


def _without_hidden(entry: HistoryEntry, visible: Mapping[Any, Any]) -> HistoryEntry:
    """Return an entry about a subtask without its name and status if the user may not see it."""
    if entry.kind != "child" or entry.detail.get("task_id") in visible:
        return entry
    return replace(entry, name="", status="")


def _values(task: TaskInfo, values: Values) -> dict[str, Any]:
    shown = {
        part: values.prepare(part, value)
        for part, value in (("params", task.params), ("headers", task.headers), ("output", task.output))
        if value is not None
    }
    if task.error is not None and task.error.raw is not None:
        shown["error"] = values.prepare("error", task.error.raw)
    return shown


def _entry(entry: HistoryEntry, visible: Mapping[Any, Any], values: Values, scale: Scale) -> dict[str, Any]:
    detail = dict(entry.detail)
    data: dict[str, Any] = {
        "kind": entry.kind,
        "name": entry.name,
        "status": entry.status,
        "attempt": entry.attempt,
        "began_at": entry.began_at,
        "ended_at": entry.ended_at,
        "duration": None if entry.duration is None else entry.duration.total_seconds(),
        "until": detail.get("until"),
        "worker": detail.get("worker"),
        "traceback": None,
    }
    if "traceback" in detail:
        data["traceback"] = values.prepare("error", detail["traceback"], "traceback")
    error = detail.get("error")
    if isinstance(error, TaskErrorInfo):
        message = values.prepare("error", error.message, "message")
        data["error"] = {"name": error.name, "message": message, "step": error.step}
    related = detail.get("task_id")
    if related in visible:
        data.update(task_id=related, task_name=visible[related].task_name)
    if "arguments" in detail:
        # Under the step, also those of an attempt's failure, so that `redact` finds them at one place.
        step = entry.name or (error.step if isinstance(error, TaskErrorInfo) else None) or ""
        data["arguments"] = values.prepare("step", detail["arguments"], step, "arguments")
    if "value" in detail:
        data["value"] = values.prepare("step", detail["value"], entry.name)
    bar = scale.bar(entry)
    data["bar"] = None if bar is None else bar._asdict()
    return data
