"""The claim, and the leases of workers: registration, heartbeat, loss.

How tasks are claimed
---------------------
A worker asks for as many tasks as it has free slots. A lane is a queue and a priority. Lane by lane, the statement
scans the partial index of unfinished tasks ``(queue_name, priority, available_at, task_id)``: one bounded range, from
the lane's *cursor* to the present, at most ``wanted`` rows. Each row is locked with ``FOR NO KEY UPDATE SKIP LOCKED``,
so that workers wait neither for each other nor for rows locked by the application, and so that an application's foreign
key to a task neither blocks nor is blocked. The outer limit stops the scan when enough tasks are found; the remaining
lanes are not opened.

Claiming a task changes ``state``, ``claimed_by``, ``fence`` and ``attempt``. None of these is in an index, neither as a
key nor in a predicate, so the update is heap-only, which makes it three times faster. Only the first claim of a task
with a time limit is not, because it also changes ``cancel_at``, which is indexed.

The price is that a claimed task stays in the index until it ends, and that dead index entries stay until vacuum removes
them, which it cannot do while any snapshot is open. A claim from the start of the index would read all of them each
time. Therefore the worker keeps a cursor for each lane: the position up to which the lane was claimed, where the next
claim starts. Tasks behind the cursor (a transaction that committed late, a retry, a task that was locked by another
transaction) are found by a full scan, a claim without cursors, from time to time, and by hints, which move the cursor
back.

A task that has lost `SUSPECT_AFTER` workers in a row is a suspect: perhaps it ends their processes. A claim passes over
suspects. A worker that holds no run and finds no other task claims one alone; a worker that is busy for long makes room
for one that waits at the head of its lane.

``fence`` is the token that a claim gives to its run: it is incremented by the claim and by every later change of
ownership, and each write of a run names the fence of its claim. Time only decides when a silent worker may be taken
over, never which run may write.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    Executable,
    Float,
    Integer,
    SmallInteger,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from ..models import EndedWorker, Queue, TaskRow, WorkerRow
from ..policies import SUSPECT_AFTER
from .expressions import (
    array,
    as_json,
    as_text,
    clamped_limit,
    clock,
    constant,
    interval,
    numbered_rows,
    opaque,
    rows,
    statement_time,
)
from .fencing import materialized


class ClaimedRun(NamedTuple):
    """A claimed run, in the order of the columns that `CLAIM` returns."""

    task_id: uuid.UUID
    run_id: uuid.UUID
    queue_name: str
    priority: int
    available_at: datetime
    task_name: str
    params: str | None
    headers: str | None
    attempt: int
    fence: int
    cancel_at: datetime | None
    now: datetime
    limit_key: str | None = None
    """The limit key; empty for a task without one in a queue with limits; None in a queue without limits."""

    @property
    def key(self) -> tuple[uuid.UUID, int]:
        """The identity of the run: no other run has the same task and fence."""
        return self.task_id, self.fence

    @property
    def log_fields(self) -> dict[str, Any]:
        """The run as attributes of a log record."""
        return {
            "task_id": str(self.task_id),
            "task_name": self.task_name,
            "run_id": str(self.run_id),
            "attempt": self.attempt,
            "queue_name": self.queue_name,
        }

    @property
    def fresh(self) -> bool:
        """True if this is the first claim of the task, so nothing can have been recorded yet."""
        return self.fence == 1


_worker_id = bindparam("worker_id", type_=Uuid())
_wanted = opaque(bindparam("wanted", type_=Integer()))

_cursors = numbered_rows(
    "lane",
    "position",
    queue_names=Text(),
    priorities=SmallInteger(),
    cursor_times=DateTime(timezone=True),
    cursor_ids=Uuid(),
)
_open_lanes = materialized(
    "open_lanes",
    select(_cursors)
    .where(
        ~exists().where(
            Queue.queue_name == _cursors.c.queue_names, or_(Queue.paused_at.is_not(None), Queue.limited_at.is_not(None))
        ),
        # A worker that was declared lost claims nothing more under its old id.
        exists().where(WorkerRow.worker_id == _worker_id, WorkerRow.lost_at.is_(None)),
    )
    .order_by(_cursors.c.position),
)
_is_suspect = TaskRow.lease_losses >= constant(SUSPECT_AFTER)


def _in_lane(*columns: Any) -> Any:
    """Select the claimable tasks of a lane, suspects included, in the order of claims."""
    return (
        select(*columns)
        .where(
            TaskRow.finished_at.is_(None),
            TaskRow.queue_name == _open_lanes.c.queue_names,
            TaskRow.priority == _open_lanes.c.priorities,
            TaskRow.available_at <= statement_time(),
            tuple_(TaskRow.available_at, TaskRow.task_id)
            > tuple_(_open_lanes.c.cursor_times, _open_lanes.c.cursor_ids),
            TaskRow.claimed_by.is_(None),
            TaskRow.task_name == func.any(array("task_names", Text())),
            or_(TaskRow.cancel_at.is_(None), TaskRow.cancel_at > statement_time()),
            # Rows whose counters would overflow are skipped, because the error would fail the whole claim.
            TaskRow.attempt < constant(2**31 - 1),
            TaskRow.fence < constant(2**62),
        )
        .order_by(TaskRow.available_at, TaskRow.task_id)
        .correlate(_open_lanes)
    )


_CLAIMED = (
    TaskRow.task_id,
    TaskRow.run_id,
    TaskRow.queue_name,
    TaskRow.priority,
    TaskRow.available_at,
    TaskRow.task_name,
    as_text(TaskRow.params).label("params"),
    as_text(TaskRow.headers).label("headers"),
    TaskRow.attempt,
    TaskRow.fence,
    TaskRow.cancel_at,
    clock().label("now"),
    TaskRow.limit_key,
)


def _claim(condition: ColumnElement[bool], wanted: ColumnElement[int]) -> Executable:
    next_in_lane = (
        _in_lane(TaskRow.task_id)
        .where(condition)
        .limit(wanted)
        .with_for_update(skip_locked=True, key_share=True)
        .lateral("next_in_lane")
    )
    ready = select(next_in_lane.c.task_id).select_from(_open_lanes.join(next_in_lane, true())).limit(wanted)
    return (
        update(TaskRow)
        # An array instead of a join: the planner would expect many rows and read the whole table.
        .where(TaskRow.task_id == func.any(func.array(ready.scalar_subquery())))
        .values(
            state=constant("running"),
            claimed_by=_worker_id,
            fence=TaskRow.fence + constant(1),
            # A suspended task continues its attempt; a pending one begins the next.
            attempt=TaskRow.attempt + case((TaskRow.state == constant("pending"), constant(1)), else_=constant(0)),
            started_at=case((TaskRow.state == constant("pending"), clock()), else_=TaskRow.started_at),
            first_started_at=func.coalesce(TaskRow.first_started_at, clock()),
            cancel_at=case(
                (TaskRow.first_started_at.is_(None), clock() + clamped_limit(TaskRow.max_running_time)),
                else_=TaskRow.cancel_at,
            ),
        )
        .returning(*_CLAIMED)
    )


CLAIM = _claim(~_is_suspect, _wanted)
"""Claim up to `wanted` ready tasks: the central statement of the engine, explained in the module's docstring.

