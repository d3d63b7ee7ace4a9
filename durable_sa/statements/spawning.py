"""Enqueueing tasks, and finding out why an insert passed over some."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Executable,
    Float,
    Integer,
    SmallInteger,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.sql.selectable import FromClause, Select
from sqlalchemy.types import TypeEngine

from ..models import LimitArrivalRow, Queue, TaskRow
from .expressions import (
    array,
    as_json,
    as_jsonb,
    as_text,
    clamped_limit,
    clock,
    constant,
    interval,
    length,
    numbered_rows,
    one_row,
    rows,
)

SPAWN_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_id": Uuid(),
    "run_id": Uuid(),
    "queue_name": Text(),
    "task_name": Text(),
    "params": Text(),
    "headers": Text(),
    "priority": SmallInteger(),
    "max_attempts": Integer(),
    "max_lost_workers": Integer(),
    "retry_kind": Text(),
    "retry_base_delay": Float(53),
    "retry_factor": Float(53),
    "retry_max_backoff": Float(53),
    "retry_jitter": Float(53),
    "max_pending_seconds": Float(53),
    "max_running_seconds": Float(53),
    "available_at": DateTime(timezone=True),
    "delay_seconds": Float(53),
    "parent_task_id": Uuid(),
    "follow_ups": Text(),
    "idempotency_key": Text(),
}
"""The values of a spawn."""

LIMITED_SPAWN_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    **SPAWN_COLUMNS,
    "limit_key": Text(),
    "weight": SmallInteger(),
    "unique_key": Text(),
}
"""The values of a spawn with those of limits."""

_OWN: Final = ("task_id", "run_id", "params", "idempotency_key")

ITEM_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    **{name: SPAWN_COLUMNS[name] for name in _OWN},
    "kind": Integer(),
}
"""The values that differ between tasks that are spawned together, and the number of a task's kind, from 1."""

KIND_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    name: type_ for name, type_ in SPAWN_COLUMNS.items() if name not in _OWN
}
"""The values that they have in common: so a few arrays as long as the batch are sent and unnested, not twenty."""


SAME_KIND_COLUMNS: Final = ("task_id", "run_id", "params")
"""The values that differ between tasks of one kind without keys."""


def insert_tasks(source: FromClause, *, new: bool = False) -> Insert:
    """Insert tasks from rows of `SPAWN_COLUMNS`, or :func:`limited_spawnable`, without those whose id or key exists.

    With `new`, the statement fails with 23505 if one of them exists: that saves the server an eighth of its work.

    Rows that are numbered, by a column `position`, become available in that order, which a join does not keep. They are
    inserted in the order of their keys, so that two statements that insert the same keys cannot deadlock.
    """
    timed = select(source, clock().label("now"))
    if "position" in source.c:
        timed = timed.order_by(source.c.position)
    t = timed.subquery("new").c
    start_at = func.coalesce(t.available_at, t.now + interval(func.coalesce(t.delay_seconds, 0.0)))
    values: dict[str, Any] = {
        "task_id": t.task_id,
        "run_id": t.run_id,
        "queue_name": t.queue_name,
        "task_name": t.task_name,
        "params": as_json(t.params),
        "headers": as_jsonb(t.headers),
        "priority": t.priority,
        "max_attempts": t.max_attempts,
        "max_lost_workers": t.max_lost_workers,
        "retry_kind": t.retry_kind,
        "retry_base_delay": t.retry_base_delay,
        "retry_factor": t.retry_factor,
        "retry_max_backoff": t.retry_max_backoff,
        "retry_jitter": t.retry_jitter,
        "max_pending_time": interval(t.max_pending_seconds),
        "max_running_time": interval(t.max_running_seconds),
        "created_at": t.now,
        "available_at": start_at,
        "cancel_at": start_at + interval(t.max_pending_seconds),
        "parent_task_id": t.parent_task_id,
        "follow_ups": as_json(t.follow_ups),
        "idempotency_key": t.idempotency_key,
    }
    if "limited" in source.c:
        # In a queue with limits each task has a key, if only the empty one.
        values["limit_key"] = func.coalesce(t.limit_key, case((t.limited, constant(""))))
        values |= {"weight": t.weight, "unique_key": t.unique_key}
    selected = select(*values.values())
    if new:
        return insert(TaskRow).from_select(list(values), selected)
    if "position" in source.c:
        keys = (t.idempotency_key, t.unique_key) if "limited" in source.c else (t.idempotency_key,)
        selected = selected.order_by(t.queue_name, *keys)
    return insert(TaskRow).from_select(list(values), selected).on_conflict_do_nothing()


def optional_lock_timeout() -> CTE:
    """Set the lock timeout of one statement, unless the parameter is NULL, when joined to the source of its rows."""
    given = bindparam("lock_timeout", type_=Text())
    setting = case((given.is_not(None), func.pg_catalog.set_config(constant("lock_timeout"), given, true())))
    return select(setting.label("lock_timeout")).cte("lock_timeout").prefix_with("MATERIALIZED", dialect="postgresql")


