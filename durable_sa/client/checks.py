"""Checks of the database for problems, with remedies: those of `durable doctor` and of the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Executable

from ..statements import diagnosis, limit_diagnosis
from .wording import span

GRACE: Final = 60.0
"""Seconds within which the engine repairs a problem by itself."""
LONG_STEP: Final = 3600.0
"""Seconds for which a run may be in one step."""
SHOWN: Final = 20
"""Problems that a check lists."""

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """A check: each row that the statement returns is a problem."""

    subject: str
    statement: Executable
    problem: Callable[[Fields], str]
    remedy: str
    reads_much: bool = False
    """True if it reads all unfinished tasks, or whole tables: a second for some millions of tasks."""


CHECKS = (
    Check(
        "due tasks",
        diagnosis.UNCLAIMED,
        lambda row: (
            f"{row['count']} of {row['task_name']!r} in queue {row['queue_name']!r} are due and unclaimed, "
            f"the oldest for {span(row['oldest_seconds'])}; "
            + ("workers serve the queue" if row["served"] else "no worker serves the queue")
        ),
        "Start a worker that serves the queue and knows the task, or more: durable worker MODULE:DURABLE --queue QUEUE",
        reads_much=True,
    ),
    Check(
        "waits",
        diagnosis.STUCK_WAITS,
        lambda row: f"task {row['task_id']} waits for {row['kind']} {row['awaited']!r}, but {row['reason']}",
        "Workers repair such waits within a minute. Check that one is running: durable workers",
        reads_much=True,
    ),
    Check(
        "sleepers",
        diagnosis.SLEEPLESS,
        lambda row: f"task {row['task_id']} ({row['task_name']}) sleeps and waits for nothing",
        "This is a bug: please report it. To wake the task: durable tasks cancel TASK; durable tasks retry TASK",
        reads_much=True,
    ),
    Check(
        "events",
        diagnosis.UNDELIVERED,
        lambda row: (
            f"event {row['name']!r} in queue {row['queue_name']!r} has not been delivered for {span(row['seconds'])}"
        ),
        "Workers of any queue deliver events. Check that one is running: durable workers",
    ),
    Check(
        "time limits",
        diagnosis.OVERDUE,
        lambda row: f"task {row['task_id']} ({row['task_name']}) is past its limit by {span(row['seconds'])}",
        "Workers of any queue cancel such tasks. Check that one is running: durable workers",
    ),
    Check(
        "leases",
        diagnosis.EXPIRED_LEASES,
        lambda row: (
            f"{row['runs']} runs are held by worker {row['worker_name'] or row['worker_id']}, "
            + ("which is unknown" if row["worker_name"] is None else f"whose lease ended {span(row['seconds'])} ago")
        ),
        "Workers of any queue take such runs over. Check that one is running: durable workers",
        reads_much=True,
    ),
    Check(
        "steps",
        diagnosis.LONG_STEPS,
        lambda row: (
            f"task {row['task_id']} ({row['task_name']}) has been in step {row['step']!r} for {span(row['seconds'])}, "
            f"in worker {row['worker_name']}"
        ),
        "Look at what the step waits for; a step may have a timeout. --long-step raises the bound.",
    ),
    Check(
        "states",
        diagnosis.INCONSISTENT,
        lambda row: f"task {row['task_id']} ({row['task_name']}) is {row['state']}, which contradicts its lease",
        "Unless rows were changed by hand, this is a bug: please report it.",
        reads_much=True,
    ),
    Check(
        "schedules",
        diagnosis.OVERDUE_TICKS,
        lambda row: f"schedule {row['name']!r} of queue {row['queue_name']!r} has been due for {span(row['seconds'])}",
        "Workers of any queue fire schedules. Check that one is running: durable workers",
    ),
    Check(
        "limit counts",
        limit_diagnosis.MISCOUNTED,
        lambda row: (
            f"{_key(row)} of queue {row['queue_name']!r} counts {row['counted']} slots, "
            f"and its tasks hold {row['held']}"
        ),
        "Unless rows were changed by hand, this is a bug: please report it. To count anew: durable doctor --repair",
    ),
    Check(
        "queue counts",
        limit_diagnosis.MISCOUNTED_TOTALS,
        lambda row: f"queue {row['queue_name']!r} counts {row['counted']} slots, and its tasks hold {row['held']}",
        "Unless rows were changed by hand, this is a bug: please report it. To count anew: durable doctor --repair",
    ),
    Check(
        "limit keys",
        limit_diagnosis.PARKED,
        lambda row: (
            f"{_key(row)} of queue {row['queue_name']!r} has room, and tasks that are due, "
            f"the oldest for {span(row['oldest_seconds'])}, but no claim looks at it"
        ),
        "This is a bug: please report it. To have claims look at the key: durable doctor --repair",
    ),
    Check(
        "kept slots",
        limit_diagnosis.SELF_JOINS,
        lambda row: (
            f"task {row['task_id']} ({row['task_name']}) keeps a slot of {_key(row)} in queue {row['queue_name']!r} "
            f"while it waits for its child {row['child_id']}, which waits for one"
        ),
        'Give children another key or queue, or the limit hold="run". To go on: durable limits set with more slots.',
    ),
    Check(
        "limits",
        limit_diagnosis.UNLIMITED_WORKERS,
        lambda row: (
            f"worker {row['worker_name']} is of a version that knows no limits, and serves queue {row['queue_name']!r}"
        ),
        "Deploy this version to all workers.",
    ),
    Check(
        "orphans",
        diagnosis.ORPHANS,
        lambda row: f"{row['what']}: {row['id']}",
        "Unless rows were deleted by hand, this is a bug: please report it.",
        reads_much=True,
    ),
)


def _key(row: Fields) -> str:
    return f"key {row['limit_key']!r}" if row["limit_key"] else "the part without keys"
