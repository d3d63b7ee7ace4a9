"""Waits and what resolves them: an event, the end of a child, or a timeout.

No statement both stores a wait and looks for what resolves it, because all parts of a statement see one snapshot: of
3,000 waits stored concurrently with their emits in that way, 1,799 were never resolved. A waiter commits its wait first
and then looks, with :data:`RESOLVE`; an emitter commits its event, and a child its end, first and then resolves the
stored waits. In this order at least one of the two sees the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Executable,
    Float,
    Integer,
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
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.selectable import CTE
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, Event, Message, Queue, TaskRow, Wait
from .expressions import array, as_json, as_jsonb, as_text, clamped_time, clock, constant, interval, next_fence, rows
from .fencing import materialized
from .spawning import arrivals

_task_ids = array("task_ids", Uuid())


def for_messages(kind: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """Test whether a wait is for a message: to receive it, or to wake the task for it to decide a race."""
    return or_(kind == constant("message"), kind == constant("race message"))


def locked_waiters(*conditions: ColumnElement[bool]) -> CTE:
    """Lock those of the tasks `task_ids` that meet the conditions. A claim passes over a task while it is locked."""
    return materialized(
        "waiters",
        select(TaskRow.task_id, TaskRow.state)
        .where(TaskRow.task_id == func.any(_task_ids), TaskRow.finished_at.is_(None), *conditions)
        .order_by(TaskRow.task_id)
        .with_for_update(skip_locked=True, key_share=True, of=TaskRow),
    )


waiters = locked_waiters()
_child = TaskRow.__table__.alias("child")
_in_time = or_(Wait.due_at.is_(None), Wait.due_at > clock())
_event_came = Event.name.is_not(None) & (or_(_in_time, Event.emitted_at <= Wait.due_at))
_child_ended = _child.c.finished_at.is_not(None) & (or_(_in_time, _child.c.finished_at <= Wait.due_at))
_child_missing = (Wait.kind == constant("join")) & _child.c.task_id.is_(None)
# A message that came in time is received, whenever that is done: see `statements.messages`.
_message_came = for_messages(Wait.kind) & exists().where(
    Message.task_id == Wait.task_id,
    Message.topic == Wait.name,
    Message.received_at.is_(None),
    Message.sent_at <= Wait.due_at,
)
_timed_out = (Wait.due_at <= clock()) & ~_message_came
_resolved = materialized(
    "resolved",
    select(
        Wait.task_id,
        Wait.key,
        waiters.c.state,
        case(
            (_event_came, constant("completed")),
            (_child_ended, _child.c.outcome),
            (_child_missing, constant("cancelled")),
            else_=constant("timeout"),
        ).label("status"),
        case(
            (_event_came, as_text(Event.payload)),
            (_child_ended & (_child.c.outcome == constant("completed")), as_text(_child.c.output)),
            (_child_ended, as_text(_child.c.error)),
        ).label("value"),
    )
    .join(waiters, waiters.c.task_id == Wait.task_id)
    .outerjoin(Event, (Event.queue_name == Wait.queue_name) & (Event.name == Wait.event_name))
    .outerjoin(_child, _child.c.task_id == Wait.child_task_id)
    .where(or_(_event_came, _child_ended, _child_missing, _timed_out)),
)
_free_waits = materialized(
    "free_waits",
    select(_resolved)
    .join(Wait, (Wait.task_id == _resolved.c.task_id) & (Wait.key == _resolved.c.key))
    .with_for_update(skip_locked=True, of=Wait),
)

COALESCING_SECONDS = 0.001
"""Delay of a wake-up per remaining wait of the task: without it, a thousand joins would cost a thousand replays."""


def resolving(settled: CTE, follow_up: Callable[[CTE], tuple[CTE, ...]] | None = None) -> Executable:
    """Record the outcomes of waits, delete these, and make sleeping tasks claimable.

    `settled` has the columns task_id, key, status, value and state, and may have the `child_task_id` to record.
    `follow_up` returns parts of the statement that depend on the records that were written.
    """
    child = settled.c.child_task_id if "child_task_id" in settled.c else Wait.child_task_id
    removed = (
        delete(Wait)
        .where(Wait.task_id == settled.c.task_id, Wait.key == settled.c.key)
        .returning(
            Wait.task_id,
            Wait.key,
            Wait.kind,
            Wait.name,
            child.label("child_task_id"),
            Wait.created_at,
            settled.c.status,
            settled.c.value,
            settled.c.state,
        )
        .cte("removed")
    )
    recorded = (
        insert(Checkpoint)
        .from_select(
            ["task_id", "key", "kind", "name", "status", "value", "child_task_id", "created_at", "duration"],
            select(
                removed.c.task_id,
                removed.c.key,
                removed.c.kind,
                removed.c.name,
                removed.c.status,
                as_json(removed.c.value),
                removed.c.child_task_id,
                clock(),
                func.extract("epoch", clock() - clamped_time(removed.c.created_at)),
            ),
        )
        .on_conflict_do_nothing()
    )
    if follow_up is None:
        further: tuple[CTE, ...] = (recorded.cte("recorded"),)
    else:
        further = follow_up(recorded.returning(Checkpoint.task_id, Checkpoint.child_task_id).cte("recorded"))
    # The state is that of the row under its lock, because in the statement's snapshot the task may still be running.
    woken_ids = (
        select(removed.c.task_id, func.count().label("count"))
        .where(removed.c.state == constant("sleeping"))
        .group_by(removed.c.task_id)
        .subquery("woken_ids")
    )
    left = (
        select(func.count()).select_from(Wait).where(Wait.task_id == woken_ids.c.task_id).scalar_subquery()
    ) - woken_ids.c.count
    available_at = func.least(TaskRow.available_at, clock() + interval(func.least(left * COALESCING_SECONDS, 1.0)))
    woken = (
        update(TaskRow)
        .where(TaskRow.task_id == woken_ids.c.task_id)
        .values(
            available_at=available_at,
            fence=next_fence(TaskRow.fence),
            resumes_at=case((TaskRow.limit_key.is_not(None), available_at)),
        )
        .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key)
        .cte("woken")
    )
    return select(woken.c.task_id, woken.c.queue_name, woken.c.priority, woken.c.available_at).add_cte(
        *further, arrivals(woken)
    )


RESOLVE = resolving(_resolved)
"""Resolve these tasks' waits as far as possible, each exactly once, and make the sleeping tasks claimable.

