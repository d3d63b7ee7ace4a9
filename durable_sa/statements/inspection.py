"""What there is to see, for the command line: tasks with their history, workers, schedules.

Nothing here locks anything. Payloads (params, results, headers) leave the database only where they are asked for.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Boolean, ColumnElement, Float, Integer, Select, Text, Uuid, bindparam, case, func, select

from ..models import Checkpoint, Queue, Run, Schedule, Task, Wait, WorkerRow
from .expressions import as_text, clock, interval, readable

_task_id = bindparam("task_id", type_=Uuid())
_with_payloads = bindparam("with_payloads", type_=Boolean())


def _payload(column: ColumnElement[Any] | Any) -> ColumnElement[Any]:
    return case((_with_payloads, as_text(column))).label(column.key)


_summary = (
    Task.task_id,
    Task.task_name,
    Task.queue_name,
    Task.state,
    Task.attempt,
    Task.failures,
    Task.max_attempts,
    Task.priority,
    Task.parent_task_id,
    Task.idempotency_key,
    readable(Task.created_at),
    Task.available_at,
    readable(Task.first_started_at),
    readable(Task.finished_at),
    Task.error["name"].as_string().label("error_name"),
)


def tasks(
    *,
    queue_name: str | None = None,
    states: Sequence[str] = (),
    task_name: str | None = None,
    since: datetime | timedelta | None = None,
    before: uuid.UUID | None = None,
    limit: int,
) -> Select[*tuple[Any, ...]]:
    """Tasks that meet all that is given, the newest first; `before` is where the next page begins.

    `since` is when they were spawned, or how long ago. The conditions name what the two partial indexes hold, so that
    a rare kind of task is not searched for among all.
    """
    query = select(*_summary).order_by(Task.task_id.desc()).limit(limit)
    ended = [state for state in states if state in ("completed", "failed", "cancelled")]
    if states and len(ended) == len(states):
        query = query.where(Task.finished_at.is_not(None), Task.outcome.in_(ended))
    elif states and not ended:
        query = query.where(Task.finished_at.is_(None), Task.state.in_(states))
    elif states:
        query = query.where(Task.state.in_(states))
    if queue_name is not None:
        query = query.where(Task.queue_name == queue_name)
    elif states:
        query = query.where(Task.queue_name.in_(select(Queue.queue_name)))
    if task_name is not None:
        query = query.where(Task.task_name == task_name)
    if since is not None:
        query = query.where(Task.created_at >= (clock() - since if isinstance(since, timedelta) else since))
    if before is not None:
        query = query.where(Task.task_id < before)
    return query


TASK = (
    select(
        *_summary,
        Task.run_id,
        readable(Task.started_at),
        Task.lease_losses,
        Task.cancelled_by,
        Task.cancel_at,
        Task.claimed_by,
        WorkerRow.name.label("worker_name"),
        Task.error["message"].as_string().label("error_message"),
        _payload(Task.params),
        _payload(Task.headers),
        _payload(Task.output),
        _payload(Task.error),
        clock().label("now"),
    )
    .outerjoin(WorkerRow, WorkerRow.worker_id == Task.claimed_by)
    .where(Task.task_id == _task_id)
)
"""One task, with the worker that has it."""

RUNS = (
    select(
        Run.attempt,
        Run.run_id,
        Run.state,
        Run.worker_id,
        readable(Run.started_at),
        readable(Run.finished_at),
        Run.error["name"].as_string().label("error_name"),
        Run.error["message"].as_string().label("error_message"),
        _payload(Run.error),
    )
    .where(Run.task_id == _task_id)
    .order_by(Run.attempt)
)
"""The attempts of a task that have ended."""

CHECKPOINTS = (
    select(
        Checkpoint.kind,
        Checkpoint.name,
        Checkpoint.status,
        Checkpoint.child_task_id,
        readable(Checkpoint.created_at),
        _payload(Checkpoint.value),
    )
    .where(Checkpoint.task_id == _task_id)
    .order_by(Checkpoint.created_at)
)
"""What a task has behind it, in the order in which it was recorded."""

WAITS = (
    select(Wait.kind, Wait.name, Wait.event_name, Wait.child_task_id, Wait.due_at, readable(Wait.created_at))
    .where(Wait.task_id == _task_id)
    .order_by(Wait.created_at)
)
"""What a task waits for now."""

CHILDREN = (
    select(Task.task_id, Task.task_name, Task.state, readable(Task.created_at), readable(Task.finished_at))
    .where(Task.parent_task_id == _task_id)
    .order_by(Task.created_at, Task.task_id)
    .limit(bindparam("wanted", type_=Integer()))
)
"""The subtasks of a task."""

WORKERS = select(
    WorkerRow.worker_id,
    WorkerRow.name,
    WorkerRow.queue_names,
    readable(WorkerRow.started_at),
    readable(WorkerRow.heartbeat_at),
    WorkerRow.expires_at,
    readable(WorkerRow.lost_at),
    func.extract("epoch", clock() - readable(WorkerRow.heartbeat_at)).label("silent_seconds"),
).order_by(WorkerRow.started_at)
"""Workers that run, and lost ones that are still remembered."""

SCHEDULES = select(
    Schedule.name,
    Schedule.task_name,
    Schedule.queue_name,
    Schedule.cron_expression,
    Schedule.timezone,
    Schedule.backend,
    readable(Schedule.paused_at),
    Schedule.next_tick_at,
    readable(Schedule.last_tick_at),
    Schedule.last_task_id,
).order_by(Schedule.name)
"""All schedules, with their last and their next tick."""

OLD_QUEUES = (
    select(Queue.queue_name)
    .where(
        Queue.queue_name.startswith(bindparam("prefix", type_=Text())),
        Queue.created_at < clock() - interval(bindparam("age", type_=Float(53))),
    )
    .order_by(Queue.queue_name)
)
"""Queues whose names begin in some way and that are of some age: what earlier demos have left behind."""
