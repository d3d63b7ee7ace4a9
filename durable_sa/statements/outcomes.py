"""How a run ends: completed, failed, suspended, released or taken over. Each is one fenced statement for many runs.

All of them begin alike: the rows are locked in the order of their ids, those whose fence is another are left out, and
so are those that somebody else has locked at the moment; the writer tells the two apart and repeats the latter. Raising
the fence is part of the change, so nothing that the run sends afterwards has any effect.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Executable,
    Float,
    Text,
    Uuid,
    case,
    cast,
    delete,
    exists,
    func,
    null,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.selectable import CTE, FromClause
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, RunRow, TaskRow, Wait
from ..validation import MAX_DURATION
from .expressions import array, as_json, clock, constant, interval, length, one_row, raised, rows, statement_time, tally

LEASE_LOSS_LIMIT = 20
"""Workers that may be lost in a row while they run a task, before the task is given up as the likely cause."""


def locked_rows(source: FromClause) -> CTE:
    """The tasks of `source` (task_ids, fences) that are still under those fences, locked in the order of their ids.

    What else `source` has comes along, for the planner has no idea how many rows are left here: it would join them with
    their source once more in nested loops, which take as long as the square of the batch.
    """
    return (
        select(
            TaskRow.task_id,
            TaskRow.run_id,
            TaskRow.attempt,
            TaskRow.state,
            TaskRow.claimed_by,
            TaskRow.started_at,
            TaskRow.parent_task_id,
            TaskRow.queue_name,
            *(each for each in source.c if each.key not in ("task_ids", "fences")),
        )
        .join(source, (TaskRow.task_id == source.c.task_ids) & (TaskRow.fence == source.c.fences))
        .order_by(TaskRow.task_id)
        .with_for_update(skip_locked=True, key_share=True, of=TaskRow)
        .cte("locked")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )


def ended_attempts(locked: FromClause, state: ColumnElement[str], error: ColumnElement[Any]) -> CTE:
    """The row in ``runs`` of each attempt that ends, from the tasks as they were before the change."""
    c = locked.c
    return (
        insert(RunRow)
        .from_select(
            ["task_id", "attempt", "run_id", "state", "worker_id", "started_at", "finished_at", "error"],
            select(c.task_id, c.attempt, c.run_id, state, c.claimed_by, c.started_at, clock(), error),
        )
        .on_conflict_do_nothing()
        .cte("ended")
    )


def free_waits_gone(locked: FromClause, *conditions: ColumnElement[bool]) -> CTE:
    """Deletes the waits of tasks that end, but for those that somebody has locked: they are found as stray ones."""
    free = (
        select(Wait.task_id, Wait.key)
        .join(locked, Wait.task_id == locked.c.task_id)
        .where(*conditions)
        .with_for_update(skip_locked=True, of=Wait)
        .cte("free_waits")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    return delete(Wait).where(Wait.task_id == free.c.task_id, Wait.key == free.c.key).cte("waits_gone")


def _complete(done: FromClause, wanted: ColumnElement[int]) -> Executable:
    locked = locked_rows(done)
    ended = ended_attempts(locked, constant("completed"), null())
    forgotten = delete(Wait).where(Wait.task_id == locked.c.task_id, locked.c.waited).cte("forgotten")
    completed = (
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=constant("completed"),
            outcome=constant("completed"),
            output=as_json(locked.c.outputs),
            error=null(),
            finished_at=clock(),
            fence=TaskRow.fence + constant(1),
        )
        .returning(TaskRow.task_id, TaskRow.parent_task_id)
        .cte("completed")
    )
    children = func.array_agg(completed.c.task_id).filter(completed.c.parent_task_id.is_not(None))
    reply = tally(completed, wanted, told=("task_id",)).add_columns(children.label("child_task_ids"))
    return reply.add_cte(ended, forgotten)


COMPLETION_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "outputs": Text(),
    "waited": Boolean(),
}

COMPLETE = _complete(rows("done", **COMPLETION_COLUMNS), length("task_ids", Uuid()))
"""Store results. Found by id and fence alone: with a condition on the state the planner walks an index instead."""

COMPLETE_ONE = _complete(one_row("done", **COMPLETION_COLUMNS), constant(1))
"""As `COMPLETE`, of a result alone."""

_failed = rows(
    "fail",
    task_ids=Uuid(),
    fences=BigInteger(),
    errors=Text(),
    retryable=Boolean(),
    next_run_ids=Uuid(),
    waited=Boolean(),
)
_locked = locked_rows(_failed)
_ended = ended_attempts(_locked, constant("failed"), as_json(_locked.c.errors))
# By hand they may have been set to anything.
_failures = func.least(func.greatest(TaskRow.failures, constant(0)), constant(2**31 - 2))
_again = (
    _locked.c.retryable & (TaskRow.retry_kind != constant("none")) & (_failures + constant(1) < TaskRow.max_attempts)
)
_forgotten = (
    delete(Wait)
    .where(Wait.task_id == _locked.c.task_id, TaskRow.task_id == Wait.task_id, _locked.c.waited, ~_again)
    .cte("forgotten")
)


def _within(number: InstrumentedAttribute[float], least: float, most: float) -> ColumnElement[Any]:
    """A number as `RetryStrategy` allows it. NaN is greater than all to Postgres, and as bad as infinity."""
    return func.least(func.greatest(number, least), most, type_=Float(53))


_base_delay = _within(TaskRow.retry_base_delay, 0.0, MAX_DURATION)
_max_backoff = _within(TaskRow.retry_max_backoff, 0.0, MAX_DURATION)
_factor = _within(TaskRow.retry_factor, 1.0, 1000.0)
_jitter = _within(TaskRow.retry_jitter, 0.0, 1.0)
_half = func.power(_factor, _failures / 2.0)
_backoff = case(
    (TaskRow.retry_kind == constant("fixed"), _base_delay),
    (_base_delay == 0.0, 0.0),
    # In logarithms first, as the product itself may be beyond what a number can hold.
    (
        func.ln(_base_delay) + _failures * func.ln(_factor) >= func.ln(func.greatest(_max_backoff, 1e-300)),
        _max_backoff,
    ),
    else_=_base_delay * _half * _half,
)
_jittered = case(
    # What is shorter is nothing to an interval, and Postgres refuses products that are too small for a number.
    (_backoff < 1e-6, 0.0),
    (_jitter < 1e-6, _backoff),
    else_=_backoff * (1 + _jitter * (2 * func.random() - 1)),
)
_delay = func.least(_jittered, _max_backoff)

FAIL = (
    update(TaskRow)
    .where(TaskRow.task_id == _locked.c.task_id)
    .values(
        state=case((_again, constant("pending")), else_=constant("failed")),
        outcome=case((_again, null()), else_=constant("failed")),
        error=as_json(_locked.c.errors),
        failures=_failures + constant(1),
        lease_losses=constant(0),
        available_at=case((_again, clock() + interval(_delay)), else_=TaskRow.available_at),
        finished_at=case((_again, null()), else_=clock()),
        run_id=case((_again, _locked.c.next_run_ids), else_=TaskRow.run_id),
        claimed_by=null(),
        fence=TaskRow.fence + constant(1),
    )
    .returning(
        TaskRow.task_id,
        TaskRow.parent_task_id,
        TaskRow.state,
        TaskRow.queue_name,
        TaskRow.priority,
        TaskRow.available_at,
    )
    .add_cte(_ended, _forgotten)
)
"""Record failures of user code: the next attempt after the policy's delay, or the end of the task."""