An event or a child's end counts if it came before the wait's deadline, even if it is only seen afterwards.
"""

RESOLVE_FREE = resolving(_free_waits)
"""`RESOLVE` that skips waits locked by other transactions, so that they do not delay the rest of the batch."""

UNRESOLVED = (
    select(Wait.task_id)
    .join(TaskRow, (TaskRow.task_id == Wait.task_id) & TaskRow.finished_at.is_(None))
    .outerjoin(Event, (Event.queue_name == Wait.queue_name) & (Event.name == Wait.event_name))
    .outerjoin(_child, _child.c.task_id == Wait.child_task_id)
    .where(
        Wait.created_at < clock() - interval(bindparam("age", type_=Float(53))),
        or_(Event.name.is_not(None), _child.c.finished_at.is_not(None), _child_missing),
    )
    .limit(bindparam("wanted", type_=Integer()))
    .with_for_update(skip_locked=True, key_share=True, of=[TaskRow, Wait])
)
"""Waits that should have been resolved: a crash between two statements leaves them.

The rows are locked, only for this statement, so that those which cannot be resolved now do not fill the page.
"""

DELETE_WAITS = delete(Wait).where(Wait.task_id == func.any(_task_ids))
"""Delete the waits of cancelled tasks, including those stored while the cancel waited for its lock."""

_stray = materialized(
    "stray",
    select(Wait.task_id, Wait.key)
    .where(
        Wait.created_at < clock() - interval(bindparam("age", type_=Float(53))),
        ~exists().where(TaskRow.task_id == Wait.task_id, TaskRow.finished_at.is_(None)),
    )
    .with_for_update(skip_locked=True, of=Wait),
)
DELETE_STRAY_WAITS = delete(Wait).where(Wait.task_id == _stray.c.task_id, Wait.key == _stray.c.key)
"""Delete waits of ended tasks: they were stored concurrently with the end, which did not see them."""

EMIT_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "queue_names": Text(),
    "names": Text(),
    "payloads": Text(),
    "metadata": Text(),
}
_emitted = rows("emitted", **EMIT_COLUMNS)

_first = (
    insert(Event)
    .from_select(
        ["queue_name", "name", "payload", "metadata", "emitted_at"],
        select(
            _emitted.c.queue_names,
            _emitted.c.names,
            as_json(_emitted.c.payloads),
            as_jsonb(_emitted.c.metadata),
            clock(),
        ).order_by(_emitted.c.queue_names, _emitted.c.names),
    )
    .on_conflict_do_nothing()
    .returning(Event.queue_name, Event.name, Event.emitted_at)
    .cte("first")
)


def _elsewhere(event: CTE) -> Any:
    """Return another queue in which a task waits for an event of this name, if none waits in the event's queue."""
    return (
        select(Queue.queue_name)
        .where(
            ~exists().where(Wait.queue_name == event.c.queue_name, Wait.event_name == event.c.name),
            Queue.queue_name != event.c.queue_name,
            exists().where(Wait.queue_name == Queue.queue_name, Wait.event_name == event.c.name),
        )
        .limit(literal_column("1"))
        .correlate(event)
        .scalar_subquery()
        .label("elsewhere")
    )


EMIT = select(_first.c.queue_name, _first.c.name, _first.c.emitted_at, _elsewhere(_first))
"""Emit events, in the order of their names so that two transactions never deadlock. Delivery follows separately."""

REPLACE_EVENT = (
    update(Event)
    .where(Event.queue_name == bindparam("event_queue", type_=Text()), Event.name == bindparam("event", type_=Text()))
    .values(payload=as_json(bindparam("new_payload", type_=Text())))
    .returning(Event.name)
)
"""Replace the payload of an emitted event, for the waits that are resolved from then on."""

