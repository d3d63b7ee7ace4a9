"""The outcomes of a run: completed, failed, released or taken over. Each is one statement for many runs.

The first three are written under the fence of the run. A takeover finds runs by the lost worker that holds them. Each
raises the fence, so nothing that the run sends afterwards has any effect.
"""

from __future__ import annotations

import functools
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
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.selectable import CTE, FromClause
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, RunRow, TaskRow, Wait
from ..policies import MAX_LOST_WORKERS, SUSPECT_AFTER
from ..validation import MAX_DURATION
from .expressions import (
    array,
    as_json,
    as_text,
    clock,
    constant,
    count_or_ids,
    interval,
    length,
    next_fence,
    one_row,
    rows,
)
from .fencing import LIMIT_COLUMNS, give_back, is_in, locked_rows, materialized
from .follow_ups import ending


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


def _complete(done: FromClause, wanted: ColumnElement[int], *, limited: bool = False) -> Executable:
    locked = locked_rows(done, limited=limited)
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
            **({"slot": null()} if limited else {}),
        )
        .returning(
            TaskRow.task_id,
            TaskRow.parent_task_id,
            *((TaskRow.queue_name, locked.c.limit_key, locked.c.slot) if limited else ()),
        )
        .cte("completed")
    )
    children = func.array_agg(completed.c.task_id).filter(completed.c.parent_task_id.is_not(None))
    reply = count_or_ids(completed, wanted, columns=("task_id",)).add_columns(children.label("child_task_ids"))
    if limited:
        return reply.add_cte(ended, forgotten, give_back(completed, returned=completed.c.slot.is_not(None)))
    return reply.add_cte(ended, forgotten)


COMPLETION_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "outputs": Text(),
    "waited": Boolean(),
}

COMPLETE = _complete(rows("done", **COMPLETION_COLUMNS), length("task_ids", Uuid()))
"""Store results. Tasks are found by id and fence only: with a condition on the state the planner scans an index.

docs/hot-statements.md has it as the server receives it.
"""

COMPLETE_ONE = _complete(one_row("done", **COMPLETION_COLUMNS), constant(1))
"""`COMPLETE` for a single result."""

COMPLETE_LIMITED = _complete(rows("done", **COMPLETION_COLUMNS), length("task_ids", Uuid()), limited=True)
"""`COMPLETE` for tasks with limit keys, whose slots it gives back."""

# Clamped, because a value set by hand could overflow and fail the whole batch.
_failures = func.least(func.greatest(TaskRow.failures, constant(0)), constant(2**31 - 2))


def _within(number: InstrumentedAttribute[float], least: float, most: float) -> ColumnElement[Any]:
    """Clamp a number to what `RetryStrategy` allows. NaN becomes `most`: Postgres sorts it above all numbers."""
    return func.least(func.greatest(number, least), most, type_=Float(53))


# The delay is min(base_delay * factor ** failures, max_backoff), spread by the jitter and at most max_backoff then;
# that of a fixed strategy is base_delay, spread. The failures are those before this one.
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
_delay = func.least(_jittered, _max_backoff)