def _spawnable(new: FromClause) -> Select[Any]:
    """Select the tasks whose queue exists and has no limits."""
    return select(new).where(exists().where(Queue.queue_name == new.c.queue_name, Queue.limited_at.is_(None)))


def limited_spawnable(new: FromClause) -> Select[Any]:
    """Select the tasks, rows of `LIMITED_SPAWN_COLUMNS`, whose queue exists, and whether that has limits."""
    return select(new, Queue.limited_at.is_not(None).label("limited")).join(Queue, Queue.queue_name == new.c.queue_name)


def arrivals(spawned: FromClause) -> CTE:
    """Append the arrivals of those tasks that have a limit key."""
    t = spawned.c
    return (
        insert(LimitArrivalRow)
        .from_select(
            ["queue_name", "limit_key", "available_at"],
            select(t.queue_name, t.limit_key, t.available_at).where(
                t.limit_key.is_not(None), t.available_at.is_not(None)
            ),
        )
        .cte("arrivals")
    )


def empty_limit_key() -> ColumnElement[Any]:
    """Return the key of a stored task that has none: the empty one if its queue has limits."""
    return (
        select(constant(""))
        .where(Queue.queue_name == TaskRow.queue_name, Queue.limited_at.is_not(None))
        .correlate(TaskRow)
        .scalar_subquery()
    )


def _spawn_many(source: Select[Any], *, new: bool = False) -> Executable:
    inserted = (
        insert_tasks(source.subquery("spawnable"), new=new)
        .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)
        .cte("spawned")
    )
    lane = inserted.c.queue_name, inserted.c.priority
    wanted = length("task_id", SPAWN_COLUMNS["task_id"])
    return select(
        *lane,
        func.min(inserted.c.available_at).label("available_at"),
        func.count().label("tasks"),
        case((func.count() < wanted, func.array_agg(inserted.c.task_id))).label("task_ids"),
    ).group_by(*lane)


_items = numbered_rows("items", "position", **ITEM_COLUMNS)
_kinds = numbered_rows("kinds", "number", **KIND_COLUMNS)
SPAWN = _spawn_many(
    _spawnable(
        select(_items.c.position, *(({**_items.c, **_kinds.c})[name] for name in SPAWN_COLUMNS))
        .join_from(_items, _kinds, _items.c.kind == _kinds.c.number)
        .subquery("spawn")
    ).join(optional_lock_timeout(), true())
)
"""Enqueue. Returns a row per lane: the number of its tasks, their ids and the earliest time.

A task whose queue does not exist or has limits, or whose key is taken, is missing from the rows. The ids are left out
(None) if all tasks are in one lane: the client takes as long to read a thousand ids as to encode them. With a
`lock_timeout`, the statement fails with 55P03 after it if an open transaction of another session has inserted one of
the keys.
"""

_ones = numbered_rows("ones", "position", **{name: SPAWN_COLUMNS[name] for name in SAME_KIND_COLUMNS})
_kind = one_row("kind", **KIND_COLUMNS)
SPAWN_SAME_KIND = _spawn_many(
    _spawnable(
        select(
            _ones.c.position,
            *({**_ones.c, **_kind.c}[name] for name in SPAWN_COLUMNS if name != "idempotency_key"),
            cast(null(), Text()).label("idempotency_key"),
        )
        .join_from(_ones, _kind, true())
        .subquery("spawn")
    ),
    new=True,
)
"""Enqueue new tasks of one kind without keys, as `SPAWN` does. Fails with 23505 if repeated after a lost reply.

In bulk it saves a quarter of the client's CPU time.
"""

_one = one_row("spawn", **SPAWN_COLUMNS)

SPAWN_ONE = insert_tasks(_spawnable(_one).subquery("spawnable")).returning(
    TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at
)
"""Enqueue one task, as `SPAWN` does without a lock timeout, and return its row."""


def hint_payload(spawned: FromClause) -> ColumnElement[Any]:
    """Return the payload of the hint for each new task, as :meth:`durable_sa.database.hint.Hint.decode` reads it."""
    t = spawned.c
    micros = func.extract("epoch", t.available_at) * constant(1_000_000)
    lane = func.json_build_array(t.queue_name, t.priority, cast(micros, BigInteger()))
    limits = cast(cast(t.cancel_at.is_not(None), Boolean()), Integer())
    return cast(func.json_build_array(func.json_build_array(lane), constant(0), constant(0), limits), Text())


