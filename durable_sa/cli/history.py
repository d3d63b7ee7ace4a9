"""The history of one task as text: facts, timeline, waits, subtasks and tracebacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from .. import HistoryEntry, TaskErrorInfo, TaskInfo
from ..client.history import WITHOUT_MESSAGE
from ..client.wording import call_text, span
from ..policies import SUSPECT_AFTER
from .output import Output, clean, shown
from .timeline import Moment, entries

_MESSAGE_CHARACTERS = 120
_SHOWN_CHILDREN = 10


def row(task: TaskInfo, *, payloads: bool = False) -> dict[str, Any]:
    """Return a task as data for JSON and tables."""
    data = {field.name: getattr(task, field.name) for field in fields(task)}
    data["state"] = data.pop("status")
    data["error_name"] = None if task.error is None else task.error.name
    data["error"] = None if task.error is None else asdict(task.error)
    if not payloads:
        for name in ("params", "headers", "output"):
            del data[name]
    return data


def data(history: Sequence[HistoryEntry]) -> list[dict[str, Any]]:
    """Return a history as data for JSON."""
    return [{**asdict(entry), "duration": entry.duration} for entry in history]


def timeline(task: TaskInfo, history: Sequence[HistoryEntry]) -> list[Moment]:
    """Return what is known to have happened, in order; what goes on is not part of it."""
    moments = [Moment(task.created_at, "spawned", f"into queue {task.queue_name}")]
    for entry in history:
        moments += _attempt(entry) if entry.kind == "attempt" else _call(entry)
    attempts = [entry for entry in history if entry.kind == "attempt"]
    if task.finished_at is not None and not (attempts and attempts[-1].status == task.status):
        failed = task.status == "failed"
        moments.append(Moment(task.finished_at, f"task {task.status}", attempt=task.attempt, failed=failed))
    # The sort is stable, so the end of the task stays last among entries of the same microsecond.
    return sorted(moments, key=lambda moment: moment.at)


def _attempt(entry: HistoryEntry) -> Iterator[Moment]:
    number, error = entry.attempt, entry.detail.get("error")
    if entry.began_at is not None:
        worker = f"by worker {entry.detail['worker']}" if "worker" in entry.detail else ""
        yield Moment(entry.began_at, f"attempt {number} starts", worker, attempt=number)
    if entry.ended_at is not None:
        detail = "" if error is None else _brief(error_text(error))
        if error is not None and "arguments" in entry.detail:
            detail += f" in step {error.step!r}{_arguments(entry)}"
        yield Moment(
            entry.ended_at, f"attempt {number} {entry.status}", detail, attempt=number, failed=error is not None
        )


def _call(entry: HistoryEntry) -> Iterator[Moment]:
    at = entry.began_at or entry.ended_at
    if at is None or (entry.status in ("running", "waiting") and entry.kind not in ("child", "sleep")):
        return
    took = None if entry.duration is None else entry.duration.total_seconds()
    name = f" {entry.name!r}{_arguments(entry)}" if entry.name else ""
    if entry.kind == "try":
        step, error = f" of step{name}" if name else " of a step", entry.detail.get("error")
        detail = "" if error is None else _brief(error_text(error))
        yield Moment(at, f"try{step} failed", detail, took, entry.attempt, failed=True)
        return
    details = [] if entry.status == "completed" else [entry.status]
    if "task_id" in entry.detail:
        details.append(f"task {entry.detail['task_id']}")
    if "message_id" in entry.detail:
        details.append(f"message {entry.detail['message_id']}")
    if "winner" in entry.detail:
        details.append(clean(str(entry.detail["winner"])))
    if entry.detail.get("value") is not None:
        details.append(clean(json.dumps(entry.detail["value"], ensure_ascii=False)))
    failed = entry.status in ("failed", "cancelled", "timeout")
    yield Moment(at, f"{entry.kind}{name}", " ".join(details), took, entry.attempt, failed=failed)


def print_history(
    task: TaskInfo,
    parent: TaskInfo | None,
    history: Sequence[HistoryEntry],
    output: Output,
    *,
    last: bool,
    failed: bool,
    everything: bool,
) -> None:
    """Print a task: facts, timeline, waits, subtasks, and the error that it ended with or was last retried for.

    `last` prints only the last attempt, `failed` only what failed, with the traceback of each attempt.
    """
    output.print_table(_facts(task, parent), {"fact": "", "value": ""}, headed=False)
    moments = timeline(task, history)
    if last:
        moments = [moment for moment in moments if moment.attempt == task.attempt]
    if failed:
        moments = [moment for moment in moments if moment.failed]
    output.heading("timeline")
    print_timeline(moments, output, everything=everything)
    running = [entry for entry in history if entry.kind == "step" and entry.status == "running"]
    if running:
        output.heading("steps in progress")
        rows = [
            {"step": entry.name + _arguments(entry), "started_at": entry.began_at, "duration": _since(entry)}
            for entry in running
        ]
        output.print_table(rows, {"step": "step", "started_at": "since", "duration": "for"})
    waits = [entry for entry in history if entry.status == "waiting" and entry.kind not in ("attempt", "child")]
    if waits:
        output.heading("waits for")
        columns = {"kind": "kind", "awaited": "name", "since_at": "since", "until": "until"}
        output.print_table([_wait(entry) for entry in waits], columns)
    children = [entry for entry in history if entry.kind == "child" and "task_name" in entry.detail]
    if children:
        output.heading("subtasks")
        columns = {"task_id": "subtask", "task_name": "name", "state": "state", "finished_at": "finished"}
        rows = [{**entry.detail, "state": entry.status, "finished_at": entry.ended_at} for entry in children]
        printed = rows if everything else rows[:_SHOWN_CHILDREN]
        output.print_table(printed, columns)
        if len(rows) > len(printed):
            output.say(f"and {len(rows) - len(printed)} more (--all)")
    _print_tracebacks(history, output, each=failed)


def print_timeline(moments: Sequence[Moment], output: Output, *, everything: bool) -> None:
    """Print moments as a table; many of them are grouped unless `everything` is wanted."""
    rows = [entry.row() for entry in entries(moments, everything=everything)]
    output.print_table(rows, {"at": "time", "took": "took", "what": "what happened", "detail": "detail"})


def _arguments(entry: HistoryEntry) -> str:
    return clean(call_text(entry.detail["arguments"])) if "arguments" in entry.detail else ""


def _since(entry: HistoryEntry) -> str:
    return "" if entry.began_at is None else span((datetime.now(UTC) - entry.began_at).total_seconds())


def _wait(entry: HistoryEntry) -> dict[str, Any]:
    awaited = entry.name or entry.detail.get("task_id")
    return {"kind": entry.kind, "awaited": awaited, "since_at": entry.began_at, "until": entry.detail.get("until")}


def _print_tracebacks(history: Sequence[HistoryEntry], output: Output, *, each: bool) -> None:
    failures = [entry for entry in history if "traceback" in entry.detail]
    for entry in failures if each else failures[-1:]:
        output.heading(f"traceback of {f'attempt {entry.attempt}' if each else 'the last failure'}")
        output.say(entry.detail["traceback"].rstrip())


def _losses(count: int) -> str | None:
    """Describe how many workers in a row were lost while they ran a task, and what that means for it."""
    if count <= 0:
        return None
    return f"{count} in a row" + (", so it runs alone" if count >= SUSPECT_AFTER else "")


def _facts(task: TaskInfo, parent: TaskInfo | None) -> list[dict[str, str]]:
    unfinished = task.finished_at is None
    began, ended = task.first_started_at, task.finished_at
    facts: dict[str, Any] = {
        "task": task.task_id,
        "name": task.task_name,
        "state": task.status,
        "queue": task.queue_name,
        "attempt": f"{task.attempt} ({task.failures} of {task.max_attempts} failures)",
        "lost workers": _losses(task.lost_workers) if unfinished else None,
        "priority": task.priority or None,
        "key": task.key,
        "parent": parent and f"{parent.task_id} ({parent.task_name}, {parent.status})",
        "worker": task.worker,
        "spawned": task.created_at,
        "available": task.available_at if unfinished else None,
        "started": _later(began, task.created_at),
        "ended": _later(ended, began or task.created_at),
        "error": None if task.error is None else error_text(task.error),
        "params": _json(task.params),
        "headers": _json(task.headers),
        "output": _json(task.output),
        "data of the error": None if task.error is None else _json(task.error.raw),
    }
    return [{"fact": fact, "value": shown(value)} for fact, value in facts.items() if value is not None]


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _later(moment: datetime | None, before: datetime) -> str | None:
    return None if moment is None else f"{shown(moment)}, {span((moment - before).total_seconds())} later"


def error_text(error: TaskErrorInfo) -> str:
    """Return the class and the message of an error."""
    if error.message == WITHOUT_MESSAGE:
        return f"{error.name} (its message is data: --payloads)"
    return f"{error.name}: {error.message}" if error.message else error.name


def _brief(error: str) -> str:
    """Return an error as one line that is not too long."""
    line = " ".join(error.split())
    return clean(line if len(line) <= _MESSAGE_CHARACTERS else f"{line[:_MESSAGE_CHARACTERS]}...")
