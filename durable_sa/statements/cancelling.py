"""Cancelling tasks with their descendants, and putting ended ones back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Uuid,
    bindparam,
    case,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.orm import aliased
from sqlalchemy.sql.selectable import CTE, FromClause

from ..models import Checkpoint, TaskRow, Wait
from .expressions import array, clamped_limit, clock, constant, next_fence, rows
from .outcomes import delete_unlocked_waits, record_attempts

# An UPDATE takes parameters that are named as columns for values to set.
_task_id = bindparam("target_id", type_=Uuid())
_UNSUCCESSFUL = (constant("failed"), constant("cancelled"))


def _cancel(locked: CTE, cancelled_by: Any, *, patient: bool = True) -> Any:
    """Cancel what is locked, with the error that it has as a column `reason`, if it has one.

    If not `patient`, it waits for nobody: not for one who holds a wait of it locked either.
    """

    def reason(of: FromClause) -> ColumnElement[Any]:
        return of.c.reason if "reason" in of.c else null()

    begun = (
        select(locked)
        .where(or_(locked.c.state == constant("running"), locked.c.state == constant("sleeping")))
        .subquery("begun")
    )
    ended = record_attempts(begun, constant("cancelled"), reason(begun))
    if patient:
        waits = delete(Wait).where(Wait.task_id == locked.c.task_id).cte("waits_gone")
    else:
        waits = delete_unlocked_waits(locked)
    return (
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=constant("cancelled"),
            outcome=constant("cancelled"),
            finished_at=clock(),
            error=func.coalesce(reason(locked), TaskRow.error),
            cancelled_by=cancelled_by,
            fence=next_fence(TaskRow.fence),
        )
        .returning(TaskRow.task_id, TaskRow.parent_task_id, locked.c.state.label("was"))
        .add_cte(ended, waits)
    )


def _unfinished(*conditions: Any, skip_locked: bool, limit: Any = None) -> CTE:
    statement = (
        select(TaskRow.task_id, TaskRow.run_id, TaskRow.attempt, TaskRow.state, TaskRow.claimed_by, TaskRow.started_at)
        .where(TaskRow.finished_at.is_(None), *conditions)
        .order_by(TaskRow.task_id)
        .with_for_update(skip_locked=skip_locked, key_share=True)
    )
    if limit is not None:
        statement = statement.limit(limit)
    return statement.cte("locked").prefix_with("MATERIALIZED", dialect="postgresql")


CANCEL = _cancel(_unfinished(TaskRow.task_id == _task_id, skip_locked=False), null())
"""Cancel one task, waiting for whoever holds its row. Nothing comes back for a task that has ended."""

_parent = aliased(TaskRow, name="parent")
_descendant = (
    select(TaskRow.task_id, TaskRow.finished_at, TaskRow.fence)
    .join(_parent, TaskRow.parent_task_id == _parent.task_id)
    .where(
        _parent.task_id == func.any(array("ancestor_ids", Uuid())),
        _parent.outcome.in_(_UNSUCCESSFUL),
        TaskRow.parent_fence.is_distinct_from(_parent.fence),
    )
    .cte("descendant", recursive=True)
)
# Not ALL: where somebody has made parents of each other by hand, there would be no end to it.
_descendant = _descendant.union(
    select(TaskRow.task_id, TaskRow.finished_at, TaskRow.fence).join(
        _descendant,
        (TaskRow.parent_task_id == _descendant.c.task_id) & TaskRow.parent_fence.is_distinct_from(_descendant.c.fence),
    )
)

DESCENDANTS = (
    select(_descendant.c.task_id)
    .where(_descendant.c.finished_at.is_(None))
    .limit(bindparam("wanted", type_=Integer()))
    .offset(bindparam("passed", type_=Integer()))
)
"""Unfinished descendants of what has failed or was cancelled, also those below a child that has completed.

Not those below one that was put back by hand after its parent's end, as long as that parent stays as it was then.
"""

_targets = array("task_ids", Uuid())
_origin = bindparam("origin", type_=Uuid())
_still_ended = (
    select(TaskRow.task_id)
    .where(TaskRow.task_id == _origin, TaskRow.outcome.in_(_UNSUCCESSFUL))
    .with_for_update(skip_locked=True, key_share=True)
    .cte("still_ended")
    .prefix_with("MATERIALIZED", dialect="postgresql")
)
CANCEL_DESCENDANTS = _cancel(_unfinished(TaskRow.task_id == func.any(_targets), skip_locked=False), _origin)
"""A step of the cascade inside the caller's transaction."""

CASCADE = _cancel(
    _unfinished(TaskRow.task_id == func.any(_targets), exists(select(_still_ended.c.task_id)), skip_locked=True),
    _origin,
    patient=False,
)
"""A step of the cascade on its own; rows locked by somebody are left for the next step.

Nothing is cancelled for a task that was put back in the meantime: its descendants go on with it.
"""

_line = (
    select(
        TaskRow.task_id.label("task_id"),
        TaskRow.parent_task_id.label("ancestor_id"),
        TaskRow.parent_fence.label("ancestor_fence"),
    )
    .where(TaskRow.finished_at.is_(None), TaskRow.parent_task_id.is_not(None))
    .cte("line", recursive=True)
)
_ancestor = aliased(TaskRow, name="ancestor")


