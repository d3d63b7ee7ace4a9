"""Queues: their policies and statistics, and the deletion of what has passed its retention."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    Interval,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute, aliased

from ..models import (
    RETENTION,
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
)
from .expressions import array, clamped_time, clock, constant, interval, lock_timeout, statement_time
from .fencing import materialized

_queue_name = bindparam("queue_name", type_=Text())
_set_retention = bindparam("set_retention", type_=Boolean())
_set_event_retention = bindparam("set_event_retention", type_=Boolean())
_kept = sql_cast(constant(RETENTION), Interval())
_creation = insert(Queue).values(
    queue_name=_queue_name,
    retention=case((_set_retention, interval(bindparam("retention", type_=Float(53)))), else_=_kept),
    event_retention=case((_set_event_retention, interval(bindparam("event_retention", type_=Float(53)))), else_=_kept),
)

CREATE_QUEUE = _creation.on_conflict_do_update(
    index_elements=[Queue.queue_name],
    set_={
        "retention": case((_set_retention, _creation.excluded.retention), else_=Queue.retention),
        "event_retention": case(
            (_set_event_retention, _creation.excluded.event_retention), else_=Queue.event_retention
        ),
    },
).returning((literal_column("xmax") == literal_column("'0'::xid")).label("created"))
"""Create a queue, or change the given policies of an existing one."""

LIST_QUEUES = select(Queue.queue_name).order_by(Queue.queue_name)
"""The names of all queues."""

KNOWN_QUEUES = select(Queue.queue_name, Queue.limited_at.is_not(None).label("limited")).where(
    Queue.queue_name == func.any(array("queue_names", Text()))
)
"""Which of these queues exist, and whether they have limits."""

LOCK_QUEUE = select(Queue.queue_name).where(Queue.queue_name == _queue_name).with_for_update(read=True, key_share=True)
"""Lock a queue against being dropped until the transaction ends. Returns no row if it does not exist."""

DROP_QUEUE = delete(Queue).where(Queue.queue_name == _queue_name).returning(Queue.queue_name)
"""Delete the row of a queue: from then on nothing can be spawned into it."""

DROP_SCHEDULES = (
    delete(Schedule).where(Schedule.queue_name == _queue_name).returning(Schedule.name, Schedule.pgcron_job_name)
)
"""Delete the schedules of a queue."""

PAUSE_QUEUE = (
    update(Queue)
    .where(Queue.queue_name == bindparam("name", type_=Text()))
    .values(paused_at=case((bindparam("paused", type_=Boolean()), func.coalesce(Queue.paused_at, clock()))))
    .returning(Queue.queue_name)
)
"""Stop or resume the claiming of a queue."""

_wanted = bindparam("wanted", type_=Integer())
_after = tuple_(bindparam("after_time", type_=DateTime(timezone=True)), bindparam("after_id", type_=Uuid()))

_finished = (
    select(TaskRow.task_id, TaskRow.finished_at)
    .where(
        TaskRow.queue_name == _queue_name,
        TaskRow.outcome == bindparam("outcome", type_=Text()),
        TaskRow.finished_at.is_not(None),
        TaskRow.finished_at < statement_time() - interval(bindparam("age", type_=Float(53))),
        tuple_(TaskRow.finished_at, TaskRow.task_id) > _after,
    )
    .order_by(TaskRow.finished_at)
    .fetch(_wanted, with_ties=True)
    .subquery("finished")
)
FINISHED_BEFORE = (
    select(_finished.c.task_id, clamped_time(_finished.c.finished_at).label("finished_at"))
    .order_by(_finished.c.finished_at, _finished.c.task_id)
    .limit(_wanted)
)
"""A page of ended tasks past their retention, the oldest first.