_released = rows("given", task_ids=Uuid(), fences=BigInteger(), errors=Text(), next_run_ids=Uuid())
_locked = locked_rows(_released)
_ended = ended_attempts(_locked, constant("failed"), as_json(_locked.c.errors))

RELEASE = (
    update(TaskRow)
    .where(TaskRow.task_id == _locked.c.task_id)
    .values(
        state=constant("pending"),
        run_id=_locked.c.next_run_ids,
        available_at=clock(),
        claimed_by=null(),
        fence=TaskRow.fence + constant(1),
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)
    .add_cte(_ended)
)
"""Give runs back at shutdown: claimable at once, and no failure of anybody."""

_taken = rows("taken", task_ids=Uuid(), next_run_ids=Uuid())
_locked = (
    select(
        TaskRow.task_id,
        TaskRow.run_id,
        TaskRow.attempt,
        TaskRow.claimed_by,
        TaskRow.started_at,
        TaskRow.lease_losses,
        _taken.c.next_run_ids,
        array("worker_ids", Uuid()).label("worker_ids"),
    )
    .join(_taken, TaskRow.task_id == _taken.c.task_ids)
    .where(TaskRow.claimed_by == func.any(array("worker_ids", Uuid())), TaskRow.finished_at.is_(None))
    .order_by(TaskRow.task_id)
    .with_for_update(skip_locked=True, key_share=True, of=TaskRow)
    .cte("locked")
    .prefix_with("MATERIALIZED", dialect="postgresql")
)
_lost = func.json_build_object(
    constant("name"),
    constant("LeaseLost"),
    constant("message"),
    func.concat(
        constant("worker "),
        cast(_locked.c.claimed_by, Text()),
        constant(" fell silent while it ran attempt "),
        _locked.c.attempt,
    ),
)
_ended = ended_attempts(_locked, constant("failed"), _lost)
_given_up = _locked.c.lease_losses >= LEASE_LOSS_LIMIT - 1
_forgotten = free_waits_gone(_locked, _given_up)

