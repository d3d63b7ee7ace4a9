"""The fence: every write of a run names the fence of its claim, and changes nothing if the task's fence is another.

Fenced statements lock their rows in the order of their ids. They pass over rows with another fence, and rows that
another transaction has locked; the writer tells the two apart with :data:`FENCE_STATUS` and repeats the latter.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Uuid, select, true
from sqlalchemy.sql.selectable import CTE, FromClause, SelectBase

from ..models import TaskRow
from .expressions import rows

ENDING = (TaskRow.task_id, TaskRow.run_id, TaskRow.attempt, TaskRow.state, TaskRow.claimed_by, TaskRow.started_at)
"""Columns of a locked task from which the row of its run is made when the run ends."""


def materialized(name: str, query: SelectBase) -> CTE:
    """Name a query whose rows are computed once, and which the planner does not merge into the rest of a statement."""
    return query.cte(name).prefix_with("MATERIALIZED", dialect="postgresql")


def locked_rows(source: FromClause) -> CTE:
    """Lock the tasks of `source` (task_ids, fences) that still have those fences, in the order of their ids.

    The other columns of `source` are passed on. Joining them later would take time quadratic in the batch, because the
    planner cannot estimate the number of locked rows and chooses nested loops.
    """
    return materialized(
        "locked",
        select(
            *ENDING,
            TaskRow.parent_task_id,
            TaskRow.queue_name,
            *(column for column in source.c if column.key not in ("task_ids", "fences")),
        )
        .join(source, (TaskRow.task_id == source.c.task_ids) & (TaskRow.fence == source.c.fences))
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
    select(TaskRow.task_id, TaskRow.fence, _free.c.task_id.is_not(None).label("free"))
    .join(_asked, TaskRow.task_id == _asked.c.task_ids)
    .outerjoin(_free, _free.c.task_id == TaskRow.task_id)
)
"""The current fences of rows that a fenced statement passed over, and whether they are free to lock."""
