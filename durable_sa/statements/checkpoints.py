"""Checkpoints: written under the fence, for many runs at once, together with the child or event they record."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    Executable,
    Float,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    false,
    func,
    literal_column,
    null,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import CTE, FromClause
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, Event, TaskRow, Wait
from .expressions import (
    as_json,
    as_jsonb,
    as_text,
    clock,
    constant,
    count_or_ids,
    length,
    lock_timeout,
    numbered_rows,
    one_row,
    rows,
)
from .fencing import is_in, locked_rows, materialized
from .spawning import LIMITED_SPAWN_COLUMNS, arrivals, insert_tasks, limited_spawnable

CHECKPOINT_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "keys": Uuid(),
    "kinds": Text(),
    "names": Text(),
    "statuses": Text(),
    "values": Text(),
    "child_ids": Uuid(),
    "durations": Float(53),
    "arguments": Text(),
}
"""The arrays of a checkpoint write: one element per checkpoint."""


def _insert_checkpoints(source: FromClause, locked: CTE) -> CTE:
    c = source.c
    return (
        insert(Checkpoint)
        .from_select(
            [
                "task_id",
                "key",
                "kind",
                "name",
                "status",
                "value",
                "child_task_id",
                "created_at",
                "duration",
                "arguments",
            ],
            select(
                c.task_ids,
                c["keys"],
                c.kinds,
                c.names,
                c.statuses,
                as_json(c["values"]),
                c.child_ids,
                clock(),
                c.durations,
                c.arguments,
            ).where(is_in(c.task_ids, locked)),
        )
        .on_conflict_do_nothing()
        .returning(Checkpoint.task_id, Checkpoint.key)
        .cte("written")
    )


def _fences(source: FromClause) -> FromClause:
    return select(source.c.task_ids, source.c.fences).distinct().subquery("fenced")


def _record(new: FromClause, wanted: ColumnElement[int]) -> Executable:
    return count_or_ids(_insert_checkpoints(new, locked_rows(_fences(new))), wanted, columns=("task_id", "key"))


RECORD = _record(rows("entry", **CHECKPOINT_COLUMNS), length("task_ids", Uuid()))
"""Write checkpoints. An existing one is kept; one of a run whose fence is outdated is not written."""

RECORD_ONE = _record(one_row("entry", **CHECKPOINT_COLUMNS), constant(1))
"""`RECORD` for a single checkpoint."""

_lock_timeout = lock_timeout()
_child = numbered_rows("child", "position", **LIMITED_SPAWN_COLUMNS)
_new = rows("entry", **CHECKPOINT_COLUMNS)
_locked = locked_rows(_fences(_new))
_children = (
    insert_tasks(
        limited_spawnable(_child)
        .join(_lock_timeout, true())
        .where(is_in(_child.c.parent_task_id, _locked))
        .subquery("spawnable")
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key)
    .cte("children")
)
_with_child = select(_new).where(is_in(_new.c.child_ids, _children)).subquery("with_child")
_written = _insert_checkpoints(_with_child, _locked)

RECORD_CHILDREN = select(
    _children.c.task_id.label("child_task_id"), _children.c.queue_name, _children.c.priority, _children.c.available_at
).add_cte(_written, arrivals(_children))
"""Insert children and the checkpoints that name them; neither if the key is taken or the queue does not exist."""

_event = numbered_rows("event", "position", **CHECKPOINT_COLUMNS, event_names=Text(), payloads=Text(), metadata=Text())
_locked = locked_rows(_fences(_event))
_queue_name = select(TaskRow.queue_name).where(TaskRow.task_id == _event.c.task_ids).scalar_subquery()
_ranked = materialized(
    "ranked",
    select(
        _event,
        _queue_name.label("queue_name"),
        func.row_number()
        .over(partition_by=(_queue_name, _event.c.event_names), order_by=_event.c.position)
        .label("rank"),
    ).where(is_in(_event.c.task_ids, _locked)),
)
_first = _ranked.c.rank == constant(1)
_emitted = (
    insert(Event)
    .from_select(
        ["queue_name", "name", "payload", "metadata", "emitted_at"],
        select(
            _ranked.c.queue_name,
            _ranked.c.event_names,
            as_json(_ranked.c.payloads),
            as_jsonb(_ranked.c.metadata),
            clock(),
        )
        .join(_lock_timeout, true())
        .where(_first)
        .order_by(_ranked.c.queue_name, _ranked.c.event_names),
    )
    .on_conflict_do_nothing()
    .returning(Event.queue_name, Event.name)
    .cte("emitted")
)
_won = (
    select(
        *(_ranked.c[name] for name in CHECKPOINT_COLUMNS if name != "values"),
        case((_first & _emitted.c.name.is_not(None), constant("true")), else_=constant("false")).label("values"),
    )
    .outerjoin_from(
        _ranked,
        _emitted,
        (_emitted.c.queue_name == _ranked.c.queue_name) & (_emitted.c.name == _ranked.c.event_names),
    )
    .cte("won")
)
_written = _insert_checkpoints(_won, _locked)

RECORD_EVENTS = select(_written.c.task_id, _written.c.key, _won.c["values"].label("value")).join(
    _won, (_won.c.task_ids == _written.c.task_id) & (_won.c["keys"] == _written.c.key)
)
"""Emit events, with checkpoints that record whether each was the first of its name, also within this statement."""

_wanted = rows("wanted", task_ids=Uuid(), keys=Uuid())
READ_CHECKPOINTS = select(
    Checkpoint.task_id,
    Checkpoint.key,
    Checkpoint.status,
    Checkpoint.child_task_id,
    as_text(Checkpoint.value).label("value"),
).join(_wanted, (Checkpoint.task_id == _wanted.c.task_ids) & (Checkpoint.key == _wanted.c["keys"]))
"""Read checkpoints: those that a write found already stored, or too large to be read with the journal."""

LOCK_UNDER_FENCE = (
    select(TaskRow.task_id)
    .where(
        TaskRow.task_id == bindparam("task_id", type_=Uuid()),
        TaskRow.fence == bindparam("fence", type_=BigInteger()),
    )
    .with_for_update(key_share=True)
)
"""Lock a task under a run's fence until the transaction ends; later statements see what was committed before."""

