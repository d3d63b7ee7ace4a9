"""The outcomes of a run: completed, failed, released or taken over. Each is one fenced statement for many runs.

Incrementing the fence is part of each, so nothing that the run sends afterwards has any effect.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Executable,
    Float,
    Text,
    Uuid,
    case,
    cast,
    delete,
    func,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.selectable import CTE, FromClause
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, RunRow, TaskRow, Wait
from ..policies import MAX_LOST_WORKERS, SUSPECT_AFTER
from ..validation import MAX_DURATION
from .expressions import array, as_json, clock, constant, count_or_ids, interval, length, next_fence, one_row, rows
from .fencing import is_in, locked_rows, materialized


def record_attempts(locked: FromClause, state: ColumnElement[str], error: ColumnElement[Any]) -> CTE:
    """Insert the rows in ``runs`` of ending attempts, from the tasks as they were before the change."""
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


def delete_unlocked_waits(locked: FromClause, *conditions: ColumnElement[bool]) -> CTE:
    """Delete the waits of ending tasks; maintenance deletes those that another transaction has locked now."""
    free = materialized(
        "free_waits",
        select(Wait.task_id, Wait.key)
        .join(locked, Wait.task_id == locked.c.task_id)
        .where(*conditions)
        .with_for_update(skip_locked=True, of=Wait),
    )
    return delete(Wait).where(Wait.task_id == free.c.task_id, Wait.key == free.c.key).cte("waits_gone")


def _complete(done: FromClause, wanted: ColumnElement[int]) -> Executable:
    locked = locked_rows(done)
    ended = record_attempts(locked, constant("completed"), null())
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
    reply = count_or_ids(completed, wanted, columns=("task_id",)).add_columns(children.label("child_task_ids"))
    return reply.add_cte(ended, forgotten)


COMPLETION_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "outputs": Text(),
    "waited": Boolean(),
}

COMPLETE = _complete(rows("done", **COMPLETION_COLUMNS), length("task_ids", Uuid()))
"""Store results. Tasks are found by id and fence only: with a condition on the state the planner scans an index."""

COMPLETE_ONE = _complete(one_row("done", **COMPLETION_COLUMNS), constant(1))
"""`COMPLETE` for a single result."""

_failed = rows(
    "fail",
    task_ids=Uuid(),
    fences=BigInteger(),
    errors=Text(),
    retryable=Boolean(),
    next_run_ids=Uuid(),
    waited=Boolean(),
    delays=Float(53),
)
_locked = locked_rows(_failed)
_ended = record_attempts(_locked, constant("failed"), as_json(_locked.c.errors))
# Clamped, because a value set by hand could overflow and fail the whole batch.
_failures = func.least(func.greatest(TaskRow.failures, constant(0)), constant(2**31 - 2))
_again = (
    _locked.c.retryable
    & ((TaskRow.retry_kind != constant("none")) | _locked.c.delays.is_not(None))
    & (_failures + constant(1) < TaskRow.max_attempts)
)
_forgotten = (
    delete(Wait)
    .where(Wait.task_id == _locked.c.task_id, TaskRow.task_id == Wait.task_id, _locked.c.waited, ~_again)
    .cte("forgotten")
)
_timed_out = rows("timed_out", timed_out_ids=Uuid(), timed_out_keys=Uuid())
_dropped = (
    delete(Checkpoint)
    .where(
        Checkpoint.task_id == _timed_out.c.timed_out_ids,
        Checkpoint.key == _timed_out.c.timed_out_keys,
        Checkpoint.status == constant("timeout"),
        is_in(_timed_out.c.timed_out_ids, _locked),
    )
    .cte("dropped")
)


def _within(number: InstrumentedAttribute[float], least: float, most: float) -> ColumnElement[Any]:
    """Clamp a number to what `RetryStrategy` allows. NaN becomes `most`: Postgres sorts it above all numbers."""
    return func.least(func.greatest(number, least), most, type_=Float(53))


_base_delay = _within(TaskRow.retry_base_delay, 0.0, MAX_DURATION)
_max_backoff = _within(TaskRow.retry_max_backoff, 0.0, MAX_DURATION)
_factor = _within(TaskRow.retry_factor, 1.0, 1000.0)
_jitter = _within(TaskRow.retry_jitter, 0.0, 1.0)
_half = func.power(_factor, _failures / 2.0)
_backoff = case(
    (TaskRow.retry_kind == constant("fixed"), _base_delay),
    (_base_delay == 0.0, 0.0),
    # Compared as logarithms, because the product may overflow.
    (
        func.ln(_base_delay) + _failures * func.ln(_factor) >= func.ln(func.greatest(_max_backoff, 1e-300)),
        _max_backoff,
    ),
    else_=_base_delay * _half * _half,
)
_jittered = case(
    # Below the resolution of an interval, and Postgres raises an error for products that underflow.
    (_backoff < 1e-6, 0.0),
    (_jitter < 1e-6, _backoff),
    else_=_backoff * (1 + _jitter * (2 * func.random() - 1)),
)
_delay = func.coalesce(_locked.c.delays, func.least(_jittered, _max_backoff))

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
    .add_cte(_ended, _forgotten, _dropped)
)
"""Record failures of user code: schedule the next attempt, or end the task as failed.