TAKE_OVER = (
    update(TaskRow)
    .where(TaskRow.task_id == _locked.c.task_id)
    .values(
        state=case((_given_up, constant("failed")), else_=constant("pending")),
        outcome=case((_given_up, constant("failed")), else_=null()),
        finished_at=case((_given_up, clock()), else_=null()),
        error=case((_given_up, _lost), else_=TaskRow.error),
        available_at=case((_given_up, TaskRow.available_at), else_=clock()),
        run_id=case((_given_up, TaskRow.run_id), else_=_locked.c.next_run_ids),
        lease_losses=case((_given_up, constant(LEASE_LOSS_LIMIT)), else_=TaskRow.lease_losses + constant(1)),
        claimed_by=null(),
        fence=raised(TaskRow.fence),
    )
    .returning(
        TaskRow.task_id,
        TaskRow.queue_name,
        TaskRow.task_name,
        TaskRow.priority,
        TaskRow.available_at,
        TaskRow.parent_task_id,
        TaskRow.state,
    )
    .add_cte(_ended, _forgotten)
)
"""Take runs from lost workers: a new attempt but no failure, until too many workers in a row were lost with it."""

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
"""The waits that a statement stores: by an absolute time, or by seconds from now, or with no end."""

_waits = rows("wait", **SUSPEND_COLUMNS)


def is_one_of(column: ColumnElement[Any], found: CTE) -> ColumnElement[bool]:
    """Whether it is in the only column of `found`, looked up in a hash table.

    A join, and what is in a plain `IN` becomes one, is done in nested loops where the planner expects few rows.
    """
    return column.in_(select(found.c.task_id)).is_(true())


def _due(locked: CTE) -> CTE:
    due_at = func.coalesce(_waits.c.due_times, statement_time() + interval(_waits.c.delays))
    queue_name = select(TaskRow.queue_name).where(TaskRow.task_id == _waits.c.wait_task_ids).scalar_subquery()
    return (
        select(_waits, due_at.label("due_at"), queue_name.label("queue_name"))
        .where(is_one_of(_waits.c.wait_task_ids, locked))
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )


def _stored(due: CTE) -> tuple[CTE, CTE]:
    """A sleep's wake time goes straight into its checkpoint; events and children become waits."""
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


_suspended = rows(
    "run",
    task_ids=Uuid(),
    fences=BigInteger(),
    waited=Boolean(),
    earliest_times=DateTime(timezone=True),
    earliest_delays=Float(53),
)
_locked = locked_rows(_suspended)
_due_rows = _due(_locked)
_sleeps, _new_waits = _stored(_due_rows)
_forgotten = (
    delete(Wait)
    .where(
        Wait.task_id == _locked.c.task_id,
        _locked.c.waited,
        ~exists().where(_waits.c.wait_task_ids == Wait.task_id, _waits.c["keys"] == Wait.key),
    )
    .cte("forgotten")
)

SUSPEND = (
    update(TaskRow)
    .where(TaskRow.task_id == _locked.c.task_id)
    .values(
        state=constant("sleeping"),
        available_at=func.least(_locked.c.earliest_times, statement_time() + interval(_locked.c.earliest_delays)),
        claimed_by=null(),
        lease_losses=constant(0),
        fence=TaskRow.fence + constant(1),
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)
    .add_cte(_sleeps, _new_waits, _forgotten)
)
"""Put runs to sleep with all that they wait for, until the first of it is due; they wait for nothing else any more."""

_registering = rows("run", task_ids=Uuid(), fences=BigInteger())
_due_rows = _due(locked_rows(_registering))
_sleeps, _new_waits = _stored(_due_rows)

REGISTER_WAITS = select(
    _due_rows.c.wait_task_ids.label("task_id"),
    _due_rows.c["keys"].label("key"),
    _due_rows.c.due_at,
    clock().label("now"),
).add_cte(_sleeps, _new_waits)
"""Store waits of runs that go on in other branches, so that neither crash nor failure starts their time anew."""

_asked = rows("asked", task_ids=Uuid(), fences=BigInteger())
_free = (
    select(TaskRow.task_id)
    .join(_asked, TaskRow.task_id == _asked.c.task_ids)
    .with_for_update(skip_locked=True, key_share=True, of=TaskRow)
    .cte("free")
    .prefix_with("MATERIALIZED", dialect="postgresql")
)
UNDER_FENCE = (
    select(TaskRow.task_id, TaskRow.fence, _free.c.task_id.is_not(None).label("free"))
    .join(_asked, TaskRow.task_id == _asked.c.task_ids)
    .outerjoin(_free, _free.c.task_id == TaskRow.task_id)
)
"""Whether rows that a fenced statement passed over are lost (another fence), or were locked by somebody."""
