"""The history of one task: its state, attempts, checkpoints, steps in progress, waits and subtasks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from pydantic_core import from_json
from sqlalchemy import Executable

from ..database.connections import Database
from ..policies import SUSPECT_AFTER
from ..statements import inspection
from .output import Output, as_dicts, clean, shown, span
from .redaction import message_of, traceback_of, without_values
from .timeline import Moment, entries, with_durations

_MESSAGE_CHARACTERS = 120
_CHILDREN = 100
_SHOWN_CHILDREN = 10

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """A task with its attempts, checkpoints, waits and subtasks, as read from the database."""

    task: Fields
    runs: list[Fields]
    """The ended attempts."""
    checkpoints: list[Fields]
    waits: list[Fields]
    children: list[Fields]
    long_steps: list[Fields]
    """Steps in progress that have run for more than a second."""

    def as_data(self) -> dict[str, Any]:
        """Return everything as data for JSON, with decoded payloads."""
        data = {
            "task": _decoded(self.task),
            "runs": [_decoded(run) for run in self.runs],
            "checkpoints": [_decoded(checkpoint) for checkpoint in self.checkpoints],
            "waits": self.waits,
            "children": self.children,
            "long_steps": self.long_steps,
        }
        return {**data, "timeline": [moment._asdict() for moment in self.timeline()]}

    def timeline(self) -> list[Moment]:
        """Return everything that is known to have happened, in order."""
        task = self.task
        moments = [Moment(task["created_at"], "spawned", f"into queue {task['queue_name']}")]
        moments += [
            Moment(run["started_at"], f"attempt {run['attempt']} starts", _worker(run))
            for run in self.runs
            if run["started_at"] is not None
        ]
        if task["attempt"] > len(self.runs) and task["started_at"] is not None:
            moments.append(Moment(task["started_at"], f"attempt {task['attempt']} starts", _worker(task)))
        moments += [_recorded(checkpoint) for checkpoint in self.checkpoints]
        moments += [
            Moment(
                run["finished_at"],
                f"attempt {run['attempt']} {run['state']}",
                _brief(_error(run)),
                failed=run["error_name"] is not None,
            )
            for run in self.runs
        ]
        if task["finished_at"] is not None and not (self.runs and self.runs[-1]["state"] == task["state"]):
            moments.append(Moment(task["finished_at"], f"task {task['state']}", failed=task["state"] == "failed"))
        # The sort is stable, so the end of the task stays last among entries of the same microsecond.
        return with_durations(sorted(moments, key=lambda moment: moment.at))

    def print_timeline(self, output: Output) -> None:
        """Print the whole timeline."""
        print_timeline(self.timeline(), output, everything=True)


async def load(database: Database, task_id: uuid.UUID, *, payloads: bool = False) -> History | None:
    """Read a task's history, with params, results and other payloads on request; None if the task does not exist.

    Without payloads, the errors are without values.
    """
    parameters = {"task_id": task_id, "with_payloads": payloads, "wanted": _CHILDREN}

    async def rows(statement: Executable) -> list[dict[str, Any]]:
        return as_dicts(await database.execute(statement, parameters))

    found = await rows(inspection.TASK)
    if not found:
        return None
    runs, checkpoints = await rows(inspection.RUNS), await rows(inspection.CHECKPOINTS)
    for failure in (*found, *runs):
        if not payloads:
            _reduce(failure)
    for checkpoint in checkpoints:
        checkpoint["failed_try"] = _failed_try(checkpoint["failed_try"], payloads=payloads)
    waits, children = await rows(inspection.WAITS), await rows(inspection.CHILDREN)
    long_steps = await rows(inspection.LONG_STEPS)
    return History(found[0], [*runs], [*checkpoints], [*waits], [*children], [*long_steps])


def print_history(history: History, output: Output, *, last: bool, failed: bool, everything: bool) -> None:
    """Print a task: facts, timeline, waits, subtasks, and the error that it ended with or was last retried for.

    `last` prints only the last attempt, `failed` only what failed, with the traceback of each attempt.
    """
    output.print_table(_facts(history.task), {"fact": "", "value": ""}, headed=False)
    moments = history.timeline()
    if last:
        moments = [moment for moment in moments if moment.attempt == moments[-1].attempt]
    if failed:
        moments = [moment for moment in moments if moment.failed]
    output.heading("timeline")
    print_timeline(moments, output, everything=everything)
    if history.long_steps:
        output.heading("steps in progress")
        rows = [{**step, "duration": span(step["seconds"])} for step in history.long_steps]
        output.print_table(rows, {"step": "step", "started_at": "since", "duration": "for"})
    if history.waits:
        output.heading("waits for")
        columns = {"kind": "kind", "awaited": "name", "since_at": "since", "due_at": "until"}
        awaited = [
            {
                **wait,
                "awaited": wait["event_name"] or wait["child_task_id"] or wait["name"],
                "since_at": wait["created_at"],
            }
            for wait in history.waits
        ]
        output.print_table(awaited, columns)
    if history.children:
        output.heading("subtasks")
        columns = {"task_id": "subtask", "task_name": "name", "state": "state", "finished_at": "finished"}
        children = history.children if everything else history.children[:_SHOWN_CHILDREN]
        output.print_table(children, columns)
        if len(history.children) > len(children):
            output.say(f"and {len(history.children) - len(children)} more (--all)")
    _print_tracebacks(history, output, each=failed)


def print_timeline(moments: Sequence[Moment], output: Output, *, everything: bool) -> None:
    """Print moments as a table; many of them are grouped unless `everything` is wanted."""
    rows = [entry.row() for entry in entries(moments, everything=everything)]
    output.print_table(rows, {"at": "time", "took": "took", "what": "what happened", "detail": "detail"})


def _print_tracebacks(history: History, output: Output, *, each: bool) -> None:
    failures = [(f"attempt {run['attempt']}", run) for run in history.runs if run["error_name"] is not None]
    if history.task["error_name"] is not None and not each:
        failures = [("the last failure", history.task)]
    for label, failure in failures:
        if failure["error_traceback"]:
            output.heading(f"traceback of {label}")
            output.say(failure["error_traceback"].rstrip())


def _losses(count: int) -> str | None:
    """Describe how many workers in a row were lost while they ran a task, and what that means for it."""
    if count <= 0:
        return None
    return f"{count} in a row" + (", so it runs alone" if count >= SUSPECT_AFTER else "")


def _facts(task: Fields) -> list[dict[str, str]]:
    unfinished = task["finished_at"] is None
    parent = task["parent_task_id"] and f"{task['parent_task_id']} ({task['parent_name']}, {task['parent_state']})"
    began, ended = task["first_started_at"], task["finished_at"]
    facts: dict[str, Any] = {
        "task": task["task_id"],
        "name": task["task_name"],
        "state": task["state"],
        "queue": task["queue_name"],
        "attempt": f"{task['attempt']} ({task['failures']} of {task['max_attempts']} failures)",
        "lost workers": _losses(task["lease_losses"]) if unfinished else None,
        "priority": task["priority"] or None,
        "key": task["idempotency_key"],
        "parent": parent,
        "worker": (task["worker_name"] or task["claimed_by"]) if unfinished else None,
        "spawned": task["created_at"],
        "available": task["available_at"] if unfinished else None,
        "started": _later(began, task["created_at"]),
        "ended": _later(ended, began or task["created_at"]),
        "error": None if task["error_name"] is None else _error(task),
    }
    for key in ("params", "headers", "output"):
        facts[key] = task[key]
    if task["error"] is not None:
        # Its text and traceback are printed as such.
        facts["data of the error"] = _raw(task["error"])
    return [{"fact": fact, "value": shown(value)} for fact, value in facts.items() if value is not None]


def _later(moment: datetime | None, before: datetime) -> str | None:
    return None if moment is None else f"{shown(moment)}, {span((moment - before).total_seconds())} later"


def _raw(error: str) -> str | None:
    decoded: object = from_json(error)
    raw = cast(dict[str, Any], decoded).get("raw") if isinstance(decoded, dict) else decoded
    return None if raw is None else json.dumps(raw, ensure_ascii=False)


def _decoded(fields: Fields) -> dict[str, Any]:
    payloads = ("params", "headers", "output", "error", "value")
    return {key: from_json(value) if key in payloads and value is not None else value for key, value in fields.items()}


def _worker(run: Fields) -> str:
    """Return the label of a worker; its row, which has the label, is deleted when the worker has ended."""
    worker_id = run.get("worker_id") or run.get("claimed_by")
    if worker_id is None:
        return ""
    return f"by worker {run['worker_name']}" if run["worker_name"] else f"by worker {worker_id}, which has ended"


def _recorded(checkpoint: Fields) -> Moment:
    if (failure := checkpoint["failed_try"]) is not None:
        step = f" of step {failure['step']!r}" if failure["step"] else " of a step"
        return Moment(checkpoint["created_at"], f"try{step} failed", _brief(failure["error"]), 0.0, failed=True)
    details = [] if checkpoint["status"] == "completed" else [str(checkpoint["status"])]
    if checkpoint["child_task_id"] is not None:
        kind = "message" if checkpoint["kind"] == "message" else "task"
        details.append(f"{kind} {checkpoint['child_task_id']}")
    if checkpoint["value"] is not None:
        details.append(clean(checkpoint["value"]))
    # Names that the engine chooses add nothing to the kind.
    name = "" if checkpoint["name"].startswith("$") else f" {checkpoint['name']!r}"
    failed = checkpoint["status"] != "completed"
    return Moment(checkpoint["created_at"], f"{checkpoint['kind']}{name}", " ".join(details), 0.0, failed=failed)


def _failed_try(text: str | None, *, payloads: bool) -> dict[str, Any] | None:
    """Return the step and the error of a try that failed; earlier versions recorded neither."""
    if text is None:
        return None
    stored: object = from_json(text)
    fields = cast(dict[str, Any], stored) if isinstance(stored, dict) else {}
    name, message = str(fields.get("name", "")), str(fields.get("message", ""))
    if not payloads:
        message = without_values(message)
    return {"step": fields.get("step"), "error": f"{name}: {message}" if message else name}


def _reduce(failure: dict[str, Any]) -> None:
    """Cut the values out of the message and the traceback of an error."""
    name, message = failure["error_name"], failure["error_message"]
    failure["error_message"] = message_of(name, message, has_data=failure["error_has_data"])
    failure["error_traceback"] = traceback_of(failure["error_traceback"], _error(failure))


def _error(failure: Fields) -> str:
    """Return the class and the message of an error."""
    name, message = failure["error_name"], failure["error_message"]
    if name is None:
        return ""
    if message is None:
        return f"{name} (its message is data: --payloads)"
    return f"{name}: {message}" if message else str(name)


def _brief(error: str) -> str:
    """Return an error as one line that is not too long."""
    line = " ".join(error.split())
    return clean(line if len(line) <= _MESSAGE_CHARACTERS else f"{line[:_MESSAGE_CHARACTERS]}...")
