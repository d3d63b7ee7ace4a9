"""Queries of the command line: tasks with their history, workers, schedules.

None of them locks anything. Payloads (params, results, headers) are read only on request.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    Select,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    func,
    literal,
    select,
)

from ..models import Checkpoint, Queue, RunRow, Schedule, TaskRow, Wait, WorkerRow
from .expressions import as_text, clamped_time, clock, constant, interval, long_steps

_task_id = bindparam("task_id", type_=Uuid())
_with_payloads = bindparam("with_payloads", type_=Boolean())


def _payload(column: ColumnElement[Any] | Any) -> ColumnElement[Any]:
    return case((_with_payloads, as_text(column))).label(column.key)


_summary = (
    TaskRow.task_id,
    TaskRow.task_name,
    TaskRow.queue_name,
    TaskRow.state,
    TaskRow.attempt,
    TaskRow.failures,
    TaskRow.max_attempts,
    TaskRow.priority,
    TaskRow.parent_task_id,
    TaskRow.idempotency_key,
    clamped_time(TaskRow.created_at),
    TaskRow.available_at,
    clamped_time(TaskRow.first_started_at),
    clamped_time(TaskRow.finished_at),
    TaskRow.error["name"].as_string().label("error_name"),
)


_running_seconds = case(
    (TaskRow.state == constant("running"), func.extract("epoch", clock() - clamped_time(TaskRow.started_at)))
).label("running_seconds")
Order = Literal["newest", "oldest", "running"]
_ORDERS: Final[Mapping[Order, tuple[ColumnElement[Any], ...]]] = {
    "newest": (TaskRow.task_id.desc(),),
    "oldest": (TaskRow.task_id.asc(),),
    "running": (_running_seconds.desc().nulls_last(), TaskRow.task_id.asc()),
}


def _any_of(values: Sequence[str]) -> ColumnElement[Any]:
    return func.any(literal(list(values), ARRAY(Text())))


def tasks(
    *,
    queue_name: str | None = None,
    states: Sequence[str] = (),
    task_name: str | None = None,
    since: datetime | timedelta | None = None,
    running_longer_than: timedelta | None = None,
    order: Order = "newest",
    before: uuid.UUID | None = None,
    limit: int,
) -> Select[*tuple[Any, ...]]:
    """Select the tasks that meet all given conditions; `before` starts the next page, in the order `newest`.

    `since` is the earliest time of the spawn, or its greatest age. `running_longer_than` is about the current attempt.
    The conditions match the predicates of the two partial indexes, so that rare tasks are found without reading all.
    """
    query = select(*_summary, _running_seconds).order_by(*_ORDERS[order]).limit(limit)
    if running_longer_than is not None:
        query = query.where(
            TaskRow.finished_at.is_(None),
            TaskRow.state == constant("running"),
            TaskRow.started_at < clock() - running_longer_than,
        )
    ended = [state for state in states if state in ("completed", "failed", "cancelled")]
    if states and len(ended) == len(states):
        query = query.where(TaskRow.finished_at.is_not(None), TaskRow.outcome == _any_of(ended))
    elif states and not ended:
        query = query.where(TaskRow.finished_at.is_(None), TaskRow.state == _any_of(states))
    elif states:
        query = query.where(TaskRow.state == _any_of(states))
    if queue_name is not None:
        query = query.where(TaskRow.queue_name == queue_name)
    elif states:
        query = query.where(TaskRow.queue_name.in_(select(Queue.queue_name)))
    if task_name is not None:
        query = query.where(TaskRow.task_name == task_name)
    if since is not None:
        query = query.where(TaskRow.created_at >= (clock() - since if isinstance(since, timedelta) else since))
    if before is not None:
        query = query.where(TaskRow.task_id < before)
    return query


TASK = (
    select(
        *_summary,
        TaskRow.run_id,
        clamped_time(TaskRow.started_at),
        TaskRow.lease_losses,
        TaskRow.cancelled_by,
        TaskRow.cancel_at,
        TaskRow.claimed_by,
        WorkerRow.name.label("worker_name"),
        TaskRow.error["message"].as_string().label("error_message"),
        _payload(TaskRow.params),
        _payload(TaskRow.headers),
        _payload(TaskRow.output),
        _payload(TaskRow.error),
        clock().label("now"),
    )
    .outerjoin(WorkerRow, WorkerRow.worker_id == TaskRow.claimed_by)
    .where(TaskRow.task_id == _task_id)
)
"""One task, with the worker that runs it."""

RUNS = (
    select(
        RunRow.attempt,
        RunRow.run_id,
        RunRow.state,
        RunRow.worker_id,
        clamped_time(RunRow.started_at),
        clamped_time(RunRow.finished_at),
        RunRow.error["name"].as_string().label("error_name"),
        RunRow.error["message"].as_string().label("error_message"),
        _payload(RunRow.error),
    )
    .where(RunRow.task_id == _task_id)
    .order_by(RunRow.attempt)
)
"""The ended attempts of a task."""

_long = long_steps()
_began = cast(_long.c.value["started_at"].as_string(), DateTime(timezone=True))
LONG_STEPS = (
    select(
        _long.c.value["step"].as_string().label("step"),
        _began.label("started_at"),
        func.extract("epoch", clock() - _began).label("seconds"),
        WorkerRow.name.label("worker_name"),
    )
    .select_from(WorkerRow)
    .join(TaskRow, TaskRow.claimed_by == WorkerRow.worker_id)
    .where(TaskRow.task_id == _task_id, _long.c.value["task_id"].as_string() == cast(TaskRow.task_id, Text()))
    .order_by(_began)
)
"""The steps of a running task that have run for more than a second."""

CHECKPOINTS = (
    select(
        Checkpoint.kind,
        Checkpoint.name,
        Checkpoint.status,
        Checkpoint.child_task_id,
        clamped_time(Checkpoint.created_at),
        _payload(Checkpoint.value),
    )
    .where(Checkpoint.task_id == _task_id)
    .order_by(Checkpoint.created_at)
)
"""The checkpoints of a task, in the order in which they were recorded."""

WAITS = (
    select(Wait.kind, Wait.name, Wait.event_name, Wait.child_task_id, Wait.due_at, clamped_time(Wait.created_at))
    .where(Wait.task_id == _task_id)
    .order_by(Wait.created_at)
)
"""The unresolved waits of a task."""

CHILDREN = (
    select(
        TaskRow.task_id,
        TaskRow.task_name,
        TaskRow.state,
        clamped_time(TaskRow.created_at),
        clamped_time(TaskRow.finished_at),
    )
    .where(TaskRow.parent_task_id == _task_id)
    .order_by(TaskRow.created_at, TaskRow.task_id)
    .limit(bindparam("wanted", type_=Integer()))
)
"""The subtasks of a task."""

WORKERS = select(
    WorkerRow.worker_id,
    WorkerRow.name,
    WorkerRow.queue_names,
    clamped_time(WorkerRow.started_at),
    clamped_time(WorkerRow.heartbeat_at),
    WorkerRow.expires_at,
    clamped_time(WorkerRow.lost_at),
    func.extract("epoch", clock() - clamped_time(WorkerRow.heartbeat_at)).label("silent_seconds"),
).order_by(WorkerRow.started_at)
"""Running workers, and lost ones that are not yet deleted."""

SCHEDULES = select(
    Schedule.name,
    Schedule.task_name,
    Schedule.queue_name,
    Schedule.cron_expression,
    Schedule.timezone,
    Schedule.backend,
    clamped_time(Schedule.paused_at),
    Schedule.next_tick_at,
    clamped_time(Schedule.last_tick_at),
    Schedule.last_task_id,
).order_by(Schedule.name, Schedule.queue_name)
"""All schedules, with their last and their next tick."""

OLD_QUEUES = (
    select(Queue.queue_name)
    .where(
        Queue.queue_name.startswith(bindparam("prefix", type_=Text())),
        Queue.created_at < clock() - interval(bindparam("age", type_=Float(53))),
    )
    .order_by(Queue.queue_name)
)
"""Queues with a name prefix and a minimum age, which earlier demos have left."""