def _next_in(line: CTE) -> ColumnElement[bool]:
    return (_ancestor.task_id == line.c.ancestor_id) & _ancestor.fence.is_distinct_from(line.c.ancestor_fence)


_line = _line.union(
    select(_line.c.task_id, _ancestor.parent_task_id, _ancestor.parent_fence).where(
        _next_in(_line),
        _ancestor.outcome == constant("completed"),
        _ancestor.parent_task_id.is_not(None),
    )
)

INCOMPLETE_CASCADES = (
    select(_line.c.ancestor_id.label("task_id"))
    .join(_ancestor, _next_in(_line))
    .where(_ancestor.outcome.in_(_UNSUCCESSFUL))
    .distinct()
    .limit(bindparam("wanted", type_=Integer()))
)
"""Ended tasks whose cascade a crash has left incomplete."""

_limit_error = func.json_build_object(
    constant("name"),
    constant("CancellationPolicy"),
    constant("message"),
    case(
        (TaskRow.first_started_at.is_(None), constant("max_pending_time was over before the first start")),
        else_=constant("max_running_time was over"),
    ),
)
_overdue = (
    select(
        TaskRow.task_id,
        TaskRow.run_id,
        TaskRow.attempt,
        TaskRow.state,
        TaskRow.claimed_by,
        TaskRow.started_at,
        TaskRow.parent_task_id,
        _limit_error.label("reason"),
    )
    .where(TaskRow.finished_at.is_(None), TaskRow.cancel_at.is_not(None), TaskRow.cancel_at <= clock())
    .order_by(TaskRow.task_id)
    .limit(bindparam("wanted", type_=Integer()))
    .with_for_update(skip_locked=True, key_share=True)
    .cte("locked")
    .prefix_with("MATERIALIZED", dialect="postgresql")
)

CANCEL_OVERDUE = _cancel(_overdue, null(), patient=False)
"""Cancel a batch of tasks whose pending or running time is over."""

TASK_STATE = select(TaskRow.task_id, TaskRow.state).where(TaskRow.task_id == _task_id)
"""Where a task stands."""

_fresh: dict[str, Any] = {
    "state": constant("pending"),
    "outcome": null(),
    "finished_at": null(),
    "first_started_at": null(),
    "started_at": null(),
    "error": null(),
    "output": null(),
    "failures": 0,
    "lease_losses": 0,
    "cancelled_by": null(),
    "parent_fence": select(_parent.fence).where(_parent.task_id == TaskRow.parent_task_id).scalar_subquery(),
    "claimed_by": null(),
    "available_at": clock(),
    "cancel_at": clock() + clamped_limit(TaskRow.max_pending_time),
    "fence": next_fence(TaskRow.fence),
}

RETRY = (
    update(TaskRow)
    .where(TaskRow.task_id == _task_id, TaskRow.outcome.in_(_UNSUCCESSFUL))
    .values(
        **_fresh,
        run_id=bindparam("next_run_id", type_=Uuid()),
        max_attempts=func.coalesce(bindparam("new_max_attempts", type_=Integer()), TaskRow.max_attempts),
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)
)
"""Put an ended task back with fresh counts and clocks; its checkpoints stay."""

_fallen = (
    select(TaskRow.task_id, TaskRow.outcome, TaskRow.cancelled_by)
    .where(TaskRow.parent_task_id == _task_id)
    .cte("fallen", recursive=True)
)
_fallen = _fallen.union(
    select(TaskRow.task_id, TaskRow.outcome, TaskRow.cancelled_by).join(
        _fallen, TaskRow.parent_task_id == _fallen.c.task_id
    )
)
CASCADE_CANCELLED = select(_fallen.c.task_id).where(
    _fallen.c.outcome == constant("cancelled"), _fallen.c.cancelled_by == func.any(array("origins", Uuid()))
)
"""Descendants that a cascade from these origins cancelled."""

LOCK_FOR_RETRY = (
    select(
        TaskRow.state, TaskRow.cancelled_by, TaskRow.run_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at
    )
    .where(TaskRow.task_id == _task_id)
    .with_for_update(key_share=True)
)
"""An ended task before it is put back, under its lock."""

_restored = rows("restored", task_ids=Uuid(), next_run_ids=Uuid())
RETRY_DESCENDANTS = (
    update(TaskRow)
    .where(TaskRow.task_id == _restored.c.task_ids, TaskRow.outcome == constant("cancelled"))
    .values(**_fresh, run_id=_restored.c.next_run_ids)
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)
)
"""Put back what the cascade had cancelled."""

_family = array("task_ids", Uuid())
DELETE_FAILED_JOINS = delete(Checkpoint).where(
    Checkpoint.task_id == func.any(_family),
    Checkpoint.kind == constant("join"),
    Checkpoint.status.in_(_UNSUCCESSFUL),
    exists().where(
        TaskRow.parent_task_id == Checkpoint.task_id,
        TaskRow.task_id == Checkpoint.child_task_id,
        or_(TaskRow.finished_at.is_(None), TaskRow.outcome == constant("completed")),
    ),
)
"""Joins that ended badly for children that run again, or did and came to a good end: they are to be awaited anew."""
