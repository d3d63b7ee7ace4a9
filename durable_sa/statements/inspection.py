"""Queries of the command line: tasks with their history, workers, events, schedules.

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
    exists,
    func,
    literal,
    null,
    or_,
    select,
    true,
    union,
)
from sqlalchemy.orm import aliased

from ..models import Checkpoint, Event, Queue, RunRow, Schedule, TaskRow, Wait, WorkerRow
from .expressions import as_text, clamped_time, clock, constant, interval, long_steps

_task_id = bindparam("task_id", type_=Uuid())
_with_payloads = bindparam("with_payloads", type_=Boolean())


def _payload(column: ColumnElement[Any] | Any) -> ColumnElement[Any]:
    return case((_with_payloads, as_text(column))).label(column.key)


def _failure(error: ColumnElement[Any] | Any) -> tuple[ColumnElement[Any], ...]:
    """Select the text of an error, and if it has data: then its message is made of that."""
    return (
        error["message"].as_string().label("error_message"),
        error["traceback"].as_string().label("error_traceback"),
        error["raw"].as_string().is_not(None).label("error_has_data"),
    )


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


def _bound(moment: datetime | timedelta) -> Any:
    return clock() - moment if isinstance(moment, timedelta) else moment


def tasks(
    *,
    queue_name: str | None = None,
    states: Sequence[str] = (),
    task_name: str | None = None,
    error_name: str | None = None,
    key: str | None = None,
    since: datetime | timedelta | None = None,
    until: datetime | timedelta | None = None,
    running_longer_than: timedelta | None = None,
    order: Order = "newest",
    after: uuid.UUID | None = None,
    limit: int,
) -> Select[*tuple[Any, ...]]:
    """Select the tasks that meet all given conditions, a page of them: that after the task `after`, if that is given.

    `since` and `until` are times, or ages: of the end of a task that has ended, else of its spawn.
    `running_longer_than` is about the current attempt. The conditions match the predicates of the partial indexes, so
    that rare tasks are found without reading all. The order `running` has only one page, because it changes.
    """
    query = select(*_summary, _running_seconds).order_by(*_ORDERS[order]).limit(limit)
    if running_longer_than is not None:
        query = query.where(
            TaskRow.finished_at.is_(None),
            TaskRow.state == constant("running"),
            TaskRow.started_at < clock() - running_longer_than,
        )
    ended = [state for state in states if state in ("completed", "failed", "cancelled")]
    moment: ColumnElement[Any] = func.coalesce(TaskRow.finished_at, TaskRow.created_at)
    if states and len(ended) == len(states):
        query = query.where(TaskRow.finished_at.is_not(None), TaskRow.outcome == _any_of(ended))
        moment = TaskRow.finished_at.expression
    elif states and not ended:
        query = query.where(TaskRow.finished_at.is_(None), TaskRow.state == _any_of(states))
        moment = TaskRow.created_at.expression
    elif states:
        query = query.where(TaskRow.state == _any_of(states))
    if queue_name is not None:
        query = query.where(TaskRow.queue_name == queue_name)
    elif states or key is not None:
        query = query.where(TaskRow.queue_name.in_(select(Queue.queue_name)))
    if task_name is not None:
        query = query.where(TaskRow.task_name == task_name)
    if error_name is not None:
        query = query.where(TaskRow.error["name"].as_string() == error_name)
    if key is not None:
        query = query.where(TaskRow.idempotency_key == key, TaskRow.idempotency_key.is_not(None))
    if since is not None:
        query = query.where(moment >= _bound(since))
    if until is not None:
        query = query.where(moment < _bound(until))
    if after is not None:
        query = query.where(TaskRow.task_id > after if order == "oldest" else TaskRow.task_id < after)
    return query


RECENT_TASK_NAMES = union(
    select(select(TaskRow.task_name).order_by(TaskRow.task_id.desc()).limit(1000).subquery().c.task_name),
    select(Schedule.task_name),
)
"""The names of the tasks that were spawned last and of those with a schedule."""

KNOWN_TASK = select(TaskRow.state).where(TaskRow.task_id == _task_id)
"""The state of a task."""

KNOWN_NAME = select(TaskRow.task_name).where(TaskRow.task_name == bindparam("name", type_=Text())).limit(1)
"""A row if any task has the name. Reads the whole table if none has."""

LATEST_TASK = select(TaskRow.task_id).order_by(TaskRow.task_id.desc()).limit(1)
"""The id of the task that was spawned last."""

LATEST_FAILED_TASK = (
    select(TaskRow.task_id)
    .where(TaskRow.finished_at.is_not(None), TaskRow.outcome == constant("failed"))
    .order_by(TaskRow.finished_at.desc())
    .limit(1)
)
"""The task that failed last."""

_parent = aliased(TaskRow, name="parent")

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
        _parent.task_name.label("parent_name"),
        _parent.state.label("parent_state"),
        *_failure(TaskRow.error),
        _payload(TaskRow.params),
        _payload(TaskRow.headers),
        _payload(TaskRow.output),
        _payload(TaskRow.error),
        clock().label("now"),
    )
    .outerjoin(WorkerRow, WorkerRow.worker_id == TaskRow.claimed_by)
    .outerjoin(_parent, _parent.task_id == TaskRow.parent_task_id)
    .where(TaskRow.task_id == _task_id)
)
"""One task, with its parent and the worker that runs it."""

RUNS = (
    select(
        RunRow.attempt,
        RunRow.run_id,
        RunRow.state,
        RunRow.worker_id,
        WorkerRow.name.label("worker_name"),
        clamped_time(RunRow.started_at),
        clamped_time(RunRow.finished_at),
        RunRow.error["name"].as_string().label("error_name"),
        *_failure(RunRow.error),
        _payload(RunRow.error),
    )
    .outerjoin(WorkerRow, WorkerRow.worker_id == RunRow.worker_id)
    .where(RunRow.task_id == _task_id)
    .order_by(RunRow.attempt)
)
"""The ended attempts of a task, with their workers as far as those still run."""

_is_try = (Checkpoint.kind == constant("value")) & (Checkpoint.name == constant("$try"))

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
        case((_with_payloads & ~_is_try, as_text(Checkpoint.value))).label("value"),
        case((_is_try, as_text(Checkpoint.value))).label("failed_try"),
    )
    .where(Checkpoint.task_id == _task_id, Checkpoint.name != constant("$time"))
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

_held = (
    select(TaskRow.claimed_by, func.count().label("running"))
    .where(TaskRow.finished_at.is_(None), TaskRow.claimed_by.is_not(None))
    .group_by(TaskRow.claimed_by)
    .subquery("held")
)

WORKERS = (
    select(
        WorkerRow.worker_id,
        WorkerRow.name,
        WorkerRow.queue_names,
        func.coalesce(_held.c.running, constant(0)).label("running"),
        clamped_time(WorkerRow.started_at),
        clamped_time(WorkerRow.heartbeat_at),
        WorkerRow.expires_at,
        (WorkerRow.expires_at < clock()).label("expired"),
        clamped_time(WorkerRow.lost_at),
        func.extract("epoch", clock() - clamped_time(WorkerRow.heartbeat_at)).label("silent_seconds"),
    )
    .outerjoin(_held, _held.c.claimed_by == WorkerRow.worker_id)
    .order_by(WorkerRow.started_at)
)
"""Running workers with the numbers of their runs, and lost ones that are not yet deleted."""

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

_queue_name = bindparam("queue_name", type_=Text())
_prefix = bindparam("prefix", type_=Text())
_wanted = bindparam("wanted", type_=Integer())
_waiting = (
    select(func.count())
    .where(Wait.queue_name == Event.queue_name, Wait.event_name == Event.name, Wait.event_name.is_not(None))
    .correlate(Event)
    .scalar_subquery()
)
_latest = (
    select(
        Event.name,
        Event.queue_name,
        clamped_time(Event.emitted_at),
        clamped_time(Event.delivered_at),
        _waiting.label("waiting"),
    )
    .where(Event.queue_name == Queue.queue_name, func.starts_with(Event.name, _prefix))
    .order_by(Event.emitted_at.desc())
    .limit(_wanted)
    .correlate(Queue)
    .lateral("latest")
)

EVENTS = (
    select(_latest)
    .select_from(Queue)
    .join(_latest, true())
    .where(or_(_queue_name.is_(None), Queue.queue_name == _queue_name))
    .order_by(_latest.c.emitted_at.desc())
    .limit(_wanted)
)
"""The events that were emitted last, in a queue or in all, read from the index of each queue."""

AWAITED_EVENTS = (
    select(
        Wait.event_name.label("name"),
        Wait.queue_name,
        null().label("emitted_at"),
        null().label("delivered_at"),
        func.count().label("waiting"),
    )
    .where(
        Wait.event_name.is_not(None),
        or_(_queue_name.is_(None), Wait.queue_name == _queue_name),
        func.starts_with(Wait.event_name, _prefix),
        ~exists().where(Event.queue_name == Wait.queue_name, Event.name == Wait.event_name),
    )
    .group_by(Wait.event_name, Wait.queue_name)
    .order_by(func.min(Wait.created_at).desc())
    .limit(_wanted)
)
"""The events that tasks wait for and that were not emitted."""

EVENT = select(
    Event.name,
    Event.queue_name,
    clamped_time(Event.emitted_at),
    clamped_time(Event.delivered_at),
    _payload(Event.payload),
).where(Event.queue_name == _queue_name, Event.name == bindparam("name", type_=Text()))
"""One event."""

EVENT_WAITERS = (
    select(Wait.task_id, TaskRow.task_name, clamped_time(Wait.created_at), Wait.due_at)
    .join(TaskRow, TaskRow.task_id == Wait.task_id)
    .where(
        Wait.queue_name == _queue_name,
        Wait.event_name == bindparam("name", type_=Text()),
        Wait.event_name.is_not(None),
    )
    .order_by(Wait.created_at)
    .limit(_wanted)
)
"""The tasks that wait for an event."""

OLD_QUEUES = (
    select(Queue.queue_name)
    .where(
        Queue.queue_name.startswith(bindparam("prefix", type_=Text())),
        Queue.created_at < clock() - interval(bindparam("age", type_=Float(53))),
    )
    .order_by(Queue.queue_name)
)
"""Queues with a name prefix and a minimum age, which earlier demos have left."""