_cancelled = TaskRow.__table__.alias("cancelled_task")
# The row that a transaction sees is its own as long as its writer is in progress, also one of its savepoints.
_writer: ColumnElement[Any] = literal_column(
    "(((pg_current_xact_id()::text::bigint >> 32) << 32) + cancelled_task.xmin::text::bigint)::text::xid8"
)
CANCELLED_IN_TRANSACTION = select(_cancelled.c.task_id).where(
    _cancelled.c.task_id == bindparam("task_id", type_=Uuid()),
    _cancelled.c.fence == bindparam("fence", type_=BigInteger()) + constant(1),
    case(
        (_cancelled.c.state == constant("cancelled"), func.pg_xact_status(_writer) == constant("in progress")),
        else_=false(),
    ),
)
"""Look, where a task is not found under a run's fence, if it is because this transaction has cancelled it."""

RECORD_IN_TRANSACTION = (
    insert(Checkpoint)
    .values(
        task_id=bindparam("task_id", type_=Uuid()),
        key=bindparam("key", type_=Uuid()),
        kind="transaction",
        name=bindparam("name", type_=Text()),
        value=as_json(bindparam("value", type_=Text())),
        created_at=clock(),
        duration=bindparam("duration", type_=Float(53)),
        arguments=bindparam("arguments", type_=Text()),
    )
    .on_conflict_do_nothing()
    .returning(Checkpoint.key)
)
"""Write the checkpoint of a transaction step, as the last write of that transaction."""

INLINE_BYTES = 4 * 1024 * 1024
"""Stored bytes up to which a journal is read with its values; the values beyond are read one by one, on demand."""

_resumed = rows("resumed", task_ids=Uuid())
_page = (
    select(
        Checkpoint.task_id,
        Checkpoint.key,
        Checkpoint.kind,
        Checkpoint.name,
        Checkpoint.status,
        Checkpoint.child_task_id,
        Checkpoint.value,
        func.sum(func.coalesce(func.pg_column_size(Checkpoint.value), 0))
        .over(order_by=(Checkpoint.created_at, Checkpoint.key), rows=(None, 0))
        .label("size_so_far"),
    )
    .where(Checkpoint.task_id == _resumed.c.task_ids)
    .correlate(_resumed)
    .lateral("page")
)
_stored_wait = (
    select(Wait.task_id, Wait.key, Wait.kind, Wait.due_at)
    .where(Wait.task_id == _resumed.c.task_ids)
    .offset(constant(0))
    .correlate(_resumed)
    .lateral("stored_wait")
)
LOAD_JOURNALS = union_all(
    select(
        _page.c.task_id,
        _page.c.key,
        _page.c.kind,
        _page.c.name,
        _page.c.status,
        case((_page.c.size_so_far <= INLINE_BYTES, as_text(_page.c.value)), else_=null()).label("value"),
        _page.c.child_task_id,
        (_page.c.size_so_far > INLINE_BYTES).label("left_behind"),
        cast(null(), DateTime(timezone=True)).label("due_at"),
    ).select_from(_resumed.join(_page, true())),
    select(
        _stored_wait.c.task_id,
        _stored_wait.c.key,
        _stored_wait.c.kind,
        null(),
        null(),
        null(),
        null(),
        null(),
        _stored_wait.c.due_at,
    ).select_from(_resumed.join(_stored_wait, true())),
)
"""Read the journals of resumed runs: every key, with values up to `INLINE_BYTES` in total per task; and their waits.

The column `left_behind` is null for a wait. One snapshot shows it or the record of its outcome, never both or neither.
The deadlines of waits are those set when they were stored. Lateral joins read task by task (`OFFSET 0` keeps them so),
because without statistics the planner reads the whole table for many ids at once.
"""
