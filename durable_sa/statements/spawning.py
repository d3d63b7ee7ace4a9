"""Enqueueing tasks, and reading back what an insert ran into."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
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
)
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.sql.selectable import FromClause, Select
from sqlalchemy.types import TypeEngine

from ..models import Queue, TaskRow
from .expressions import (
    array,
    as_json,
    as_jsonb,
    as_text,
    clock,
    constant,
    interval,
    length,
    lock_timeout,
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
    "idempotency_key": Text(),
}
"""What there is to say about a spawn."""

_OWN: Final = ("task_id", "run_id", "params", "idempotency_key")

ITEM_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    **{name: SPAWN_COLUMNS[name] for name in _OWN},
    "kind": Integer(),
}
"""What tasks that are spawned together have each for itself, and the number of its kind, from 1."""

KIND_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    name: type_ for name, type_ in SPAWN_COLUMNS.items() if name not in _OWN
}
"""What many of them have in common: few arrays as long as the batch are sent and unnested, not twenty."""

ALIKE_COLUMNS: Final = ("task_id", "run_id", "params")
"""What each has for itself of tasks that have all else in common, and no key."""


def insert_tasks(source: FromClause, *, new: bool = False) -> Insert:
    """New tasks from rows of `SPAWN_COLUMNS`; what is there already, by id or by idempotency key, is left alone.

    If they are said to be `new`, that there are such is an error, and an eighth of the work is saved. If the rows are
    numbered, by a column `position`, they become available in that order; a join forgets it. They are inserted in the
    order of their keys: two statements that insert the same ones wait for each other, but not both.
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
        "idempotency_key": t.idempotency_key,
    }
    selected = select(*values.values())
    if new:
        return insert(TaskRow).from_select(list(values), selected)
    if "position" in source.c:
        selected = selected.order_by(t.queue_name, t.idempotency_key)
    return insert(TaskRow).from_select(list(values), selected).on_conflict_do_nothing()


def _spawnable(new: FromClause) -> Select[Any]:
    return select(new).where(exists().where(Queue.queue_name == new.c.queue_name))


def _spawn(spawnable: Select[Any], *, new: bool = False) -> Insert:
    return insert_tasks(spawnable.subquery("spawnable"), new=new)


def _spawn_one(spawnable: Select[Any]) -> Executable:
    return _spawn(spawnable).returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)


def _spawn_many(spawnable: Select[Any], *, new: bool = False) -> Executable:
    inserted = _spawn(spawnable, new=new)
    spawned = inserted.returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at).cte(
        "spawned"
    )
    lane = spawned.c.queue_name, spawned.c.priority
    wanted = length("task_id", SPAWN_COLUMNS["task_id"])
    return select(
        *lane,
        func.min(spawned.c.available_at).label("available_at"),
        func.count().label("tasks"),
        case((func.count() < wanted, func.array_agg(spawned.c.task_id))).label("task_ids"),
    ).group_by(*lane)


_items = numbered_rows("items", "position", **ITEM_COLUMNS)
_kinds = numbered_rows("kinds", "number", **KIND_COLUMNS)
_many = _spawnable(
    select(_items.c.position, *(({**_items.c, **_kinds.c})[name] for name in SPAWN_COLUMNS))
    .join_from(_items, _kinds, _items.c.kind == _kinds.c.number)
    .subquery("spawn")
)
_ones = numbered_rows("ones", "position", **{name: SPAWN_COLUMNS[name] for name in ALIKE_COLUMNS})
_kind = one_row("kind", **KIND_COLUMNS)
_alike = _spawnable(
    select(
        _ones.c.position,
        *({**_ones.c, **_kind.c}[name] for name in SPAWN_COLUMNS if name != "idempotency_key"),
        cast(null(), Text()).label("idempotency_key"),
    )
    .join_from(_ones, _kind, true())
    .subquery("spawn")
)
_one = _spawnable(one_row("spawn", **SPAWN_COLUMNS))