_undelivered = materialized(
    "undelivered",
    select(Event.queue_name, Event.name)
    .where(Event.delivered_at.is_(None))
    .order_by(Event.emitted_at)
    .limit(bindparam("wanted_events", type_=Integer()))
    .offset(bindparam("passed", type_=Integer())),
)
UNDELIVERED = select(
    _undelivered.c.queue_name,
    _undelivered.c.name,
    select(
        func.array_agg(
            select(Wait.task_id)
            .where(Wait.queue_name == _undelivered.c.queue_name, Wait.event_name == _undelivered.c.name)
            .limit(bindparam("wanted_waits", type_=Integer()))
            .correlate(_undelivered)
            .subquery("waiting")
            .c.task_id
        )
    )
    .scalar_subquery()
    .label("task_ids"),
    _elsewhere(_undelivered),
)
"""A page of events not yet delivered to all of their waiters, with some of the waiting tasks.

The oldest come first. `passed` skips events already seen that are locked, or whose waiters are, by other transactions.
"""

_marked = rows("marked", queue_names=Text(), names=Text())
_free_events = materialized(
    "free_events",
    select(Event.queue_name, Event.name)
    .join(_marked, (Event.queue_name == _marked.c.queue_names) & (Event.name == _marked.c.names))
    .with_for_update(skip_locked=True, key_share=True, of=Event),
)
MARK_DELIVERED = (
    update(Event)
    .where(
        Event.queue_name == _free_events.c.queue_name,
        Event.name == _free_events.c.name,
        ~exists().where(Wait.queue_name == Event.queue_name, Wait.event_name == Event.name),
    )
    .values(delivered_at=clock())
    .returning(Event.queue_name, Event.name)
)
"""Mark events without remaining waiters as delivered. Tasks that begin to wait later find the event themselves."""

_ended = rows("ended", task_ids=Uuid())
WAITING_FOR = select(Wait.task_id).join(_ended, Wait.child_task_id == _ended.c.task_ids).distinct()
"""Tasks that wait for the end of any of these tasks."""

_awoken = rows("awoken", task_ids=Uuid())
_sleeper = TaskRow.__table__.alias("sleeper")
# The statement that made a task available also recorded what woke it, and delayed the task by at most a second.
_latest = (Checkpoint.task_id == _awoken.c.task_ids) & (
    Checkpoint.created_at >= _sleeper.c.available_at - interval(literal_column("1.1"))
)
_came_from = union_all(
    select(Checkpoint.task_id, Event.metadata_["durable::otel_context"].label("carrier"))
    .select_from(_awoken)
    .join(_sleeper, _sleeper.c.task_id == _awoken.c.task_ids)
    .join(Checkpoint, _latest & (Checkpoint.kind == constant("event")) & (Checkpoint.status == constant("completed")))
    .join(Event, (Event.queue_name == _sleeper.c.queue_name) & (Event.name == Checkpoint.name)),
    select(Checkpoint.task_id, _child.c.headers["durable::otel_context"])
    .select_from(_awoken)
    .join(_sleeper, _sleeper.c.task_id == _awoken.c.task_ids)
    .join(Checkpoint, _latest & (Checkpoint.kind == constant("join")) & (Checkpoint.status != constant("timeout")))
    .join(_child, _child.c.task_id == Checkpoint.child_task_id),
).subquery("came_from")
WAKERS = (
    select(_came_from.c.task_id, as_text(func.jsonb_agg(_came_from.c.carrier)).label("carriers"))
    .where(_came_from.c.carrier.is_not(None))
    .group_by(_came_from.c.task_id)
)
"""The trace contexts of the events and children that woke these tasks."""

_peek = rows("peek", queue_names=Text(), event_names=Text())
PEEK_EVENTS = select(
    Event.queue_name,
    Event.name,
    as_text(Event.payload).label("payload"),
    as_text(Event.metadata_).label("metadata"),
    clamped_time(Event.emitted_at),
).join(_peek, (Event.queue_name == _peek.c.queue_names) & (Event.name == _peek.c.event_names))
"""Events that exist already when a task is about to wait for them."""

PEEK_TASKS = select(
    TaskRow.task_id,
    TaskRow.parent_task_id,
    TaskRow.outcome,
    TaskRow.task_name,
    as_text(TaskRow.output).label("output"),
    as_text(TaskRow.error).label("error"),
).where(TaskRow.task_id == func.any(_task_ids))
"""The outcomes of children that a task is about to join; null if unfinished."""

POLL_TASKS = select(
    TaskRow.task_id,
    TaskRow.state,
    TaskRow.outcome,
    TaskRow.task_name,
    case((TaskRow.outcome.is_not(None), as_text(TaskRow.output))).label("output"),
    case((TaskRow.outcome.is_not(None), as_text(TaskRow.error))).label("error"),
).where(TaskRow.task_id == func.any(_task_ids))
"""The states and results of tasks, for clients that wait for them."""