The subquery is in the order of the index. Sorted by the id, too, all ended tasks are read by servers before version 16
if there are no statistics.
"""

_candidates = array("task_ids", Uuid())
_line = (
    select(TaskRow.task_id.label("task_id"), TaskRow.parent_task_id.label("ancestor_id"))
    .where(TaskRow.task_id == func.any(_candidates), TaskRow.parent_task_id.is_not(None))
    .cte("line", recursive=True)
)
_ancestor = aliased(TaskRow, name="ancestor")
# UNION, not UNION ALL, which would never end if two tasks were made each other's parent by hand.
_line = _line.union(
    select(_line.c.task_id, _ancestor.parent_task_id).where(
        _ancestor.task_id == _line.c.ancestor_id, _ancestor.parent_task_id.is_not(None)
    )
)
_needed = (
    select(_line.c.task_id)
    .join(_ancestor, _ancestor.task_id == _line.c.ancestor_id)
    .where(_ancestor.finished_at.is_(None))
)
_child = aliased(TaskRow, name="child")
_lock_timeout = lock_timeout()
_gone = materialized(
    "gone",
    select(TaskRow.task_id)
    .join(_lock_timeout, true())
    .where(
        TaskRow.task_id == func.any(_candidates),
        TaskRow.finished_at.is_not(None),
        TaskRow.task_id.not_in(_needed),
        ~exists().where(_child.parent_task_id == TaskRow.task_id),
        ~exists().where(Wait.child_task_id == TaskRow.task_id),
    )
    .order_by(TaskRow.task_id)
    .with_for_update(skip_locked=True, of=TaskRow),
)

DELETE_TASKS = (
    delete(TaskRow)
    .where(TaskRow.task_id == _gone.c.task_id)
    .returning(TaskRow.task_id)
    .add_cte(
        delete(Checkpoint).where(Checkpoint.task_id == _gone.c.task_id).cte("gone_checkpoints"),
        delete(RunRow).where(RunRow.task_id == _gone.c.task_id).cte("gone_runs"),
        delete(Message).where(Message.task_id == _gone.c.task_id).cte("gone_messages"),
        delete(TaskValueRow).where(TaskValueRow.task_id == _gone.c.task_id).cte("gone_values"),
        delete(Stream).where(Stream.task_id == _gone.c.task_id).cte("gone_streams"),
        delete(StreamItems).where(StreamItems.task_id == _gone.c.task_id).cte("gone_items"),
    )
)
"""Delete ended tasks with all that belongs to them; those with an unfinished ancestor, a child or a waiter stay.

Fails with 55P03 at once if another transaction has locked a row that belongs to one of them, such as a row of the
application that refers to it.
"""

# A scalar subquery looks the waiter up for each event; for a join the planner may read all waits.
_waiter = (
    select(Wait.task_id)
    .where(Wait.queue_name == Event.queue_name, Wait.event_name == Event.name)
    .limit(1)
    .correlate(Event)
    .scalar_subquery()
)
_spent = materialized(
    "spent",
    select(Event.queue_name, Event.name)
    .where(
        Event.queue_name == _queue_name,
        Event.emitted_at < statement_time() - interval(bindparam("age", type_=Float(53))),
        _waiter.is_(None),
    )
    .order_by(Event.emitted_at)
    .limit(_wanted)
    .with_for_update(skip_locked=True, of=Event),
)

DELETE_EVENTS = (
    delete(Event).where(Event.queue_name == _spent.c.queue_name, Event.name == _spent.c.name).returning(Event.name)
)
"""Delete a batch of old events without waiters. Waits stored before the event was emitted are visible here."""

_some = materialized(
    "some",
    select(TaskRow.task_id)
    .where(TaskRow.queue_name == _queue_name)
    .order_by(TaskRow.task_id)
    .limit(_wanted)
    .with_for_update(),
)
DELETE_QUEUE_TASKS = (
    delete(TaskRow)
    .where(TaskRow.task_id == _some.c.task_id)
    .returning(TaskRow.task_id)
    .add_cte(
        delete(Checkpoint).where(Checkpoint.task_id == _some.c.task_id).cte("gone_checkpoints"),
        delete(RunRow).where(RunRow.task_id == _some.c.task_id).cte("gone_runs"),
        delete(Wait).where(Wait.task_id == _some.c.task_id).cte("gone_waits"),
        delete(Message).where(Message.task_id == _some.c.task_id).cte("gone_messages"),
        delete(TaskValueRow).where(TaskValueRow.task_id == _some.c.task_id).cte("gone_values"),
        delete(Stream).where(Stream.task_id == _some.c.task_id).cte("gone_streams"),
        delete(StreamItems).where(StreamItems.task_id == _some.c.task_id).cte("gone_items"),
    )
)
"""Delete a batch of a dropped queue's tasks, with all that belongs to them."""

DELETE_QUEUE_EVENTS = delete(Event).where(Event.queue_name == _queue_name)
"""Delete the events of a dropped queue."""


