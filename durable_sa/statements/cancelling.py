"""Cancels tasks with their descendants, and retries failed or cancelled ones.

The statements that cancel are the largest of all, and are built when they are first executed.
"""

from __future__ import annotations

import functools
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Integer,
    Text,
    Update,
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
    update,
)
from sqlalchemy.orm import aliased
from sqlalchemy.sql.selectable import CTE, FromClause

from ..models import Checkpoint, TaskRow, Wait
from .expressions import array, clamped_limit, clock, constant, next_fence, rows
from .fencing import ENDING, LIMIT_COLUMNS, give_back, materialized
from .follow_ups import ending
from .outcomes import delete_unlocked_waits, record_attempts
from .spawning import arrivals, empty_limit_key

# Not named `task_id`, because in an UPDATE SQLAlchemy takes a parameter named like a column for a value to set.
_task_id = bindparam("target_id", type_=Uuid())
_UNSUCCESSFUL = (constant("failed"), constant("cancelled"))


def _cancel(locked: CTE, cancelled_by: Any, *, skip_locked: bool = False) -> Executable:
    """Cancel the tasks in `locked`, with the error in its column `reason`, if there is that column.

    With `skip_locked`, waits that another transaction has locked are left in place: maintenance deletes them later.
    """

    def reason(of: FromClause) -> ColumnElement[Any]:
        return of.c.reason if "reason" in of.c else null()

    begun = (
        select(locked)
        .where(or_(locked.c.state == constant("running"), locked.c.state == constant("sleeping")))
        .subquery("begun")
    )
    ended = record_attempts(begun, constant("cancelled"), reason(begun))
    if skip_locked:
        waits = delete_unlocked_waits(locked)
    else:
        waits = delete(Wait).where(Wait.task_id == locked.c.task_id).cte("waits_gone")
    return ending(
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=constant("cancelled"),
            outcome=constant("cancelled"),
            finished_at=clock(),
            error=func.coalesce(reason(locked), TaskRow.error),
            cancelled_by=cancelled_by,
            fence=next_fence(TaskRow.fence),
            slot=null(),
        ),
        (
            TaskRow.task_id,
            TaskRow.parent_task_id,
            locked.c.state.label("was"),
            TaskRow.queue_name,
            TaskRow.task_name,
            locked.c.limit_key,
            locked.c.slot,
        ),
        ended,
        waits,
        after=lambda cancelled: (give_back(cancelled, returned=cancelled.c.slot.is_not(None)),),
    )


def _unfinished(*conditions: Any, skip_locked: bool) -> CTE:
    return materialized(
        "locked",
        select(*ENDING, *LIMIT_COLUMNS)
        .where(TaskRow.finished_at.is_(None), *conditions)
        .order_by(TaskRow.task_id)
        .with_for_update(skip_locked=skip_locked, key_share=True),
    )


@functools.cache
def cancel() -> Executable:
    """Cancel one task, waiting for the lock on its row. Returns no row if the task has ended."""
    return _cancel(_unfinished(TaskRow.task_id == _task_id, skip_locked=False), null())


_childs_parent = aliased(TaskRow, name="any_child").parent_task_id
_childless = ~exists().where(_childs_parent == TaskRow.task_id)


@functools.cache
def cancel_many() -> Executable:
    """Cancel those of many tasks that have no children; rows locked by other transactions are passed over."""
    unfinished = _unfinished(TaskRow.task_id == func.any(array("task_ids", Uuid())), _childless, skip_locked=True)
    return _cancel(unfinished, null(), skip_locked=True)


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
# UNION, not UNION ALL, which would never end if two tasks were made each other's parent by hand.
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
"""Unfinished descendants of failed or cancelled tasks, including those below a child that has completed.

A descendant that was retried by hand after its parent's end is left out, with all below it, as long as the parent's
fence is unchanged since.
"""

_targets = array("task_ids", Uuid())
_origin = bindparam("origin", type_=Uuid())


@functools.cache
def cancel_descendants() -> Executable:
    """Cancel a batch of descendants inside the caller's transaction, waiting for locks."""
    return _cancel(_unfinished(TaskRow.task_id == func.any(_targets), skip_locked=False), _origin)


@functools.cache
def cascade() -> Executable:
    """Cancel a batch of descendants in a transaction of its own; rows locked by other transactions are left for later.

    Nothing is cancelled if the origin was retried in the meantime: its descendants continue with it.
    """
    still_ended = materialized(
        "still_ended",
        select(TaskRow.task_id)
        .where(TaskRow.task_id == _origin, TaskRow.outcome.in_(_UNSUCCESSFUL))
        .with_for_update(skip_locked=True, key_share=True),
    )
    is_ended = exists(select(still_ended.c.task_id))
    return _cancel(
        _unfinished(TaskRow.task_id == func.any(_targets), is_ended, skip_locked=True), _origin, skip_locked=True
    )


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
"""Failed or cancelled tasks that still have unfinished descendants, because a crash interrupted the cascade."""


@functools.cache
def cancel_overdue() -> Executable:
    """Cancel a batch of tasks past their pending or running time limit."""
    error = func.json_build_object(
        constant("name"),
        constant("CancellationPolicy"),
        constant("message"),
        case(
            (TaskRow.first_started_at.is_(None), constant("max_pending_time was over before the first start")),
            else_=constant("max_running_time was over"),
        ),
    )
    overdue = materialized(
        "locked",
        select(
            *ENDING,
            *LIMIT_COLUMNS,
            TaskRow.parent_task_id,
            error.label("reason"),
        )
        .where(TaskRow.finished_at.is_(None), TaskRow.cancel_at.is_not(None), TaskRow.cancel_at <= clock())
        .order_by(TaskRow.task_id)
        .limit(bindparam("wanted", type_=Integer()))
        .with_for_update(skip_locked=True, key_share=True),
    )
    return _cancel(overdue, null(), skip_locked=True)


