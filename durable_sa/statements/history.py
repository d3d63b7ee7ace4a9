"""The history of one task: its ended attempts, checkpoints, steps in progress, waits and subtasks.

None of the queries locks anything. Values are read only on request.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, ColumnElement, DateTime, Text, Uuid, bindparam, case, cast, func, or_, select

from ..models import Checkpoint, EndedWorker, RunRow, TaskRow, Wait, WorkerRow
from .expressions import as_text, clamped_time, constant, long_steps

_task_id = bindparam("task_id", type_=Uuid())
_with_payloads = bindparam("with_payloads", type_=Boolean())

_label = func.coalesce(WorkerRow.name, EndedWorker.name)


def _labelled(worker_id: Any) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return WorkerRow.worker_id == worker_id, EndedWorker.worker_id == worker_id


_of_live, _of_ended = _labelled(RunRow.worker_id)
RUNS = (
    select(
        RunRow.attempt,
        RunRow.state,
        RunRow.worker_id,
        _label.label("worker"),
        clamped_time(RunRow.started_at),
        clamped_time(RunRow.finished_at),
        as_text(RunRow.error).label("error"),
    )
    .outerjoin(WorkerRow, _of_live)
    .outerjoin(EndedWorker, _of_ended)
    .where(RunRow.task_id == _task_id)
    .order_by(RunRow.attempt)
)
"""The ended attempts of a task, with the labels of their workers."""

_is_try = (Checkpoint.kind == constant("value")) & (Checkpoint.name == constant("$try"))
_is_public = or_(_is_try, Checkpoint.kind == constant("sleep"), Checkpoint.kind == constant("race"))

CHECKPOINTS = (
    select(
        Checkpoint.kind,
        Checkpoint.name,
        Checkpoint.status,
        Checkpoint.child_task_id,
        clamped_time(Checkpoint.created_at),
        Checkpoint.duration,
        case((_with_payloads, Checkpoint.arguments)).label("arguments"),
        case((or_(_with_payloads, _is_public), as_text(Checkpoint.value))).label("value"),
    )
    .where(Checkpoint.task_id == _task_id, Checkpoint.name.not_in((constant("$time"), constant("$stream"))))
    .order_by(Checkpoint.created_at)
)
"""The checkpoints of a task. The values of sleeps are their ends, those of tries their errors, of races the winners."""

WAITS = select(
    Wait.kind, Wait.name, Wait.event_name, Wait.child_task_id, Wait.due_at, clamped_time(Wait.created_at)
).where(Wait.task_id == _task_id)
"""The unresolved waits of a task."""

CHILDREN = select(
    TaskRow.task_id,
    TaskRow.task_name,
    TaskRow.state,
    clamped_time(TaskRow.created_at),
    clamped_time(TaskRow.finished_at),
).where(TaskRow.parent_task_id == _task_id)
"""The subtasks of a task."""

_long = long_steps()

STEPS_IN_PROGRESS = (
    select(
        _long.c.value["step"].as_string().label("name"),
        case((_with_payloads, _long.c.value["arguments"].as_string())).label("arguments"),
        cast(_long.c.value["started_at"].as_string(), DateTime(timezone=True)).label("began_at"),
    )
    .select_from(WorkerRow)
    .join(TaskRow, TaskRow.claimed_by == WorkerRow.worker_id)
    .where(
        TaskRow.task_id == _task_id,
        TaskRow.state == constant("running"),
        _long.c.value["task_id"].as_string() == cast(TaskRow.task_id, Text()),
    )
)
"""The steps of a running task that have run for more than a second."""