def _delete_minutes(*conditions: ColumnElement[bool]) -> Any:
    key = (TaskMinute.queue_name, TaskMinute.minute, TaskMinute.task_name, TaskMinute.worker_id)
    found = materialized(
        "found",
        select(*key)
        .where(TaskMinute.queue_name == _queue_name, *conditions)
        .order_by(TaskMinute.minute)
        .limit(_wanted)
        .with_for_update(skip_locked=True, of=TaskMinute),
    )
    same = (column == found.c[column.key] for column in key)
    return delete(TaskMinute).where(*same).returning(TaskMinute.minute)


DELETE_MINUTES = _delete_minutes(TaskMinute.minute < statement_time() - interval(bindparam("age", type_=Float(53))))
"""Delete a batch of what workers have counted of a queue's old minutes, the oldest first."""

DELETE_QUEUE_MINUTES = _delete_minutes()
"""Delete a batch of what workers have counted of a dropped queue."""


def _oldest(moment: InstrumentedAttribute[Any], *conditions: ColumnElement[bool]) -> ColumnElement[Any]:
    """Read the smallest time, which is the first entry of an index."""
    return select(func.min(moment)).where(moment.is_not(None), *conditions).correlate(Queue).scalar_subquery()


_ages = materialized(
    "ages",
    select(
        Queue.queue_name,
        Queue.retention,
        Queue.event_retention,
        func.least(
            *(
                _oldest(
                    TaskRow.finished_at, TaskRow.queue_name == Queue.queue_name, TaskRow.outcome == constant(outcome)
                )
                for outcome in ("completed", "cancelled", "failed")
            )
        ).label("oldest_task"),
        _oldest(Event.emitted_at, Event.queue_name == Queue.queue_name).label("oldest_event"),
        _oldest(TaskMinute.minute, TaskMinute.queue_name == Queue.queue_name).label("oldest_minute"),
    ),
)
_old_task = _ages.c.oldest_task < statement_time() - _ages.c.retention
_old_event = _ages.c.oldest_event < statement_time() - _ages.c.event_retention
_old_minute = _ages.c.oldest_minute < statement_time() - _ages.c.retention
RETENTIONS = select(
    _ages.c.queue_name,
    func.extract("epoch", case((_old_task, _ages.c.retention))).label("retention"),
    func.extract("epoch", case((_old_event, _ages.c.event_retention))).label("event_retention"),
    func.extract("epoch", case((_old_minute, _ages.c.retention))).label("minute_retention"),
).where(or_(_old_task, _old_event, _old_minute))
"""Queues with tasks, events or counts past their retention, in seconds; null for the kind that has none."""

_unfinished = (TaskRow.finished_at.is_(None), TaskRow.queue_name == Queue.queue_name)
_unclaimed = TaskRow.claimed_by.is_(None)
_now = (
    select(
        func.count().filter(_unclaimed).label("ready"),
        func.count().filter(~_unclaimed).label("running"),
        func.min(TaskRow.available_at).filter(_unclaimed).label("oldest_at"),
    )
    # `statement_time()` can be the bound of an index scan; running tasks were available before it as well.
    .where(*_unfinished, TaskRow.available_at <= statement_time())
    .correlate(Queue)
    .lateral("now")
)


def _count(*conditions: ColumnElement[bool]) -> ColumnElement[int]:
    return select(func.count()).select_from(TaskRow).where(*conditions).correlate(Queue).scalar_subquery()


_chosen = array("queue_names", Text())

QUEUE_STATISTICS = (
    select(
        Queue.queue_name,
        clamped_time(Queue.paused_at),
        _now.c.ready,
        (
            _count(*_unfinished, TaskRow.available_at > statement_time())
            + _count(*_unfinished, TaskRow.available_at.is_(None))
        ).label("scheduled"),
        _now.c.running,
        _count(
            TaskRow.finished_at.is_not(None),
            TaskRow.queue_name == Queue.queue_name,
            TaskRow.outcome == constant("failed"),
        ).label("failed"),
        func.extract("epoch", statement_time() - _now.c.oldest_at).label("oldest_ready_seconds"),
        Queue.limited_at.is_not(None).label("limited"),
    )
    .select_from(Queue)
    .join(_now, true())
    .where(or_(_chosen.is_(None), Queue.queue_name == func.any(_chosen)))
    .order_by(Queue.queue_name)
)
"""The numbers of tasks in these queues, or in all: counted in the indexes of unfinished and of ended tasks."""
