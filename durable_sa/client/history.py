"""The history of a task from its stored rows: entries in the order of their beginnings, with times and details."""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple, cast

from pydantic_core import from_json
from sqlalchemy import Row

from ..results import HistoryEntry, TaskErrorInfo
from ..serialization.arguments import arguments_of
from ..serialization.stored_redaction import message_of, traceback_of

WITHOUT_MESSAGE = "(its message is data)"
"""In place of a message that consists of values."""

_Rows = Sequence[Row[Any]]


class Records(NamedTuple):
    """The rows of one task."""

    task: Row[Any]
    runs: _Rows
    checkpoints: _Rows
    waits: _Rows
    children: _Rows
    steps: _Rows


class StoredError(NamedTuple):
    """A stored failure, without values unless they were asked for."""

    info: TaskErrorInfo
    traceback: str | None
    arguments: Mapping[str, Any] | None
    """Those of the step."""


def stored_error(text: str | None, *, payloads: bool) -> StoredError | None:
    """Return a stored failure; of one that was written by hand, what can be read of it."""
    if text is None:
        return None
    fields = _object(text)
    name, message, raw = str(fields.get("name", "?")), str(fields.get("message", "")), fields.get("raw")
    step, traceback, arguments = fields.get("step"), fields.get("traceback"), fields.get("arguments")
    traceback = traceback if isinstance(traceback, str) and traceback else None
    if not payloads:
        shown = message_of(name, message, has_data=raw is not None)
        error = f"{name} {WITHOUT_MESSAGE}" if shown is None else f"{name}: {shown}" if shown else name
        message, traceback = WITHOUT_MESSAGE if shown is None else shown, traceback_of(traceback, error)
        raw = arguments = None
    info = TaskErrorInfo(name, message, raw, step if isinstance(step, str) else None)
    return StoredError(info, traceback, arguments_of(arguments))


def entries(records: Records, *, payloads: bool) -> list[HistoryEntry]:
    """Return the history of a task, in the order in which its parts began, or ended if that alone is known."""
    attempts = list(_attempts(records, payloads=payloads))
    begun = sorted((entry.began_at, entry.attempt) for entry in attempts if entry.began_at is not None)
    starts = [began_at for began_at, _ in begun]

    def placed(entry: HistoryEntry) -> HistoryEntry:
        moment = entry.ended_at or entry.began_at
        number = 0 if moment is None else bisect_right(starts, moment)
        return replace(entry, attempt=begun[number - 1][1] if number else 0)

    calls = chain(_recorded(records, payloads=payloads), _waiting(records))
    return sorted(chain(attempts, map(placed, calls), _in_progress(records)), key=_moment)


def _moment(entry: HistoryEntry) -> tuple[datetime, bool]:
    """Return the place of an entry; an attempt comes before what began at the same time."""
    moment = entry.began_at or entry.ended_at
    return moment or datetime.max.replace(tzinfo=UTC), entry.kind != "attempt"


def _attempts(records: Records, *, payloads: bool) -> Iterator[HistoryEntry]:
    for run in records.runs:
        error = stored_error(run.error, payloads=payloads)
        detail = _known(
            worker=run.worker or run.worker_id,
            error=error and error.info,
            traceback=error and error.traceback,
            arguments=error and error.arguments,
        )
        yield HistoryEntry("attempt", "", run.state, run.attempt, run.started_at, run.finished_at, detail)
    task = records.task
    if task.finished_at is None and task.started_at is not None and task.attempt > len(records.runs):
        status = "waiting" if task.state == "sleeping" else task.state
        yield HistoryEntry("attempt", "", status, task.attempt, task.started_at, None, _known(worker=task.worker))


def _recorded(records: Records, *, payloads: bool) -> Iterator[HistoryEntry]:
    children = {child.task_id: child for child in records.children}
    for checkpoint in records.checkpoints:
        child = children.pop(checkpoint.child_task_id, None) if checkpoint.kind == "spawn" else None
        yield (
            _child(checkpoint.name, child) if child is not None else _call(checkpoint, records.task, payloads=payloads)
        )
    for child in children.values():
        yield _child("", child)