TASK_STATE = select(TaskRow.task_id, TaskRow.state).where(TaskRow.task_id == _task_id)
"""The state of a task."""

_reset: dict[str, Any] = {
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
    "slot": null(),
    "resumes_at": null(),
    # A task that ended before its queue had limits has no key.
    "limit_key": func.coalesce(TaskRow.limit_key, empty_limit_key()),
}


def _put_back(put_back: Update) -> Executable:
    row = put_back.returning(
        TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key
    ).cte("put_back")
    return select(row.c.task_id, row.c.queue_name, row.c.priority, row.c.available_at).add_cte(arrivals(row))


RETRY = _put_back(
    update(TaskRow)
    .where(TaskRow.task_id == _task_id, TaskRow.outcome.in_(_UNSUCCESSFUL))
    .values(
        **_reset,
        run_id=bindparam("next_run_id", type_=Uuid()),
        max_attempts=func.coalesce(bindparam("new_max_attempts", type_=Integer()), TaskRow.max_attempts),
    )
)
"""Make a failed or cancelled task pending, with counters and time limits reset; its checkpoints stay."""

_many = rows("many", task_ids=Uuid(), next_run_ids=Uuid())
_free = materialized(
    "free",
    select(TaskRow.task_id, _many.c.next_run_ids)
    .join(_many, TaskRow.task_id == _many.c.task_ids)
    .where(TaskRow.outcome.in_(_UNSUCCESSFUL), _childless, TaskRow.unique_key.is_(None))
    .order_by(TaskRow.task_id)
    .with_for_update(skip_locked=True, key_share=True, of=TaskRow),
)
RETRY_MANY = _put_back(
    update(TaskRow)
    .where(TaskRow.task_id == _free.c.task_id)
    .values(
        **_reset,
        run_id=_free.c.next_run_ids,
        max_attempts=func.coalesce(bindparam("new_max_attempts", type_=Integer()), TaskRow.max_attempts),
    )
)
"""`RETRY` for those of many tasks that have neither children nor a unique key, which another task may have by now.

Rows locked by other transactions are passed over.
"""

TASK_STATES = select(
    TaskRow.task_id,
    TaskRow.state,
    or_(
        exists().where(_childs_parent == TaskRow.task_id),
        TaskRow.unique_key.is_not(None) & TaskRow.outcome.in_(_UNSUCCESSFUL),
    ).label("alone"),
).where(TaskRow.task_id == func.any(array("task_ids", Uuid())))
"""The states of tasks, and whether they are changed one by one, as those with children are."""

_descendants_below = (
    select(TaskRow.task_id, TaskRow.outcome, TaskRow.cancelled_by)
    .where(TaskRow.parent_task_id == _task_id)
    .cte("fallen", recursive=True)
)
_descendants_below = _descendants_below.union(
    select(TaskRow.task_id, TaskRow.outcome, TaskRow.cancelled_by).join(
        _descendants_below, TaskRow.parent_task_id == _descendants_below.c.task_id
    )
)
CASCADE_CANCELLED = select(_descendants_below.c.task_id).where(
    _descendants_below.c.outcome == constant("cancelled"),
    _descendants_below.c.cancelled_by == func.any(array("origins", Uuid())),
)
"""Descendants that were cancelled by a cascade from these origins."""

LOCK_FOR_RETRY = (
    select(
        TaskRow.state, TaskRow.cancelled_by, TaskRow.run_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at
    )
    .where(TaskRow.task_id == _task_id)
    .with_for_update(key_share=True)
)
"""Lock a task before its retry, and read its state."""

_restored = rows("restored", task_ids=Uuid(), next_run_ids=Uuid())
RETRY_DESCENDANTS = _put_back(
    update(TaskRow)
    .where(TaskRow.task_id == _restored.c.task_ids, TaskRow.outcome == constant("cancelled"))
    .values(**_reset, run_id=_restored.c.next_run_ids)
)
"""Make descendants pending that the cascade had cancelled."""

_failing = aliased(TaskRow, name="failing")
FAILED_CHILDREN = (
    select(TaskRow.task_id)
    .join(Checkpoint, TaskRow.task_id == Checkpoint.child_task_id)
    .join(_failing, _failing.task_id == Checkpoint.task_id)
    .where(
        Checkpoint.task_id == func.any(_targets),
        Checkpoint.kind == constant("join"),
        Checkpoint.status.in_(_UNSUCCESSFUL),
        TaskRow.parent_task_id == Checkpoint.task_id,
        TaskRow.outcome.in_(_UNSUCCESSFUL),
        _failing.outcome == constant("failed"),
        func.strpos(cast(_failing.error, Text()), cast(TaskRow.task_id, Text())) > constant(0),
    )
    .distinct()
    .order_by(TaskRow.task_id)
)
"""Children that have made tasks fail: those that ended unsuccessfully, were joined, and are named in the task's error.

A child whose failure the task has handled is not named there, nor in the traceback of what the task raised.
"""

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
"""Delete the recorded joins of failed or cancelled children that were retried since: the parent joins them anew."""
