"""Queries of the command line: workers, events, schedules, names.

None of them locks anything. Payloads are read only on request.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Float,
    Integer,
    Select,
    Text,
    bindparam,
    case,
    exists,
    func,
    null,
    or_,
    select,
    true,
    union,
)

from ..models import Event, Queue, Schedule, TaskRow, Wait, WorkerRow
from .expressions import as_text, clamped_time, clock, constant, interval
from .reading import has_been_due

_with_payloads = bindparam("with_payloads", type_=Boolean())


def _payload(column: ColumnElement[Any] | Any) -> ColumnElement[Any]:
    return case((_with_payloads, as_text(column))).label(column.key)


RECENT_TASK_NAMES = union(
    select(select(TaskRow.task_name).order_by(TaskRow.task_id.desc()).limit(1000).subquery().c.task_name),
    select(Schedule.task_name),
)
"""The names of the tasks that were spawned last and of those with a schedule."""

LATEST_FAILED_TASK = (
    select(TaskRow.task_id)
    .where(TaskRow.finished_at.is_not(None), TaskRow.outcome == constant("failed"))
    .order_by(TaskRow.finished_at.desc())
    .limit(1)
)
"""The task that failed last."""

_held = (
    select(TaskRow.claimed_by, func.count().label("running"))
    .where(
        TaskRow.queue_name.in_(select(Queue.queue_name)),
        TaskRow.finished_at.is_(None),
        TaskRow.claimed_by.is_not(None),
        has_been_due(),
    )
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


def newest_events(chosen: ColumnElement[bool], limit: Any) -> Select[Any]:
    """Select the events of the chosen queues that were emitted last and whose names begin with `prefix`."""
    latest = (
        select(
            Event.name,
            Event.queue_name,
            clamped_time(Event.emitted_at),
            clamped_time(Event.delivered_at),
            _waiting.label("waiting"),
        )
        .where(Event.queue_name == Queue.queue_name, func.starts_with(Event.name, _prefix))
        .order_by(Event.emitted_at.desc())
        .limit(limit)
        .correlate(Queue)
        .lateral("latest")
    )
    return (
        select(latest)
        .select_from(Queue)
        .join(latest, true())
        .where(chosen)
        .order_by(latest.c.emitted_at.desc())
        .limit(limit)
    )


EVENTS = newest_events(or_(_queue_name.is_(None), Queue.queue_name == _queue_name), _wanted)
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
