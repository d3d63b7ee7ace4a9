"""Follow-ups: tasks that are spawned by the very statements that fail or cancel others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    DateTime,
    Executable,
    Float,
    Integer,
    Numeric,
    SmallInteger,
    Text,
    Update,
    Uuid,
    and_,
    case,
    cast,
    column,
    false,
    func,
    null,
    select,
    true,
)
from sqlalchemy.sql.selectable import CTE
from sqlalchemy.types import TypeEngine

from ..models import Queue, TaskRow
from ..names import MAX_NAME_BYTES
from ..validation import MAX_DURATION
from .expressions import as_text, constant
from .fencing import materialized
from .spawning import LIMITED_SPAWN_COLUMNS, SPAWN_COLUMNS, arrivals, insert_tasks, limited_spawnable

DERIVED = (
    "task_id",
    "run_id",
    "params",
    "headers",
    "available_at",
    "delay_seconds",
    "parent_task_id",
    "idempotency_key",
)
"""The columns of a follow-up that are made when the task ends."""

STORED_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    **{name: type_ for name, type_ in SPAWN_COLUMNS.items() if name not in DERIVED},
    "follow_ups": JSON(),
    "max_payload_bytes": BigInteger(),
    "limit_key": Text(),
}
"""The fields of a follow-up that are stored with the task that it follows."""

_LIMITS = {
    name: int(MAX_DURATION) if isinstance(type_, Float) else 2**15 - 1 if isinstance(type_, SmallInteger) else 2**31 - 1
    for name, type_ in STORED_COLUMNS.items()
    if isinstance(type_, Integer | Float)
}
"""The numbers, with the largest that is taken of each. The `max_payload_bytes` are 1 GiB at most."""


def ending(
    update: Update,
    returned: Sequence[ColumnElement[Any] | Any],
    *ctes: CTE,
    after: Callable[[CTE], tuple[CTE, ...]] | None = None,
) -> Executable:
    """Complete a statement that ends tasks, or may end them, with the spawns of their follow-ups.

    `after` returns further parts of the statement that depend on the changed rows.

    It returns these columns of each task, and the columns follow_up_queue, follow_up_priority and follow_up_at of its
    follow-up, which are null if it has none.
    """
    has_any = TaskRow.follow_ups.is_not(None)
    changed = update.returning(
        *returned,
        TaskRow.task_id.label("ended_id"),
        TaskRow.task_name.label("ended_name"),
        TaskRow.queue_name.label("ended_queue"),
        TaskRow.outcome.label("ended_outcome"),
        TaskRow.fence.label("ended_fence"),
        case((has_any, TaskRow.params)).label("ended_params"),
        case((has_any, TaskRow.error)).label("ended_error"),
        TaskRow.follow_ups.label("stored"),
    ).cte("changed")
    following = _following(changed)
    spawned = (
        insert_tasks(limited_spawnable(following).subquery("follow_up"))
        .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key)
        .cte("followed")
    )
    names = [getattr(each, "key", None) or each.name for each in returned]
    return (
        select(
            *(changed.c[name] for name in names),
            spawned.c.queue_name.label("follow_up_queue"),
            spawned.c.priority.label("follow_up_priority"),
            spawned.c.available_at.label("follow_up_at"),
        )
        .select_from(changed)
        .outerjoin(following, following.c.ended_id == changed.c.ended_id)
        .outerjoin(spawned, spawned.c.task_id == following.c.task_id)
        .add_cte(*ctes, *(() if after is None else after(changed)), arrivals(spawned))
    )


def _following(changed: CTE) -> CTE:
    """Select the follow-ups of ended tasks as rows of `LIMITED_SPAWN_COLUMNS`, with the `ended_id`."""
    c = changed.c
    stored = c.stored.op("->", return_type=JSON())(c.ended_outcome)
    f = (
        func.json_to_record(case((_is_readable(stored), stored)))
        .table_valued(
            *(column(name, Numeric() if name in _LIMITS else type_) for name, type_ in STORED_COLUMNS.items())
        )
        .render_derived(name="stored", with_types=True)
    )
    error = case((func.json_typeof(c.ended_error) == constant("object"), _error(c.ended_error)))
    size = func.coalesce(func.octet_length(as_text(c.ended_params)), constant(0)) + func.coalesce(
        func.octet_length(as_text(error)), constant(0)
    )
    truncated = size > f.c.max_payload_bytes
    params = func.json_build_object(
        *_pairs(
            task_id=c.ended_id,
            task_name=c.ended_name,
            queue_name=c.ended_queue,
            params=case((truncated, null()), else_=c.ended_params),
            status=c.ended_outcome,
            error=error,
            truncated=func.coalesce(truncated, false()),
        )
    )
    named = select(Queue.queue_name).where(Queue.queue_name == f.c.queue_name).scalar_subquery()
    values: dict[str, ColumnElement[Any]] = {
        "task_id": _derived(c, "task"),
        "run_id": _derived(c, "run"),
        "queue_name": func.coalesce(named, c.ended_queue),
        "params": as_text(params),
        "headers": cast(null(), Text()),
        "available_at": cast(null(), DateTime(timezone=True)),
        "delay_seconds": cast(null(), Float(53)),
        "parent_task_id": cast(null(), Uuid()),
        "follow_ups": as_text(f.c.follow_ups),
        "idempotency_key": cast(null(), Text()),
        "limit_key": case((func.octet_length(f.c.limit_key) <= constant(MAX_NAME_BYTES), f.c.limit_key)),
        "weight": cast(null(), SmallInteger()),
        "unique_key": cast(null(), Text()),
    }
    values |= {name: _clamped(name, f.c[name]) for name in LIMITED_SPAWN_COLUMNS if name not in values}
    return materialized(
        "following",
        select(
            c.ended_id,
            *(values[name].label(name) for name in LIMITED_SPAWN_COLUMNS),
        )
        .select_from(changed.join(f, true()))
        .where(c.stored.is_not(None), f.c.task_name.is_not(None)),
    )


def _is_readable(stored: ColumnElement[Any]) -> ColumnElement[bool]:
    """Test that what is stored of a follow-up has the types that it was written with.

    A statement that fails by what someone has changed by hand would fail for all tasks that it ends.
    """
    kinds = [func.json_typeof(stored.op("->", return_type=JSON())(constant(name))) for name in _LIMITS]
    numbers = [func.coalesce(kind, constant("null")).in_((constant("number"), constant("null"))) for kind in kinds]
    return case((func.json_typeof(stored) == constant("object"), and_(*numbers)), else_=false())


def _clamped(name: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
    if (limit := _LIMITS.get(name)) is None:
        return value
    clamped = cast(func.least(func.greatest(value, constant(-limit)), constant(limit)), STORED_COLUMNS[name])
    return case((value.is_not(None), clamped))  # least and greatest pass over nulls


def _error(stored: ColumnElement[Any]) -> ColumnElement[Any]:
    """Select what a `TaskErrorInfo` has, which excludes the traceback."""
    return func.json_build_object(
        *_pairs(**{name: stored.op("->", return_type=JSON())(constant(name)) for name in _ERROR_FIELDS})
    )


_ERROR_FIELDS = ("name", "message", "raw", "step")


def _pairs(**fields: Any) -> list[Any]:
    return [part for name, value in fields.items() for part in (constant(name), value)]


def _derived(ended: Any, what: str) -> ColumnElement[Any]:
    """Derive an id from the ended task and its fence: a UUIDv7 of that task's time."""
    identity = func.concat(cast(ended.ended_id, Text()), constant(":"), ended.ended_fence, constant(f":{what}"))
    digest = func.encode(func.sha256(func.convert_to(identity, constant("UTF8"))), constant("hex"))
    time = func.left(func.replace(cast(ended.ended_id, Text()), constant("-"), constant("")), constant(12))
    return cast(
        func.concat(
            time,
            constant("7"),
            func.substr(digest, constant(1), constant(3)),
            constant("8"),
            func.substr(digest, constant(4), constant(15)),
        ),
        Uuid(),
    )
