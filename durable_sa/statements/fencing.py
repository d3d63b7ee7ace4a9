"""The fence: every write of a run names the fence of its claim, and changes nothing if the task's fence is another.

Fenced statements lock their rows in the order of their ids. They pass over rows with another fence, and rows that
another transaction has locked; the writer tells the two apart with :data:`FENCE_STATUS` and repeats the latter.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ColumnElement, DateTime, Uuid, case, cast, false, null, or_, select, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import CTE, FromClause, SelectBase

from ..models import LimitArrivalRow, TaskRow
from .expressions import constant, rows

ENDING = (TaskRow.task_id, TaskRow.run_id, TaskRow.attempt, TaskRow.state, TaskRow.claimed_by, TaskRow.started_at)
"""Columns of a locked task from which the row of its run is made when the run ends."""


def materialized(name: str, query: SelectBase) -> CTE:
    """Name a query whose rows are computed once, and which the planner does not merge into the rest of a statement."""
    return query.cte(name).prefix_with("MATERIALIZED", dialect="postgresql")


LIMIT_COLUMNS = (TaskRow.limit_key, TaskRow.slot)
"""Columns of a locked task from which its slot is given back."""


# While a table has no statistics, the planner expects of a bare IS NULL one row in 200, and joins by a nested loop over
# all of it: 65 ms among 500 tasks. Of a CASE it expects every second row.
_without_slot = case((TaskRow.slot.is_(None), true()), else_=false())


def locked_rows(source: FromClause, *, limited: bool | None = None) -> CTE:
    """Lock the tasks of `source` (task_ids, fences) that still have those fences, in the order of their ids.

    A statement that ends runs is either `limited`, and gives back slots, or False: it passes over tasks that hold one.

    The other columns of `source` are passed on. Joining them later would take time quadratic in the batch, because the
    planner cannot estimate the number of locked rows and chooses nested loops.
    """
    return materialized(
        "locked",
        select(
            *ENDING,
            TaskRow.parent_task_id,
            TaskRow.queue_name,
            *(LIMIT_COLUMNS if limited else ()),
            *(column for column in source.c if column.key not in ("task_ids", "fences")),
        )
        .join(source, (TaskRow.task_id == source.c.task_ids) & (TaskRow.fence == source.c.fences))
        .where(*((_without_slot,) if limited is False else ()))
        .order_by(TaskRow.task_id)
        .with_for_update(skip_locked=True, key_share=True, of=TaskRow),
    )


def is_in(column: ColumnElement[Any], found: CTE) -> ColumnElement[bool]:
    """Test whether a column is among the task ids of `found`, by a hash table.

    `IS TRUE` keeps the planner from turning the `IN` into a join, for which it chooses nested loops if it expects few
    rows.
    """
    return column.in_(select(found.c.task_id)).is_(true())


_asked = rows("asked", task_ids=Uuid(), fences=BigInteger())
_free = materialized(
    "free",
    select(TaskRow.task_id)
    .join(_asked, TaskRow.task_id == _asked.c.task_ids)
    .with_for_update(skip_locked=True, key_share=True, of=TaskRow),
)
FENCE_STATUS = (
    select(TaskRow.task_id, TaskRow.fence, TaskRow.slot, _free.c.task_id.is_not(None).label("free"))
    .join(_asked, TaskRow.task_id == _asked.c.task_ids)
    .outerjoin(_free, _free.c.task_id == TaskRow.task_id)
)
"""The current fences of rows that a fenced statement passed over, their slots, and whether they are free to lock."""


def give_back(
    changed: FromClause,
    *,
    returned: ColumnElement[bool],
    available_at: ColumnElement[Any] | None = None,
    closed_until: ColumnElement[Any] | None = None,
) -> CTE:
    """Append the arrivals of tasks with a limit key: their slots if `returned`, and when they may be claimed anew."""
    c = changed.c
    when = null() if available_at is None else available_at
    slots = case((returned, constant(-1)), else_=constant(0))
    return (
        insert(LimitArrivalRow)
        .from_select(
            ["queue_name", "limit_key", "available_at", "slots", *(() if closed_until is None else ("closed_until",))],
            select(
                c.queue_name,
                c.limit_key,
                cast(when, DateTime(timezone=True)),
                slots,
                *(() if closed_until is None else (closed_until,)),
            ).where(
                c.limit_key.is_not(None), or_(returned, when.is_not(None)) if available_at is not None else returned
            ),
        )
        .cte("given_back")
    )