@functools.cache
def fail(*, limited: bool) -> Executable:
    """Record failures of user code: schedule the next attempt, or end the task as failed.

    The next attempt begins after the delay that the failure names, or else the policy's.

    Recorded timeouts that are the failure are deleted, so that the next attempt waits anew. A failure that
    `puts_off` is none of the task's: it is attempted after the delay in any case, and nothing is counted.

    `limited` is for tasks with limit keys. It gives their slots back, unless they are kept until the end of the task,
    and a failure that puts a task off closes its key for as long.
    """
    failed = rows(
        "fail",
        task_ids=Uuid(),
        fences=BigInteger(),
        errors=Text(),
        retryable=Boolean(),
        next_run_ids=Uuid(),
        waited=Boolean(),
        delays=Float(53),
        puts_off=Boolean(),
    )
    locked = locked_rows(failed, limited=limited)
    ended = record_attempts(locked, constant("failed"), as_json(locked.c.errors))
    again = or_(
        locked.c.puts_off,
        locked.c.retryable
        & ((TaskRow.retry_kind != constant("none")) | locked.c.delays.is_not(None))
        & (_failures + constant(1) < TaskRow.max_attempts),
    )
    forgotten = (
        delete(Wait)
        .where(Wait.task_id == locked.c.task_id, TaskRow.task_id == Wait.task_id, locked.c.waited, ~again)
        .cte("forgotten")
    )
    timed_out = rows("timed_out", timed_out_ids=Uuid(), timed_out_keys=Uuid())
    dropped = (
        delete(Checkpoint)
        .where(
            Checkpoint.task_id == timed_out.c.timed_out_ids,
            Checkpoint.key == timed_out.c.timed_out_keys,
            Checkpoint.status == constant("timeout"),
            is_in(timed_out.c.timed_out_ids, locked),
        )
        .cte("dropped")
    )
    next_time = clock() + interval(func.coalesce(locked.c.delays, _delay))
    changed = (
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=case((again, constant("pending")), else_=constant("failed")),
            outcome=case((again, null()), else_=constant("failed")),
            error=as_json(locked.c.errors),
            failures=case((locked.c.puts_off, TaskRow.failures), else_=_failures + constant(1)),
            lease_losses=constant(0),
            available_at=case((again, next_time), else_=TaskRow.available_at),
            finished_at=case((again, null()), else_=clock()),
            run_id=case((again, locked.c.next_run_ids), else_=TaskRow.run_id),
            claimed_by=null(),
            fence=TaskRow.fence + constant(1),
            **(_kept_slot(locked, again, next_time) if limited else {}),
        )
    )
    columns: tuple[Any, ...] = (
        TaskRow.task_id,
        TaskRow.parent_task_id,
        TaskRow.state,
        TaskRow.queue_name,
        TaskRow.priority,
        TaskRow.available_at,
    )
    if not limited:
        return ending(changed, columns, ended, forgotten, dropped)

    def given_back(row: CTE) -> tuple[CTE, ...]:
        unfinished = row.c.state != constant("failed")
        closes = row.c.puts_off & (row.c.limit_key != constant(""))
        back = give_back(
            row,
            returned=row.c.slot.is_not(None) & ~(unfinished & (row.c.slot == constant("task"))),
            available_at=case((unfinished, row.c.available_at)),
            closed_until=case((closes, row.c.available_at)),
        )
        return (back,)

    columns = (*columns, locked.c.limit_key, locked.c.slot, locked.c.puts_off)
    return ending(changed, columns, ended, forgotten, dropped, after=given_back)


def _kept_slot(locked: CTE, again: ColumnElement[bool], next_time: ColumnElement[Any]) -> dict[str, Any]:
    """Return the values of a task that is attempted again: with a slot of its own, it comes before those without."""
    kept = again & (locked.c.slot == constant("task"))
    return {"slot": case((kept, locked.c.slot)), "resumes_at": case((kept, next_time))}