SPAWN = _spawn_many(_many)
"""Enqueue. Gives the number and the ids of each lane's tasks and its earliest time.

A task whose queue does not exist, or whose key is taken, is missing from what comes back. Ids that say nothing, as all
tasks are there in one lane, are left out: reading a thousand takes the client as long as encoding them.
"""

SPAWN_ALIKE = _spawn_many(_alike, new=True)
"""As `SPAWN`, of new tasks of one kind without keys. 23505 where they are there: it is repeated after a lost reply."""

SPAWN_ONE = _spawn_one(_one)
"""As `SPAWN`, of a task alone, which gives its row."""


def hint_payload(spawned: FromClause) -> ColumnElement[Any]:
    """The hint for each new task, as :class:`durable_sa.hints.Hint` reads it."""
    t = spawned.c
    micros = func.extract("epoch", t.available_at) * constant(1_000_000)
    lane = func.json_build_array(t.queue_name, t.priority, cast(micros, BigInteger()))
    limits = cast(cast(t.cancel_at.is_not(None), Boolean()), Integer())
    return cast(func.json_build_array(func.json_build_array(lane), constant(0), constant(0), limits), Text())


_spawned = (
    insert_tasks(_one.subquery("spawnable"))
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.cancel_at)
    .cte("spawned")
)

_channel, _gathered = bindparam("channel", type_=Text()), bindparam("gathered", type_=Text())

SPAWN_AND_TELL = select(
    _spawned.c.task_id,
    _spawned.c.queue_name,
    _spawned.c.priority,
    _spawned.c.available_at,
    func.pg_notify(_channel, hint_payload(_spawned)),
    case((_gathered.is_not(None), func.pg_notify(_channel, _gathered))),
)
"""As `SPAWN_ONE`, with its hint, and that of earlier tasks if there is one, in the same transaction.

Workers hear of it sooner and no other statement is needed, but such commits wait in line.
"""

SPAWN_KEYED = _spawn_many(_many.join(lock_timeout(), true()))
"""As `SPAWN`, but 55P03 at once if one of the keys is in somebody's open transaction."""

SPAWN_ONE_KEYED = _spawn_one(_one.join(lock_timeout(), true()))
"""As `SPAWN_KEYED`, of a task alone."""

_wanted = rows("wanted", task_ids=Uuid(), queue_names=Text(), idempotency_keys=Text())

EXPLAIN_SPAWN = (
    select(
        _wanted.c.task_ids.label("wanted_id"),
        exists().where(Queue.queue_name == _wanted.c.queue_names).label("queue_exists"),
        TaskRow.task_id,
        TaskRow.run_id,
        TaskRow.attempt,
        TaskRow.task_name,
        TaskRow.parent_task_id,
        as_text(TaskRow.params).label("params"),
    )
    .select_from(_wanted)
    .outerjoin(
        TaskRow,
        or_(
            TaskRow.task_id == _wanted.c.task_ids,
            (TaskRow.queue_name == _wanted.c.queue_names)
            & (TaskRow.idempotency_key == _wanted.c.idempotency_keys)
            & TaskRow.idempotency_key.is_not(None),
        ),
    )
)
"""Why tasks are missing from a spawn: no such queue, the same key earlier, or this very spawn whose reply was lost."""

WITHDRAW = delete(TaskRow).where(TaskRow.task_id == func.any(array("task_ids", Uuid())))
"""Take back what this very transaction has spawned."""

COUNT_READY = select(func.count()).where(
    TaskRow.finished_at.is_(None),
    TaskRow.queue_name == bindparam("queue_name", type_=Text()),
    TaskRow.available_at <= clock(),
    TaskRow.claimed_by.is_(None),
    or_(TaskRow.cancel_at.is_(None), TaskRow.cancel_at > clock()),
    ~exists().where(Queue.queue_name == TaskRow.queue_name, Queue.paused_at.is_not(None)),
)
"""Tasks of a queue that a worker could claim at this moment."""
