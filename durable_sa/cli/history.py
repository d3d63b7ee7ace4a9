"""The history of one task: its state, attempts, checkpoints, waits and subtasks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from pydantic_core import from_json
from sqlalchemy import Executable

from ..database.connections import Database
from ..statements import inspection
from .output import Output, as_dicts, clean, shown, span

_MESSAGE_CHARACTERS = 120
_CHILDREN = 100

Fields = Mapping[str, Any]


class Moment(NamedTuple):
    """An entry of a task's timeline."""

    at: datetime
    what: str
    detail: str = ""


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
        moments += [Moment(run["started_at"], f"attempt {run['attempt']} starts") for run in self.runs]
        if task["attempt"] > len(self.runs):
            moments.append(Moment(task["started_at"], f"attempt {task['attempt']} starts"))
        moments += [Moment(checkpoint["created_at"], *_recorded(checkpoint)) for checkpoint in self.checkpoints]
        moments += [
            Moment(run["finished_at"], f"attempt {run['attempt']} {run['state']}", _brief_error(run))
            for run in self.runs
        ]
        if task["finished_at"] is not None and not (self.runs and self.runs[-1]["state"] == task["state"]):
            moments.append(Moment(task["finished_at"], f"task {task['state']}"))
        # The sort is stable, so the end of the task stays last among entries of the same microsecond.
        return sorted(moments, key=lambda moment: moment.at)

    def print(self, output: Output) -> None:
        """Print the history as tables."""
        output.print_table(self._facts(), {"fact": "task", "value": str(self.task["task_id"])})
        self.print_timeline(output)
        if self.long_steps:
            rows = [{**step, "duration": span(step["seconds"])} for step in self.long_steps]
            output.print_table(rows, {"step": "step in progress", "started_at": "since", "duration": "for"})
        if self.waits:
            columns = {"kind": "waits for", "awaited": "name", "since_at": "since", "due_at": "until"}
            awaited = [
                {**wait, "awaited": wait["event_name"] or wait["child_task_id"], "since_at": wait["created_at"]}
                for wait in self.waits
            ]
            output.print_table(awaited, columns)
        if self.children:
            columns = {"task_id": "subtask", "task_name": "name", "state": "state", "finished_at": "finished"}
            output.print_table(self.children, columns)

    def print_timeline(self, output: Output) -> None:
        """Print the timeline, with the time since the spawn."""
        moments = self.timeline()
        rows = [
            {
                "after": f"+{span((moment.at - moments[0].at).total_seconds())}",
                "what": moment.what,
                "detail": moment.detail,
            }
            for moment in moments
        ]
        output.print_table(rows, {"after": "after", "what": "what happened", "detail": ""})

    def _facts(self) -> list[dict[str, str]]:
        task = self.task
        facts: dict[str, Any] = {
            "name": task["task_name"],
            "state": task["state"],
            "queue": task["queue_name"],
            "attempt": f"{task['attempt']} ({task['failures']} of {task['max_attempts']} failures)",
            "priority": task["priority"] or None,
            "key": task["idempotency_key"],
            "parent": task["parent_task_id"],
            "worker": (task["worker_name"] or task["claimed_by"]) if task["finished_at"] is None else None,
            "available": task["available_at"] if task["finished_at"] is None else None,
            "error": _whole_error(task),
        }
        for key in ("params", "headers", "output", "error"):
            if task[key] is not None:
                facts[key if key != "error" else "recorded error"] = task[key]
        return [{"fact": fact, "value": shown(value)} for fact, value in facts.items() if value is not None]


async def load(database: Database, task_id: uuid.UUID, *, payloads: bool = False) -> History | None:
    """Read a task's history, with params, results and other payloads on request; None if the task does not exist."""
    parameters = {"task_id": task_id, "with_payloads": payloads, "wanted": _CHILDREN}

    async def rows(statement: Executable) -> list[Fields]:
        return list(as_dicts(await database.execute(statement, parameters)))

    found = await rows(inspection.TASK)
    if not found:
        return None
    return History(
        found[0],
        await rows(inspection.RUNS),
        await rows(inspection.CHECKPOINTS),
        await rows(inspection.WAITS),
        await rows(inspection.CHILDREN),
        await rows(inspection.LONG_STEPS),
    )


def _decoded(fields: Fields) -> dict[str, Any]:
    payloads = ("params", "headers", "output", "error", "value")
    return {key: from_json(value) if key in payloads and value is not None else value for key, value in fields.items()}


def _recorded(checkpoint: Fields) -> tuple[str, str]:
    details = [] if checkpoint["status"] == "completed" else [str(checkpoint["status"])]
    if checkpoint["child_task_id"] is not None:
        details.append(f"task {checkpoint['child_task_id']}")
    if checkpoint["value"] is not None:
        details.append(clean(checkpoint["value"]))
    # Names that the engine chooses add nothing to the kind.
    name = "" if checkpoint["name"].startswith("$") else f" {checkpoint['name']!r}"
    return f"{checkpoint['kind']}{name}", " ".join(details)


def _brief_error(run: Fields) -> str:
    if run["error_name"] is None:
        return ""
    message = " ".join((run["error_message"] or "").split())
    if len(message) > _MESSAGE_CHARACTERS:
        message = f"{message[:_MESSAGE_CHARACTERS]}..."
    return clean(f"{run['error_name']}: {message}" if message else run["error_name"])


def _whole_error(task: Fields) -> str | None:
    if task["error_name"] is None:
        return None
    return f"{task['error_name']}: {task['error_message']}"