docs/hot-statements.md has it as the server receives it.
"""

CLAIM_SUSPECT = _claim(_is_suspect, constant(1))
"""Claim one suspect, for a worker that runs nothing else."""

_head = _in_lane(TaskRow.task_id, TaskRow.lease_losses).limit(constant(100)).lateral("head")

WAITING_SUSPECTS = (
    select(
        _head.c.task_id,
        select(func.array_agg(WorkerRow.worker_id))
        .where(WorkerRow.lost_at.is_(None), _open_lanes.c.queue_names == func.any(WorkerRow.queue_names))
        .scalar_subquery()
        .label("worker_ids"),
    )
    .select_from(_open_lanes.join(_head, true()))
    .where(_head.c.lease_losses >= constant(SUSPECT_AFTER))
    .limit(constant(100))
)
"""Ready suspects among the first tasks of each lane, and the workers of their queue: those whose turn has come."""

_held = rows("held", task_ids=Uuid(), fences=BigInteger())

UNREPORTED_CLAIMS = select(*_CLAIMED, _is_suspect.label("suspect")).where(
    TaskRow.finished_at.is_(None),
    TaskRow.queue_name == func.any(array("queue_names", Text())),
    TaskRow.available_at <= statement_time(),
    TaskRow.claimed_by == _worker_id,
    ~exists().where(TaskRow.task_id == _held.c.task_ids, TaskRow.fence == _held.c.fences),
)
"""Runs that a worker holds without knowing: their claim was committed, and its reply was lost."""

_asked = rows("asked", queue_names=Text())


def _smallest_priority(queue_name: ColumnElement[str], *above: ColumnElement[int]) -> ColumnElement[Any]:
    return (
        select(func.min(TaskRow.priority))
        .where(
            TaskRow.finished_at.is_(None),
            TaskRow.queue_name == queue_name,
            *(TaskRow.priority > bound for bound in above),
        )
        .scalar_subquery()
    )


_used = select(
    _asked.c.queue_names.label("queue_name"), _smallest_priority(_asked.c.queue_names).label("priority")
).cte("used", recursive=True)
_used = _used.union_all(
    select(_used.c.queue_name, _smallest_priority(_used.c.queue_name, _used.c.priority)).where(
        _used.c.priority.is_not(None)
    )
)

SURVEY_LANES = select(
    _used.c.queue_name,
    _used.c.priority,
    select(func.min(TaskRow.available_at))
    .where(
        TaskRow.finished_at.is_(None),
        TaskRow.queue_name == _used.c.queue_name,
        TaskRow.priority == _used.c.priority,
        TaskRow.available_at > statement_time(),
    )
    .scalar_subquery()
    .label("next_at"),
    exists().where(Queue.queue_name == _used.c.queue_name, Queue.limited_at.is_not(None)).label("limited"),
    clock().label("now"),
).where(_used.c.priority.is_not(None))
"""The priorities in use in each queue, found by a skip scan of the index, and when the next task is due."""

_claim_timeout = interval(bindparam("claim_timeout", type_=Float(53)))

REGISTER_WORKER = (
    insert(WorkerRow)
    .values(
        worker_id=_worker_id,
        name=bindparam("name", type_=Text()),
        queue_names=array("queue_names", Text()),
        claim_timeout=_claim_timeout,
        started_at=clock(),
        heartbeat_at=clock(),
        expires_at=clock() + _claim_timeout,
        knows_limits=true(),
    )
    .on_conflict_do_update(index_elements=[WorkerRow.worker_id], set_={"heartbeat_at": clock()})
    .returning(clock().label("now"))
)
"""Register a starting worker. Its id is new, so a conflict is this same statement, repeated after a lost reply."""

_beating_id = bindparam("beating_id", type_=Uuid())

HEARTBEAT = (
    update(WorkerRow)
    .where(WorkerRow.worker_id == _beating_id, WorkerRow.lost_at.is_(None))
    .values(heartbeat_at=clock(), expires_at=clock() + WorkerRow.claim_timeout)
    .returning(WorkerRow.worker_id)
)
"""Extend the lease of all runs of a worker by one small write. Returns no row if the worker was declared lost."""

LEASE_STATUS = select(WorkerRow.worker_id).where(WorkerRow.worker_id == _beating_id, WorkerRow.lost_at.is_(None))
"""Returns a row unless the worker was declared lost. For workers that must not extend their lease: the event loop is
stuck, or the lease is over."""

END_LEASE = (
    update(WorkerRow).where(WorkerRow.worker_id == _beating_id, WorkerRow.lost_at.is_(None)).values(expires_at=clock())
)
"""End the lease of a worker whose process has ended, so that its runs are taken over now."""

SHOW_LONG_STEPS = (
    update(WorkerRow)
    .where(WorkerRow.worker_id == _beating_id)
    .values(long_steps=as_json(bindparam("long_steps_json", type_=Text())))
)
"""Replace the list of a worker's steps that have run for more than a second."""


