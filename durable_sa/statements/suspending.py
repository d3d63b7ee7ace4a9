"""Suspends runs: stores their sleeps, and their waits for events, children and messages."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    Executable,
    Float,
    Text,
    Uuid,
    case,
    delete,
    exists,
    func,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import CTE
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, TaskRow, Wait
from .expressions import clock, constant, interval, rows, statement_time
from .fencing import give_back, is_in, locked_rows, materialized

SUSPEND_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "wait_task_ids": Uuid(),
    "keys": Uuid(),
    "kinds": Text(),
    "names": Text(),
    "event_names": Text(),
    "child_ids": Uuid(),
    "due_times": DateTime(timezone=True),
    "delays": Float(53),
}
"""The arrays of stored waits. The deadline is an absolute time, or seconds from now, or null."""

_waits = rows("wait", **SUSPEND_COLUMNS)


def _due(locked: CTE) -> CTE:
    due_at = func.coalesce(_waits.c.due_times, statement_time() + interval(_waits.c.delays))
    queue_name = select(TaskRow.queue_name).where(TaskRow.task_id == _waits.c.wait_task_ids).scalar_subquery()
    return materialized(
        "due",
        select(_waits, due_at.label("due_at"), queue_name.label("queue_name")).where(
            is_in(_waits.c.wait_task_ids, locked)
        ),
    )


def _stored(due: CTE) -> tuple[CTE, CTE]:
    """Store the wake times of sleeps as checkpoints, and waits for events, children and messages as waits."""
    sleeps = (
        insert(Checkpoint)
        .from_select(
            ["task_id", "key", "kind", "name", "value", "created_at"],
            select(
                due.c.wait_task_ids, due.c["keys"], due.c.kinds, due.c.names, func.to_json(due.c.due_at), clock()
            ).where(due.c.kinds == constant("sleep")),
        )
        .on_conflict_do_nothing()
        .cte("sleeps")
    )
    waits = (
        insert(Wait)
        .from_select(
            ["task_id", "key", "kind", "name", "queue_name", "event_name", "child_task_id", "due_at", "created_at"],
            select(
                due.c.wait_task_ids,
                due.c["keys"],
                due.c.kinds,
                due.c.names,
                due.c.queue_name,
                due.c.event_names,
                due.c.child_ids,
                due.c.due_at,
                clock(),
            ).where(due.c.kinds != constant("sleep")),
        )
        .on_conflict_do_nothing()
        .cte("waits_stored")
    )
    return sleeps, waits


def _suspend(*, limited: bool) -> Executable:
    suspended = rows(
        "run",
        task_ids=Uuid(),
        fences=BigInteger(),
        waited=Boolean(),
        earliest_times=DateTime(timezone=True),
        earliest_delays=Float(53),
    )
    locked = locked_rows(suspended, limited=limited)
    sleeps, new_waits = _stored(_due(locked))
    forgotten = (
        delete(Wait)
        .where(
            Wait.task_id == locked.c.task_id,
            locked.c.waited,
            ~exists().where(_waits.c.wait_task_ids == Wait.task_id, _waits.c["keys"] == Wait.key),
        )
        .cte("forgotten")
    )
    available_at = func.least(locked.c.earliest_times, statement_time() + interval(locked.c.earliest_delays))
    changed = (
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=constant("sleeping"),
            available_at=available_at,
            claimed_by=null(),
            lease_losses=constant(0),
            fence=TaskRow.fence + constant(1),
            **(_kept_slot(locked, available_at) if limited else {}),
        )
        .returning(
            TaskRow.task_id,
            TaskRow.queue_name,
            TaskRow.priority,
            TaskRow.available_at,
            *((locked.c.limit_key, locked.c.slot) if limited else ()),
        )
    )
    if not limited:
        return changed.add_cte(sleeps, new_waits, forgotten)
    row = changed.cte("changed")
    given_back = give_back(row, returned=row.c.slot == constant("run"), available_at=row.c.available_at)
    return select(row).add_cte(sleeps, new_waits, forgotten, given_back)


def _kept_slot(locked: CTE, available_at: Any) -> dict[str, Any]:
    return {"slot": case((locked.c.slot == constant("task"), locked.c.slot)), "resumes_at": available_at}


SUSPEND = _suspend(limited=False)
"""Suspend runs until the earliest of their deadlines, store these waits and delete the tasks' other ones."""

SUSPEND_LIMITED = _suspend(limited=True)
"""`SUSPEND` for tasks with limit keys, whose slots it gives back, unless they are kept until the end of the task."""

_registering = rows("run", task_ids=Uuid(), fences=BigInteger())
_due_rows = _due(locked_rows(_registering))
_sleeps, _new_waits = _stored(_due_rows)

REGISTER_WAITS = select(
    _due_rows.c.wait_task_ids.label("task_id"),
    _due_rows.c["keys"].label("key"),
    _due_rows.c.due_at,
    clock().label("now"),
).add_cte(_sleeps, _new_waits)
"""Store waits of runs that continue in other branches, so that a crash or failure does not restart their time."""