The next attempt begins after the delay that the failure names, or else the policy's.

Recorded timeouts that are the failure are deleted, so that the next attempt waits anew.
"""

_released = rows("given", task_ids=Uuid(), fences=BigInteger(), errors=Text(), next_run_ids=Uuid())
_locked = locked_rows(_released)
_ended = record_attempts(_locked, constant("failed"), as_json(_locked.c.errors))

RELEASE = (
    update(TaskRow)
    .where(TaskRow.task_id == _locked.c.task_id)
    .values(
        state=constant("pending"),
        run_id=_locked.c.next_run_ids,
        lease_losses=constant(0),
        available_at=clock(),
        claimed_by=null(),
        fence=TaskRow.fence + constant(1),
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at)
    .add_cte(_ended)
)
"""Release runs at shutdown: claimable at once, and not counted as failures."""

_taken = rows("taken", task_ids=Uuid(), next_run_ids=Uuid())
_locked = materialized(
    "locked",
    select(
        TaskRow.task_id,
        TaskRow.run_id,
        TaskRow.attempt,
        TaskRow.claimed_by,
        TaskRow.started_at,
        TaskRow.lease_losses,
        func.coalesce(TaskRow.max_lost_workers, constant(MAX_LOST_WORKERS)).label("max_lost_workers"),
        _taken.c.next_run_ids,
        array("worker_ids", Uuid()).label("worker_ids"),
    )
    .join(_taken, TaskRow.task_id == _taken.c.task_ids)
    .where(TaskRow.claimed_by == func.any(array("worker_ids", Uuid())), TaskRow.finished_at.is_(None))
    .order_by(TaskRow.task_id)
    .with_for_update(skip_locked=True, key_share=True, of=TaskRow),
)
# A number beyond counting, set by hand, would overflow and fail the whole batch.
_losses = func.least(_locked.c.lease_losses, constant(2**31 - 2)) + constant(1)
# A suspect is only claimed alone, so those after the first two were lost while they ran nothing else.
_lost_alone = _losses - constant(SUSPECT_AFTER)
_given_up = _lost_alone >= _locked.c.max_lost_workers
_lost = func.json_build_object(
    constant("name"),
    constant("LeaseLost"),
    constant("message"),
    func.concat(
        constant("worker "),
        cast(_locked.c.claimed_by, Text()),
        constant(" fell silent while it ran attempt "),
        _locked.c.attempt,
        case(
            (
                _lost_alone > constant(0),
                func.concat(
                    constant(" alone (loss "),
                    _lost_alone,
                    constant(" of "),
                    _locked.c.max_lost_workers,
                    constant(" in a row)"),
                ),
            )
        ),
    ),
)
_ended = record_attempts(_locked, constant("failed"), _lost)
_forgotten = delete_unlocked_waits(_locked, _given_up)

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
        lease_losses=_losses,
        claimed_by=null(),
        fence=next_fence(TaskRow.fence),
    )
    .returning(
        TaskRow.task_id,
        TaskRow.queue_name,
        TaskRow.task_name,
        TaskRow.priority,
        TaskRow.available_at,
        TaskRow.parent_task_id,
        TaskRow.state,
        TaskRow.lease_losses,
    )
    .add_cte(_ended, _forgotten)
)
"""Take runs over from lost workers: a new attempt, not counted as a failure.

A suspect fails at its `max_lost_workers`-th loss in a row.
"""
