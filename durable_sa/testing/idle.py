"""A worker for tests that stops when it has nothing to do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Text, Uuid, cast, exists, func, null, or_, select, union_all
from typing_extensions import Unpack

from ..client import Durable
from ..models import Event, Message, Queue, Schedule, TaskRow, Wait
from ..options import WorkerOptions
from ..statements.expressions import array, clock, constant, interval
from ..statements.waits import COALESCING_SECONDS, for_messages
from ..validation import Duration, seconds

__all__ = ["run_until_idle"]

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.05
_SHOWN = 10

_queue_names = array("queue_names", Text())
_in_queues = TaskRow.queue_name == func.any(_queue_names)
_unfinished = TaskRow.finished_at.is_(None)
_paused = exists().where(Queue.queue_name == TaskRow.queue_name, Queue.paused_at.is_not(None))
_child = TaskRow.__table__.alias("child")

# A task that was woken while it has other waits becomes claimable after a delay, which counts as ready here.
_waits = select(func.count()).where(Wait.task_id == TaskRow.task_id).scalar_subquery()
_soon = clock() + interval(func.least(_waits * COALESCING_SECONDS, 1.0))

BUSY = union_all(
    select(TaskRow.task_id, TaskRow.task_name.label("name"), constant("running").label("what")).where(
        _unfinished, _in_queues, TaskRow.claimed_by.is_not(None)
    ),
    select(TaskRow.task_id, TaskRow.task_name, constant("ready")).where(
        _unfinished,
        _in_queues,
        TaskRow.claimed_by.is_(None),
        TaskRow.available_at <= _soon,
        TaskRow.task_name == func.any(array("task_names", Text())),
        ~_paused,
    ),
    select(TaskRow.task_id, TaskRow.task_name, constant("past its time limit")).where(
        _unfinished, _in_queues, TaskRow.cancel_at <= clock()
    ),
    select(Wait.task_id, Wait.name, constant("waiting for what has happened")).where(
        Wait.queue_name == func.any(_queue_names),
        exists().where(TaskRow.task_id == Wait.task_id, _unfinished),
        or_(
            exists().where(Event.queue_name == Wait.queue_name, Event.name == Wait.event_name),
            exists().where(_child.c.task_id == Wait.child_task_id, _child.c.finished_at.is_not(None)),
            for_messages(Wait.kind)
            & exists().where(
                Message.task_id == Wait.task_id, Message.topic == Wait.name, Message.received_at.is_(None)
            ),
        ),
    ),
    select(cast(null(), Uuid()), Event.name, constant("an undelivered event")).where(
        Event.queue_name == func.any(_queue_names), Event.delivered_at.is_(None)
    ),
    select(cast(null(), Uuid()), Schedule.name, constant("a schedule to fire")).where(
        Schedule.queue_name == func.any(_queue_names),
        Schedule.backend == constant("worker"),
        Schedule.paused_at.is_(None),
        Schedule.next_tick_at <= clock(),
    ),
)
"""The present work of workers that serve these queues and know these tasks."""


async def run_until_idle(
    durable: Durable[Any],
    queues: Sequence[str] | None = None,
    *,
    timeout: Duration = 30.0,
    **options: Unpack[WorkerOptions],
) -> None:
    """Run a worker until it has nothing to do: nothing can be claimed, nothing runs, all events are delivered.

    The worker serves these queues, by default all queues of the database. Tasks that sleep, wait for an event that was
    not emitted, or are due later remain. So do tasks in paused queues and in queues that the worker does not serve, and
    tasks that the client does not know. The options are those of
    :meth:`durable_sa.Durable.start_worker`, with a default `concurrency` of 10. Other workers may run at the same time;
    this waits for their runs in these queues, too.

    ```python
    from durable_sa import Durable, TaskContext, task
    from durable_sa.testing import run_until_idle


    @task
    async def square(ctx: TaskContext, number: int) -> int:
        return number * number


    @task
    async def sum_of_squares(ctx: TaskContext, numbers: list[int]) -> int:
        children = [await ctx.spawn(f"square {number}", square, number) for number in numbers]
        return sum([await ctx.join(child) for child in children])


    async def test_sum_of_squares(durable_database_url):
        async with Durable(durable_database_url, tasks=[square, sum_of_squares]) as durable:
            spawned = await durable.spawn(sum_of_squares, [1, 2, 3])
            await run_until_idle(durable)
            assert (await durable.get_task_result(spawned)).output == 14
    ```

    Raises:
        TimeoutError: there is still work after `timeout` seconds; the message lists it. Runs in progress are then
            released.
    """
    limit = seconds(timeout, "timeout")
    if queues is not None:
        options["queue_names"] = queues
    elif options.get("queue_names") is None and (existing := await durable.list_queues()):
        options["queue_names"] = existing
    chosen: WorkerOptions = {"concurrency": 10, "listen": False, "poll_interval": 0.02, **options}
    worker = await durable.start_worker(**chosen)
    deadline = asyncio.get_running_loop().time() + limit
    parameters = {"queue_names": list(worker.settings.queue_names), "task_names": list(durable.tasks)}
    pause = _FIRST_PAUSE
    try:
        if any(task.schedule is not None for task in durable.tasks.values()):
            # A schedule that is not stored yet may be due.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await worker.maintenance.looked.wait()
        while busy := await durable.database.execute(BUSY, parameters):
            if asyncio.get_running_loop().time() >= deadline:
                worker.release_now()
                raise TimeoutError(f"work remains after {limit:g} seconds: {_named(busy)}")
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.3)
    finally:
        await worker.shutdown()


def _named(rows: Sequence[Row[Any]]) -> str:
    shown = [
        f"{row.name!r} is {row.what}" if row.task_id is None else f"{row.name!r} (task {row.task_id}) is {row.what}"
        for row in rows[:_SHOWN]
    ]
    return "; ".join(shown) + (f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
