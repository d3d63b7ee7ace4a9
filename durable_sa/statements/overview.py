"""Queries of the dashboard's pages. Each reads a bounded number of rows, however long the tables are.

Where there is more, a number is a lower bound: the pages say so. None of the queries locks anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    DateTime,
    Executable,
    Float,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    exists,
    func,
    or_,
    select,
    true,
)
from sqlalchemy.sql.selectable import CompoundSelect

from ..models import Event, LimitRow, LimitTotalRow, Queue, Schedule, TaskRow, Wait, WorkerRow
from ..results import TaskFilter
from .expressions import array, as_text, clamped_time, clock, constant, interval, statement_time
from .inspection import newest_events
from .reading import Where, conditions, matching, some

CAP: Final = 1_000
"""Rows that are counted; a number above it means that there are more."""
DUE: Final = 5_000
"""Due tasks of a queue, in the order of claiming, among which the running ones are counted."""
FAILURES: Final = 1_000
"""The latest failures that are grouped."""
LONGEST_ERROR: Final = 128 * 1024
"""Bytes of an error that is read; of others only the task and the name of the error are known."""
WAITS: Final = 20_000
"""Waits that are grouped by their events."""
_SHOWN: Final = 100

_chosen = array("queue_names", Text())
_unfinished = and_(TaskRow.finished_at.is_(None), TaskRow.queue_name == Queue.queue_name)
_is_due = TaskRow.available_at <= statement_time()
_claimed = (TaskRow.priority, TaskRow.available_at, TaskRow.task_id)
"""The order of claims, which is that of an index."""


def _any_of(column: Any) -> ColumnElement[bool]:
    """Restrict to the chosen queues, or to none of them in particular."""
    return or_(_chosen.is_(None), column == func.any(_chosen))


_due = (
    select(TaskRow.claimed_by, TaskRow.available_at)
    .where(_unfinished, _is_due)
    .order_by(*_claimed)
    .limit(constant(DUE))
    .correlate(Queue)
    .subquery("due")
)
_now = (
    select(
        func.count().filter(_due.c.claimed_by.is_(None)).label("ready"),
        func.count().filter(_due.c.claimed_by.is_not(None)).label("running"),
        func.min(_due.c.available_at).filter(_due.c.claimed_by.is_(None)).label("oldest_at"),
        (func.count() >= constant(DUE)).label("capped"),
    )
    .select_from(_due)
    .lateral("now")
)


def _capped(*conditions: ColumnElement[bool], order: Sequence[Any]) -> ColumnElement[int]:
    """Count tasks up to `CAP` and one more, in the order of an index.

    Without an order the planner may expect to find so many soon by reading the table, and reads all of it for each
    queue that has fewer.
    """
    found = select(constant(1)).select_from(TaskRow).where(*conditions).order_by(*order).limit(constant(CAP + 1))
    return select(func.count()).select_from(found.correlate(Queue).subquery()).scalar_subquery()


def _ended(outcome: str) -> ColumnElement[int]:
    return _capped(
        TaskRow.finished_at.is_not(None),
        TaskRow.queue_name == Queue.queue_name,
        TaskRow.outcome == constant(outcome),
        TaskRow.finished_at >= statement_time() - interval(bindparam("age", type_=Float(53))),
        order=[TaskRow.finished_at],
    )


_is_live = and_(WorkerRow.lost_at.is_(None), WorkerRow.expires_at > clock())

QUEUES = (
    select(
        Queue.queue_name,
        clamped_time(Queue.paused_at),
        clamped_time(Queue.created_at),
        Queue.limited_at.is_not(None).label("limited"),
        func.extract("epoch", Queue.retention).label("retention_seconds"),
        func.extract("epoch", Queue.event_retention).label("event_retention_seconds"),
        _now.c.ready,
        _now.c.running,
        _now.c.capped,
        func.extract("epoch", statement_time() - _now.c.oldest_at).label("oldest_ready_seconds"),
        _capped(_unfinished, TaskRow.available_at > statement_time(), order=_claimed).label("scheduled"),
        _capped(_unfinished, TaskRow.available_at.is_(None), order=_claimed).label("waiting"),
        _ended("completed").label("completed"),
        _ended("failed").label("failed"),
        select(func.count())
        .select_from(WorkerRow)
        .where(_is_live, Queue.queue_name == func.any(WorkerRow.queue_names))
        .correlate(Queue)
        .scalar_subquery()
        .label("workers"),
    )
    .select_from(Queue)
    .join(_now, true())
    .where(_any_of(Queue.queue_name))
    .order_by(Queue.queue_name)
)
"""The chosen queues, or all: numbers of tasks, those that ended within `age` seconds, and live workers."""

QUEUE = QUEUES.where(Queue.queue_name == bindparam("queue_name", type_=Text()))
"""The same of one queue, so that the tasks of others are not counted."""

LIMITS = (
    select(
        Queue.queue_name,
        LimitRow.scope,
        LimitRow.limit_key,
        LimitRow.limited,
        LimitRow.concurrency,
        LimitRow.rate_count,
        LimitRow.rate_seconds,
        LimitRow.burst,
        LimitRow.hold,
        LimitRow.weight,
    )
    .outerjoin(LimitRow, LimitRow.queue_name == Queue.queue_name)
    .where(Queue.limited_at.is_not(None), _any_of(Queue.queue_name))
    .order_by(Queue.queue_name, LimitRow.scope.desc(), LimitRow.limit_key)
    .limit(constant(CAP))
)
"""The limits of the chosen queues, or all; a queue that once had limits has at least one row."""

LIMITS_OF_QUEUE = LIMITS.where(Queue.queue_name == bindparam("queue_name", type_=Text()))
"""The same of one queue, which those of other queues do not cut off."""

_each_due = (
    select(TaskRow.claimed_by)
    .where(_unfinished, _is_due)
    .order_by(*_claimed)
    .limit(constant(DUE))
    .correlate(Queue)
    .lateral("each_due")
)
_held = (
    select(_each_due.c.claimed_by, func.count().label("running"))
    .select_from(Queue)
    .join(_each_due, true())
    .where(_any_of(Queue.queue_name), _each_due.c.claimed_by.is_not(None))
    .group_by(_each_due.c.claimed_by)
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
        as_text(WorkerRow.long_steps).label("long_steps"),
    )
    .outerjoin(_held, _held.c.claimed_by == WorkerRow.worker_id)
    .where(or_(_chosen.is_(None), WorkerRow.queue_names.op("&&")(_chosen)))
    .order_by(WorkerRow.started_at)
    .limit(constant(CAP))
)
"""Workers of the chosen queues, or all, with the numbers of their runs; also lost ones that are not yet deleted."""

SCHEDULES = (
    select(
        Schedule.name,
        Schedule.queue_name,
        Schedule.task_name,
        Schedule.cron_expression,
        Schedule.timezone,
        Schedule.backend,
        Schedule.misfire,
        Schedule.overlap,
        clamped_time(Schedule.paused_at),
        Schedule.next_tick_at,
        clamped_time(Schedule.last_tick_at),
        Schedule.last_task_id,
        TaskRow.state.label("last_state"),
    )
    .outerjoin(TaskRow, TaskRow.task_id == Schedule.last_task_id)
    .where(_any_of(Schedule.queue_name))
    .order_by(Schedule.name, Schedule.queue_name)
    .limit(constant(CAP))
)
"""Schedules of the chosen queues, or all, with the status of the task that each has spawned last."""

_prefix = bindparam("prefix", type_=Text())
EVENTS = newest_events(_any_of(Queue.queue_name), constant(_SHOWN))
"""The events of the chosen queues, or all, that were emitted last and whose names begin with `prefix`."""

_some_waits = (
    select(Wait.event_name, Wait.queue_name, Wait.created_at)
    .where(Wait.event_name.is_not(None), _any_of(Wait.queue_name), func.starts_with(Wait.event_name, _prefix))
    .limit(constant(WAITS))
    .subquery("some_waits")
)
AWAITED_EVENTS = (
    select(
        _some_waits.c.event_name.label("name"),
        _some_waits.c.queue_name,
        func.count().label("waiting"),
        clamped_time(func.min(_some_waits.c.created_at)).label("since"),
    )
    .where(
        ~exists().where(Event.queue_name == _some_waits.c.queue_name, Event.name == _some_waits.c.event_name),
    )
    .group_by(_some_waits.c.event_name, _some_waits.c.queue_name)
    .order_by(func.min(_some_waits.c.created_at).desc())
    .limit(constant(_SHOWN))
)
"""The events that tasks wait for and that were not emitted, the latest waits first."""

QUEUE_OF_TASK = (
    select(
        clamped_time(Queue.paused_at),
        select(func.count())
        .select_from(WorkerRow)
        .where(_is_live, Queue.queue_name == func.any(WorkerRow.queue_names))
        .correlate(Queue)
        .scalar_subquery()
        .label("workers"),
        Queue.limited_at.is_not(None).label("limited"),
        LimitRow.concurrency,
        LimitTotalRow.running,
        clamped_time(
            LimitTotalRow.tat - interval(func.extract("epoch", LimitRow.rate_interval) * (LimitRow.burst - 1))
        ).label("opens_at"),
    )
    .join(TaskRow, TaskRow.queue_name == Queue.queue_name)
    .outerjoin(LimitRow, and_(LimitRow.queue_name == Queue.queue_name, LimitRow.scope == constant("queue")))
    .outerjoin(LimitTotalRow, LimitTotalRow.queue_name == Queue.queue_name)
    .where(TaskRow.task_id == bindparam("task_id", type_=Uuid()))
)
"""The pause of the queue of a task, the number of live workers that serve it, and the state of its own limit."""

AWAITED_BY_TASK = (
    select(Wait.queue_name, Wait.event_name)
    .where(Wait.task_id == bindparam("task_id", type_=Uuid()), Wait.event_name.is_not(None))
    .order_by(Wait.created_at)
    .limit(constant(_SHOWN))
)
"""The events that a task waits for."""

_PLACES = select(TaskRow.task_id, TaskRow.task_name, TaskRow.state)


def latest_failures(where: Where, since: Any) -> Executable:
    """Select the latest failed tasks of the chosen queues that match, each with its error, the latest first.

    `where` must be restricted to failed tasks since that time if it is a filter.
    """
    # A CTE, because SQLAlchemy does not see the joins in the WHERE of a select inside of a lateral one, and warns.
    chosen = None if isinstance(where, TaskFilter) else where.cte("chosen")
    of_queue = (
        select(TaskRow.task_id, TaskRow.finished_at)
        .where(
            TaskRow.queue_name == Queue.queue_name,
            TaskRow.finished_at.is_not(None),
            TaskRow.outcome == constant("failed"),
            TaskRow.finished_at >= bindparam("since", since, type_=DateTime(timezone=True)),
            *(conditions(where) if chosen is None else [TaskRow.task_id.in_(select(chosen.c[0]))]),
        )
        .order_by(TaskRow.finished_at.desc())
        .limit(constant(FAILURES))
        .correlate(Queue)
        .lateral("of_queue")
    )
    latest = (
        select(of_queue.c.task_id)
        .select_from(Queue)
        .join(of_queue, true())
        .where(_any_of(Queue.queue_name))
        .order_by(of_queue.c.finished_at.desc())
        .limit(constant(FAILURES))
        .subquery("latest")
    )
    # Errors are long, and read of those that are shown alone.
    is_short = func.octet_length(as_text(TaskRow.error)) <= constant(LONGEST_ERROR)
    name = TaskRow.error.op("->>", return_type=Text())(constant("name"))
    found = (
        select(
            TaskRow.task_id,
            TaskRow.task_name,
            clamped_time(TaskRow.finished_at),
            # The server cannot take apart JSON whose texts contain NUL.
            case((is_short, as_text(TaskRow.error))).label("error"),
            case((~is_short & (func.strpos(as_text(TaskRow.error), constant("\\u0000")) == constant(0)), name)).label(
                "error_name"
            ),
        )
        .join(latest, latest.c.task_id == TaskRow.task_id)
        .order_by(TaskRow.finished_at.desc())
    )
    return found if chosen is None else found.add_cte(chosen)


def count(where: Where, most: int) -> Select[int]:
    """Count the tasks that match, up to `most` and one more."""
    ids: Select[Any] | CompoundSelect[Any] | None = some(where, most + 1)
    if ids is None and isinstance(where, TaskFilter):
        ids = select(TaskRow.task_id).where(*matching(where)).limit(most + 1)
    if ids is None:
        raise AssertionError("a select is always countable")
    return select(func.count()).select_from(ids.subquery("counted"))


def visible(where: Where) -> Select[uuid.UUID, str, str]:
    """Select the names and states of the tasks that match."""
    return _PLACES.where(*conditions(where))