def _child(name: str, child: Row[Any]) -> HistoryEntry:
    detail = {"task_id": child.task_id, "task_name": child.task_name}
    return HistoryEntry("child", name, child.state, 0, child.created_at, child.finished_at, detail)


def _call(checkpoint: Row[Any], task: Row[Any], *, payloads: bool) -> HistoryEntry:
    kind, name, ended_at = checkpoint.kind, checkpoint.name, checkpoint.created_at
    began_at = _before(ended_at, checkpoint.duration)
    if kind == "sleep":
        until = _time(checkpoint.value)
        # It is recorded when it has begun, and one of milliseconds is over by then.
        began_at, end, status = ended_at, until, "completed"
        if until is not None and task.finished_at is not None and task.finished_at < until:
            end, status = task.finished_at, "cancelled"
        elif until is not None and until > task.now:
            end, status = None, "waiting"
        return HistoryEntry(kind, name, status, 0, began_at, end and max(end, began_at), _known(until=until))
    if (kind, name) == ("value", "$try"):
        fields = _object(checkpoint.value)
        error = stored_error(checkpoint.value, payloads=payloads) if fields else None
        known = _known(error=error and error.info, arguments=error and error.arguments)
        return HistoryEntry("try", str(fields.get("step") or ""), "failed", 0, began_at, ended_at, known)
    related = "message_id" if kind == "message" else "task_id"
    detail = _known(**{related: checkpoint.child_task_id, "arguments": arguments_of(checkpoint.arguments)})
    if kind == "race":
        detail["winner"] = decoded(checkpoint.value)
    elif payloads and checkpoint.value is not None:
        detail["value"] = decoded(checkpoint.value)
    # Names that the engine chooses add nothing to the kind.
    name = "" if name.startswith("$") else name
    return HistoryEntry("child" if kind == "spawn" else kind, name, checkpoint.status, 0, began_at, ended_at, detail)


def _before(moment: datetime, duration: float | None) -> datetime | None:
    try:
        return None if duration is None else moment - timedelta(seconds=duration)
    except (ValueError, OverflowError):
        # A duration that was written by hand.
        return None


def _waiting(records: Records) -> Iterator[HistoryEntry]:
    for wait in records.waits:
        name = wait.event_name or ("" if wait.name.startswith("$") else wait.name)
        detail = _known(task_id=wait.child_task_id, until=wait.due_at)
        kind = _KINDS.get(wait.kind, str(wait.kind))
        yield HistoryEntry(kind, name, "waiting", 0, wait.created_at, None, detail)


def _in_progress(records: Records) -> Iterator[HistoryEntry]:
    task = records.task
    for step in records.steps:
        # The worker reckons when it began, and may reckon it earlier than the attempt.
        began_at = step.began_at if task.started_at is None else max(step.began_at, task.started_at)
        known = _known(arguments=arguments_of(step.arguments))
        yield HistoryEntry("step", step.name, "running", task.attempt, began_at, None, known)


def _known(**details: Any) -> dict[str, Any]:
    return {name: value for name, value in details.items() if value is not None}


def decoded(text: str | None) -> Any:
    """Decode stored JSON; what was written by hand and cannot be decoded stays as it is."""
    try:
        return None if text is None else from_json(text)
    except ValueError:
        return text


def _object(text: str | None) -> Mapping[str, Any]:
    stored: object = decoded(text)
    return cast(dict[str, Any], stored) if isinstance(stored, dict) else {}


def _time(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(decoded(text))
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


def waits_for(task: Row[Any]) -> str | None:
    """Describe what a task waits for."""
    words = _KINDS | {"join": "task"}
    reasons = [f"{words.get(kind, kind)} {_shown(name)}" for kind, name in from_json(task.waits or "[]")]
    if task.sleep is not None:
        reasons.append(f"sleep {task.sleep!r} until {task.available_at:%Y-%m-%d %H:%M:%S}Z")
    return ", ".join(reasons) or None


_KINDS = {"race message": "message"}
"""The kinds of stored waits that are known by another name outside."""


def _shown(name: str) -> str:
    try:
        return str(uuid.UUID(name))
    except ValueError:
        return repr(name)