_noted = (
    insert_tasks(_spawnable(_one).subquery("spawnable"))
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.cancel_at)
    .cte("spawned")
)
_channel, _carried = bindparam("channel", type_=Text()), bindparam("carried", type_=Text())
SPAWN_AND_NOTIFY = select(
    _noted.c.task_id,
    _noted.c.queue_name,
    _noted.c.priority,
    _noted.c.available_at,
    func.pg_notify(_channel, hint_payload(_noted)),
    case((_carried.is_not(None), func.pg_notify(_channel, _carried))),
)
"""Enqueue one task, as `SPAWN_ONE` does, and send its hint, and another if one is given, when that commits.

A worker starts the task a quarter sooner than after a hint of its own statement (median of 5 interleaved runs).
"""

_limited_spawned = (
    insert_tasks(
        limited_spawnable(numbered_rows("spawn", "position", **LIMITED_SPAWN_COLUMNS))
        .join(optional_lock_timeout(), true())
        .subquery("spawnable")
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key)
    .cte("spawned")
)
SPAWN_LIMITED = select(
    _limited_spawned.c.task_id,
    _limited_spawned.c.queue_name,
    _limited_spawned.c.priority,
    _limited_spawned.c.available_at,
).add_cte(arrivals(_limited_spawned))
"""Enqueue tasks into queues with limits, or with unique keys, as `SPAWN` does; returns a row per task.

The arrivals of the tasks are appended with them, so that workers look at their keys once both are committed.
"""

_wanted = rows("wanted", task_ids=Uuid(), queue_names=Text(), idempotency_keys=Text(), unique_keys=Text())

EXPLAIN_SPAWN = (
    select(
        _wanted.c.task_ids.label("wanted_id"),
        exists().where(Queue.queue_name == _wanted.c.queue_names).label("queue_exists"),
        exists().where(Queue.queue_name == _wanted.c.queue_names, Queue.limited_at.is_not(None)).label("queue_limited"),
        TaskRow.task_id,
        TaskRow.run_id,
        TaskRow.attempt,
        TaskRow.task_name,
        TaskRow.parent_task_id,
        as_text(TaskRow.params).label("params"),
        TaskRow.first_started_at,
    )
    .select_from(_wanted)
    .outerjoin(
        TaskRow,
        or_(
            TaskRow.task_id == _wanted.c.task_ids,
            (TaskRow.queue_name == _wanted.c.queue_names)
            & (TaskRow.idempotency_key == _wanted.c.idempotency_keys)
            & TaskRow.idempotency_key.is_not(None),
            (TaskRow.queue_name == _wanted.c.queue_names)
            & (TaskRow.unique_key == _wanted.c.unique_keys)
            & TaskRow.unique_key.is_not(None)
            & TaskRow.finished_at.is_(None),
        ),
    )
)
"""Find why tasks are missing from a spawn: no such queue, one with limits, an earlier key, or this very spawn, whose
reply was lost."""

WITHDRAW = delete(TaskRow).where(TaskRow.task_id == func.any(array("task_ids", Uuid())))
"""Delete tasks that this transaction has spawned."""

COUNT_READY = select(func.count()).where(
    TaskRow.finished_at.is_(None),
    TaskRow.queue_name == bindparam("queue_name", type_=Text()),
    TaskRow.available_at <= clock(),
    TaskRow.claimed_by.is_(None),
    or_(TaskRow.cancel_at.is_(None), TaskRow.cancel_at > clock()),
    ~exists().where(Queue.queue_name == TaskRow.queue_name, Queue.paused_at.is_not(None)),
)
"""Count the tasks of a queue that are due and that no worker has, whatever their limits."""

_new_time = func.least(
    func.coalesce(
        bindparam("new_time", type_=DateTime(timezone=True)),
        clock() + interval(func.coalesce(bindparam("delay", type_=Float(53)), 0.0)),
    ),
    TaskRow.created_at + interval(bindparam("longest_delay", type_=Float(53))),
)
_replaced = (
    update(TaskRow)
    .where(
        TaskRow.task_id == bindparam("target_id", type_=Uuid()),
        TaskRow.finished_at.is_(None),
        # A retry clears the time of the first start, and keeps the number of attempts.
        TaskRow.first_started_at.is_(None),
        TaskRow.attempt == constant(0),
        TaskRow.claimed_by.is_(None),
    )
    .values(
        params=as_json(bindparam("new_params", type_=Text())),
        available_at=_new_time,
        cancel_at=_new_time + clamped_limit(TaskRow.max_pending_time),
        limit_key=func.coalesce(bindparam("new_limit_key", type_=Text()), empty_limit_key()),
        weight=bindparam("new_weight", type_=SmallInteger()),
    )
    .returning(
        TaskRow.task_id,
        TaskRow.run_id,
        TaskRow.attempt,
        TaskRow.queue_name,
        TaskRow.priority,
        TaskRow.available_at,
        TaskRow.cancel_at,
        TaskRow.limit_key,
    )
    .cte("replaced")
)
REPLACE_UNSTARTED = select(_replaced).add_cte(arrivals(_replaced))
"""Give a task that has not started new params, another time and limit key. Returns no row if it has started."""
