"""Problems to report: unclaimed work, overdue waits, orphaned rows, transactions that block vacuum.

Each statement returns the worst cases, a bounded number of rows. `grace` is the number of seconds within which the
engine repairs such a case by itself. The statements lock nothing and are for operators: some of them read whole tables.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
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
    column,
    exists,
    func,
    literal_column,
    or_,
    select,
    table,
    union_all,
)
from sqlalchemy.orm import aliased

from ..models import (
    Checkpoint,
    Event,
    Message,
    Queue,
    RunRow,
    Schedule,
    Stream,
    StreamItems,
    TaskMinute,
    TaskRow,
    TaskValueRow,
    Wait,
    WorkerRow,
)
from .expressions import clamped_time, clock, constant, interval, long_steps
from .waits import for_messages

_moment_ago = clock() - interval(bindparam("grace", type_=Float(53)))
_wanted = bindparam("wanted", type_=Integer())
_unfinished = TaskRow.finished_at.is_(None)


def _age(moment: ColumnElement[Any] | Any) -> ColumnElement[Any]:
    return func.extract("epoch", clock() - clamped_time(moment))


_paused = exists().where(Queue.queue_name == TaskRow.queue_name, Queue.paused_at.is_not(None))
_served = exists().where(
    WorkerRow.lost_at.is_(None),
    WorkerRow.expires_at > clock(),
    TaskRow.queue_name == func.any(WorkerRow.queue_names),
)

UNCLAIMED = (
    select(
        TaskRow.queue_name,
        TaskRow.task_name,
        func.count().label("count"),
        _age(func.min(TaskRow.available_at)).label("oldest_seconds"),
        func.bool_or(_served).label("served"),
    )
    .where(
        _unfinished,
        TaskRow.claimed_by.is_(None),
        TaskRow.available_at < _moment_ago,
        ~_paused,
        # Tasks with a limit key may well have to wait for others of their key.
        or_(TaskRow.limit_key.is_(None), ~_served),
    )
    .group_by(TaskRow.queue_name, TaskRow.task_name)
    .order_by(func.min(TaskRow.available_at))
    .limit(_wanted)
)
"""Due tasks that no worker has claimed, and whether any worker serves their queue."""

_has_message = for_messages(Wait.kind) & exists().where(
    Message.task_id == Wait.task_id,
    Message.topic == Wait.name,
    Message.received_at.is_(None),
    Message.sent_at < _moment_ago,
)
_child = aliased(TaskRow, name="child")
STUCK_WAITS = (
    select(
        Wait.task_id,
        Wait.kind,
        func.coalesce(Wait.event_name, func.cast(Wait.child_task_id, Text()), Wait.name).label("awaited"),
        case(
            (Event.name.is_not(None), constant("the event was emitted")),
            (_child.finished_at.is_not(None), constant("the child has ended")),
            ((Wait.kind == constant("join")) & _child.task_id.is_(None), constant("there is no such child")),
            (_has_message, constant("a message was sent")),
            else_=constant("its timeout is over"),
        ).label("reason"),
        _age(Wait.created_at).label("waiting_seconds"),
    )
    .join(TaskRow, (TaskRow.task_id == Wait.task_id) & _unfinished & TaskRow.claimed_by.is_(None))
    .outerjoin(Event, (Event.queue_name == Wait.queue_name) & (Event.name == Wait.event_name))
    .outerjoin(_child, _child.task_id == Wait.child_task_id)
    .where(
        Wait.created_at < _moment_ago,
        or_(
            Event.emitted_at < _moment_ago,
            _child.finished_at < _moment_ago,
            (Wait.kind == constant("join")) & _child.task_id.is_(None),
            Wait.due_at < _moment_ago,
            _has_message,
        ),
        ~_paused,
    )
    .order_by(Wait.created_at)
    .limit(_wanted)
)
"""Waits that should have been resolved, of tasks that are still asleep."""

SLEEPLESS = (
    select(TaskRow.task_id, TaskRow.task_name, TaskRow.queue_name)
    .where(
        _unfinished,
        TaskRow.available_at.is_(None),
        TaskRow.claimed_by.is_(None),
        ~exists().where(Wait.task_id == TaskRow.task_id),
    )
    .limit(_wanted)
)
"""Sleeping tasks without a wait: no time, event or child will ever wake them."""

UNDELIVERED = (
    select(Event.queue_name, Event.name, _age(Event.emitted_at).label("seconds"))
    .where(Event.delivered_at.is_(None), Event.emitted_at < _moment_ago)
    .order_by(Event.emitted_at)
    .limit(_wanted)
)
"""Events that no worker has delivered."""

OVERDUE = (
    select(TaskRow.task_id, TaskRow.task_name, _age(TaskRow.cancel_at).label("seconds"))
    .where(_unfinished, TaskRow.cancel_at.is_not(None), TaskRow.cancel_at < _moment_ago)
    .order_by(TaskRow.cancel_at)
    .limit(_wanted)
)
"""Tasks past their `max_pending_time` or `max_running_time`."""

EXPIRED_LEASES = (
    select(
        TaskRow.claimed_by.label("worker_id"),
        WorkerRow.name.label("worker_name"),
        func.count().label("runs"),
        _age(func.max(WorkerRow.expires_at)).label("seconds"),
    )
    .outerjoin(WorkerRow, WorkerRow.worker_id == TaskRow.claimed_by)
    .where(
        _unfinished,
        TaskRow.claimed_by.is_not(None),
        or_(WorkerRow.worker_id.is_(None), WorkerRow.expires_at < _moment_ago, WorkerRow.lost_at < _moment_ago),
    )
    .group_by(TaskRow.claimed_by, WorkerRow.name)
    .limit(_wanted)
)
"""Runs of silent or unknown workers that no worker has taken over."""

_long = long_steps()
_began = cast(_long.c.value["started_at"].as_string(), DateTime(timezone=True))
LONG_STEPS = (
    select(
        TaskRow.task_id,
        TaskRow.task_name,
        _long.c.value["step"].as_string().label("step"),
        WorkerRow.name.label("worker_name"),
        _age(_began).label("seconds"),
    )
    .where(
        TaskRow.task_id == cast(_long.c.value["task_id"].as_string(), Uuid()),
        TaskRow.claimed_by == WorkerRow.worker_id,
        _began < clock() - interval(bindparam("step_bound", type_=Float(53))),
    )
    .order_by(_began)
    .limit(_wanted)
)
"""Runs that have been in one step for longer than a bound."""

INCONSISTENT = (
    select(TaskRow.task_id, TaskRow.task_name, TaskRow.state)
    .where(
        _unfinished,
        or_(
            TaskRow.state.not_in([constant(state) for state in ("pending", "running", "sleeping")]),
            (TaskRow.state == constant("running")) != TaskRow.claimed_by.is_not(None),
        ),
    )
    .limit(_wanted)
)
"""Tasks whose columns contradict each other."""

OVERDUE_TICKS = (
    select(Schedule.name, Schedule.queue_name, _age(Schedule.next_tick_at).label("seconds"))
    .where(Schedule.paused_at.is_(None), Schedule.backend == constant("worker"), Schedule.next_tick_at < _moment_ago)
    .order_by(Schedule.next_tick_at)
    .limit(_wanted)
)
"""Schedules with a due tick that no worker has fired."""

_parent = aliased(TaskRow, name="parent")


def _orphan(what: str, id_: ColumnElement[Any] | Any, query: Select[Any]) -> Any:
    found = query.with_only_columns(func.cast(id_, Text()).label("id")).limit(_wanted).subquery()
    return select(constant(what).label("what"), found.c.id)


ORPHANS = union_all(
    _orphan(
        "task in a queue that does not exist",
        TaskRow.task_id,
        select(TaskRow).where(_unfinished, ~exists().where(Queue.queue_name == TaskRow.queue_name)),
    ),
    _orphan(
        "task whose parent does not exist",
        TaskRow.task_id,
        select(TaskRow).where(
            _unfinished,
            TaskRow.parent_task_id.is_not(None),
            ~exists().where(_parent.task_id == TaskRow.parent_task_id),
        ),
    ),
    _orphan(
        "task whose parent has failed or was cancelled",
        TaskRow.task_id,
        select(TaskRow)
        .join(_parent, _parent.task_id == TaskRow.parent_task_id)
        .where(
            _unfinished,
            _parent.outcome.in_([constant("failed"), constant("cancelled")]),
            _parent.finished_at < _moment_ago,
            TaskRow.created_at < _moment_ago,
        ),
    ),
    _orphan(
        "wait of a task that has ended or does not exist",
        Wait.task_id,
        select(Wait).where(
            ~exists().where(TaskRow.task_id == Wait.task_id, _unfinished), Wait.created_at < _moment_ago
        ),
    ),
    _orphan(
        "checkpoint of a task that does not exist",
        Checkpoint.task_id,
        select(Checkpoint).where(~exists().where(TaskRow.task_id == Checkpoint.task_id)),
    ),
    _orphan(
        "run of a task that does not exist",
        RunRow.task_id,
        select(RunRow).where(~exists().where(TaskRow.task_id == RunRow.task_id)),
    ),
    _orphan(
        "message to a task that does not exist",
        Message.task_id,
        select(Message).where(~exists().where(TaskRow.task_id == Message.task_id), Message.sent_at < _moment_ago),
    ),
    _orphan(
        "value of a task that does not exist",
        TaskValueRow.task_id,
        select(TaskValueRow).where(~exists().where(TaskRow.task_id == TaskValueRow.task_id)),
    ),
    _orphan(
        "stream of a task that does not exist",
        Stream.task_id,
        select(Stream).where(~exists().where(TaskRow.task_id == Stream.task_id)),
    ),
    _orphan(
        "items of a stream that does not exist",
        StreamItems.task_id,
        select(StreamItems).where(
            ~exists().where(Stream.task_id == StreamItems.task_id, Stream.name == StreamItems.name)
        ),
    ),
    _orphan(
        "event of a queue that does not exist",
        Event.name,
        select(Event).where(~exists().where(Queue.queue_name == Event.queue_name)),
    ),
    _orphan(
        "count of a queue that does not exist",
        TaskMinute.queue_name,
        select(TaskMinute).where(~exists().where(Queue.queue_name == TaskMinute.queue_name)),
    ),
)
"""Rows whose queue, task or parent does not exist or has ended."""

_activity = table(
    "pg_stat_activity",
    column("pid", Integer()),
    column("application_name", Text()),
    column("usename", Text()),
    column("state", Text()),
    column("xact_start", DateTime(timezone=True)),
    column("backend_xmin"),
    column("datname", Text()),
    schema="pg_catalog",
)
_prepared = table(
    "pg_prepared_xacts",
    column("gid", Text()),
    column("owner", Text()),
    column("prepared", DateTime(timezone=True)),
    column("database", Text()),
    schema="pg_catalog",
)
_here = func.current_database()
_snapshots = union_all(
    select(
        _activity.c.pid,
        _activity.c.application_name,
        _activity.c.usename.label("role"),
        _activity.c.state,
        _activity.c.xact_start.label("since"),
    ).where(
        _activity.c.backend_xmin.is_not(None),
        _activity.c.datname == _here,
        _activity.c.pid != func.pg_backend_pid(),
    ),
    select(
        literal_column("NULL", Integer()),
        func.concat(constant("prepared transaction "), _prepared.c.gid),
        _prepared.c.owner,
        constant("prepared"),
        _prepared.c.prepared,
    ).where(_prepared.c.database == _here),
).subquery("snapshots")

OLDEST_SNAPSHOT = (
    select(
        _snapshots.c.pid,
        _snapshots.c.application_name,
        _snapshots.c.role,
        _snapshots.c.state,
        _age(_snapshots.c.since).label("seconds"),
    )
    .where(_snapshots.c.since.is_not(None))
    .order_by(_snapshots.c.since)
    .limit(1)
)
"""The oldest transaction that keeps vacuum from removing dead rows, and its age."""