def _remove(*conditions: ColumnElement[bool]) -> Executable:
    """Delete workers, and keep their labels for as long as the queue with the longest retention keeps its tasks."""
    removed = delete(WorkerRow).where(*conditions).returning(WorkerRow.worker_id, WorkerRow.name).cte("removed")
    outdated = delete(EndedWorker).where(
        EndedWorker.ended_at < statement_time() - select(func.max(Queue.retention)).scalar_subquery(),
        ~exists().where(Queue.retention.is_(None)),
    )
    labels = select(removed.c.worker_id, removed.c.name, clock())
    return (
        insert(EndedWorker)
        .from_select(["worker_id", "name", "ended_at"], labels)
        .on_conflict_do_nothing()
        .add_cte(outdated.cte("outdated"))
    )


REMOVE_WORKER = _remove(WorkerRow.worker_id == _worker_id)
"""Remove a stopping worker, after it has released its runs."""

_silent = materialized(
    "silent",
    select(WorkerRow.worker_id)
    .where(WorkerRow.lost_at.is_(None), WorkerRow.expires_at < clock())
    .order_by(WorkerRow.worker_id)
    .with_for_update(skip_locked=True),
)

DECLARE_LOST = (
    update(WorkerRow)
    .where(WorkerRow.worker_id == _silent.c.worker_id, WorkerRow.lost_at.is_(None), WorkerRow.expires_at < clock())
    .values(lost_at=clock())
    .returning(WorkerRow.worker_id)
)
"""Declare silent workers lost. A heartbeat that commits first wins: the expiry is compared under the row's lock."""