@functools.cache
def release(*, limited: bool) -> Executable:
    """Release runs at shutdown: claimable at once, and not counted as failures.

    `limited` is for tasks with limit keys, and gives their slots back, unless they are kept until the end of the task.
    """
    released = rows("given", task_ids=Uuid(), fences=BigInteger(), errors=Text(), next_run_ids=Uuid())
    locked = locked_rows(released, limited=limited)
    ended = record_attempts(locked, constant("failed"), as_json(locked.c.errors))
    changed = (
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=constant("pending"),
            run_id=locked.c.next_run_ids,
            lease_losses=constant(0),
            available_at=clock(),
            claimed_by=null(),
            fence=TaskRow.fence + constant(1),
            **(_kept_slot(locked, true(), clock()) if limited else {}),
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
        return changed.add_cte(ended)
    row = changed.cte("changed")
    given_back = give_back(row, returned=row.c.slot == constant("run"), available_at=row.c.available_at)
    return select(row).add_cte(ended, given_back)


@functools.cache
def take_over() -> Executable:
    """Take runs over from lost workers: a new attempt, not counted as a failure.

    A suspect fails at its `max_lost_workers`-th loss in a row.
    """
    taken = rows("taken", task_ids=Uuid(), next_run_ids=Uuid())
    locked = materialized(
        "locked",
        select(
            TaskRow.task_id,
            TaskRow.run_id,
            TaskRow.attempt,
            TaskRow.claimed_by,
            TaskRow.started_at,
            TaskRow.lease_losses,
            func.coalesce(TaskRow.max_lost_workers, constant(MAX_LOST_WORKERS)).label("max_lost_workers"),
            *LIMIT_COLUMNS,
            taken.c.next_run_ids,
            array("worker_ids", Uuid()).label("worker_ids"),
        )
        .join(taken, TaskRow.task_id == taken.c.task_ids)
        .where(TaskRow.claimed_by == func.any(array("worker_ids", Uuid())), TaskRow.finished_at.is_(None))
        .order_by(TaskRow.task_id)
        .with_for_update(skip_locked=True, key_share=True, of=TaskRow),
    )
    # A number beyond counting, set by hand, would overflow and fail the whole batch.
    losses = func.least(locked.c.lease_losses, constant(2**31 - 2)) + constant(1)
    # A suspect is only claimed alone, so those after the first two were lost while they ran nothing else.
    lost_alone = losses - constant(SUSPECT_AFTER)
    given_up = lost_alone >= locked.c.max_lost_workers
    lost = func.json_build_object(
        constant("name"),
        constant("LeaseLost"),
        constant("message"),
        func.concat(
            constant("worker "),
            cast(locked.c.claimed_by, Text()),
            constant(" fell silent while it ran attempt "),
            locked.c.attempt,
            case(
                (
                    lost_alone > constant(0),
                    func.concat(
                        constant(" alone (loss "),
                        lost_alone,
                        constant(" of "),
                        locked.c.max_lost_workers,
                        constant(" in a row)"),
                    ),
                )
            ),
        ),
    )
    ended = record_attempts(locked, constant("failed"), lost)
    forgotten = delete_unlocked_waits(locked, given_up)

    kept = ~given_up & (locked.c.slot == constant("task"))
    return ending(
        update(TaskRow)
        .where(TaskRow.task_id == locked.c.task_id)
        .values(
            state=case((given_up, constant("failed")), else_=constant("pending")),
            outcome=case((given_up, constant("failed")), else_=null()),
            finished_at=case((given_up, clock()), else_=null()),
            error=case((given_up, lost), else_=TaskRow.error),
            available_at=case((given_up, TaskRow.available_at), else_=clock()),
            run_id=case((given_up, TaskRow.run_id), else_=locked.c.next_run_ids),
            lease_losses=losses,
            claimed_by=null(),
            fence=next_fence(TaskRow.fence),
            slot=case((kept, locked.c.slot)),
            resumes_at=case((kept, clock())),
        ),
        (
            TaskRow.task_id,
            TaskRow.queue_name,
            TaskRow.task_name,
            TaskRow.priority,
            TaskRow.available_at,
            TaskRow.parent_task_id,
            TaskRow.state,
            TaskRow.lease_losses,
            case((given_up, as_text(TaskRow.params))).label("params"),
            case((given_up, as_text(TaskRow.error))).label("error"),
            locked.c.limit_key,
            (locked.c.slot.is_not(None) & ~kept).label("gives_back"),
        ),
        ended,
        forgotten,
        after=lambda taken_over: (
            give_back(
                taken_over,
                returned=taken_over.c.gives_back,
                available_at=case((taken_over.c.state == constant("pending"), taken_over.c.available_at)),
            ),
        ),
    )