LOST_WORKERS = select(WorkerRow.worker_id, WorkerRow.name, WorkerRow.queue_names).where(WorkerRow.lost_at.is_not(None))
"""Workers whose runs are to be taken over. Their rows are kept for a while, for runs claimed at the last moment."""

RUNS_OF_LOST = (
    select(TaskRow.task_id)
    .where(
        TaskRow.finished_at.is_(None),
        TaskRow.queue_name == func.any(array("queue_names", Text())),
        TaskRow.available_at <= statement_time(),
        TaskRow.claimed_by == func.any(array("worker_ids", Uuid())),
    )
    .limit(_wanted)
    .offset(bindparam("passed", type_=Integer()))
)
"""A page of the unfinished tasks that lost workers hold. The condition on `available_at` is true of all claimed tasks.

`passed` skips tasks already seen that are locked by other transactions.
"""

ORPHANED_RUNS = (
    select(TaskRow.task_id, TaskRow.claimed_by)
    .where(
        TaskRow.finished_at.is_(None),
        TaskRow.available_at <= statement_time(),
        TaskRow.claimed_by.is_not(None),
        ~exists().where(WorkerRow.worker_id == TaskRow.claimed_by),
    )
    .limit(_wanted)
    .with_for_update(skip_locked=True, key_share=True, of=TaskRow)
)
"""Runs whose worker has no row, for instance because it was deleted by hand."""

_forgotten = materialized(
    "forgotten",
    select(WorkerRow.worker_id)
    .where(WorkerRow.lost_at < clock() - interval(bindparam("age", type_=Float(53))))
    .with_for_update(skip_locked=True),
)
DELETE_LOST_WORKERS = _remove(WorkerRow.worker_id == _forgotten.c.worker_id)
"""Delete lost workers after `age` seconds, when no run can refer to them any more."""

LOST_RUNS = (
    select(_held.c.task_ids.label("task_id"), _held.c.fences.label("fence"), TaskRow.state)
    .select_from(_held.outerjoin(TaskRow, TaskRow.task_id == _held.c.task_ids))
    .where(or_(TaskRow.fence != _held.c.fences, TaskRow.task_id.is_(None)))
)
"""Runs that a worker no longer owns: cancelled, taken over, or deleted with their queue.

They are compared by task and fence, because a worker may claim a task again while its earlier run is still ending.
"""
