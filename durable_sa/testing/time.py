"""Time travel for tests: the database's clock, as durable's statements see it, can be moved forward.

```python
from datetime import timedelta

from durable_sa import Durable, TaskContext, TaskStatus, task
from durable_sa.testing import run_until_idle, time_travel


@task
async def remind(ctx: TaskContext, name: str) -> str:
    await ctx.sleep_for("a week", timedelta(days=7))
    return f"{name}, your trial ends"


async def test_reminder(durable_database_url):
    async with Durable(durable_database_url, tasks=[remind]) as durable:
        spawned = await durable.spawn(remind, "Ada")
        await run_until_idle(durable)
        assert (await durable.get_task_result(spawned)).status is TaskStatus.SLEEPING
        async with time_travel(durable) as clock:
            await clock.advance(timedelta(days=7))
            await run_until_idle(durable)
        assert (await durable.get_task_result(spawned)).output == "Ada, your trial ends"
```
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine, Float, Uuid, bindparam, event, func, update

from ..client import Durable
from ..errors import InvalidConfiguration, InvalidState
from ..models import WorkerRow
from ..statements.expressions import array, clock, interval
from ..statements.scheduling import DATABASE_TIME
from ..validation import Duration, seconds, timestamp
from ..worker.worker import Worker

__all__ = ["Clock", "time_travel"]

_TIMES: Final = ("pg_catalog.clock_timestamp()", "pg_catalog.now()")
"""The expressions for the time in durable's statements; with the schema, other statements do not write it."""

_LEASE: Final = 100 * timedelta(days=365)
"""The lease of the client's own workers while time travels."""

_claim_timeout = interval(bindparam("claim_timeout", type_=Float(53)))
_HOLD = (
    update(WorkerRow)
    .where(WorkerRow.worker_id == func.any(array("worker_ids", Uuid())), WorkerRow.lost_at.is_(None))
    .values(claim_timeout=_claim_timeout, expires_at=clock() + _claim_timeout)
)
"""Extend the leases of these workers to `claim_timeout` seconds from now, and from each later heartbeat."""


class Clock:
    """The database's clock as durable's statements see it, created by `time_travel`. It keeps running between moves."""

    def __init__(self, durable: Durable[Any]) -> None:
        self._durable = durable
        self._offset = timedelta()

    async def now(self) -> datetime:
        """Return the time of this clock."""
        rows = await self._durable.database.execute(DATABASE_TIME)
        moment: datetime = rows[0].now
        return moment

    async def advance(self, duration: Duration) -> None:
        """Move the clock forward, by seconds or a `timedelta`.

        Sleeps, timeouts, retries, limits and schedules up to the new time are due when this returns, and running
        workers of the client look for them at once. A sleep begins with the call of `sleep_for`, so let the task get
        there first: by `run_until_idle`, or by waiting for its status.
        """
        await self._move(timedelta(seconds=seconds(duration, "duration")))

    async def move_to(self, when: datetime) -> None:
        """Move the clock forward to a timezone-aware time.

        Raises:
            InvalidConfiguration: the time has passed.
        """
        moment = timestamp(when, "when")
        now = await self.now()
        if moment < now:
            raise InvalidConfiguration(
                "when", f"{moment.isoformat()} has passed, it is {now.isoformat()}", "The clock goes forward only."
            )
        await self._move(moment - now)

    async def _move(self, by: timedelta) -> None:
        # The leases of these workers must not expire, because the workers are alive. They are extended before and after
        # the move, because a heartbeat in flight still uses the earlier time, and a search for lost workers the later.
        await self._hold(self._durable.workers, _LEASE + by)
        self._offset += by
        await self._hold(self._durable.workers, _LEASE)
        await self._notify_workers(by)

    async def _return(self) -> None:
        workers = self._durable.workers
        await self._notify_workers(-self._offset)
        # A search for lost workers that is in flight still uses the later time.
        await asyncio.gather(*(worker.answered() for worker in workers))
        for worker in workers:
            await self._hold({worker}, timedelta(seconds=worker.settings.claim_timeout))

    async def _hold(self, workers: AbstractSet[Worker], time: timedelta) -> None:
        if workers:
            worker_ids = [worker.worker_id for worker in workers]
            parameters = {"worker_ids": worker_ids, "claim_timeout": time.total_seconds()}
            await self._durable.database.execute(_HOLD, parameters)

    async def _notify_workers(self, by: timedelta) -> None:
        now = await self.now()
        for worker in self._durable.workers:
            worker.clock_moved(now, by)

    def _rewrite(
        self, connection: object, cursor: object, statement: str, parameters: Any, context: object, many: bool
    ) -> tuple[str, Any]:
        if self._offset and "pg_catalog." in statement:
            # Of one unit alone, PostgreSQL 14 takes no more than 2,147,483,647. Days would depend on the time zone.
            hours, rest = divmod(self._offset, timedelta(hours=1))
            offset = f"{hours} hours {rest.seconds}.{rest.microseconds:06} seconds"
            for time in _TIMES:
                statement = statement.replace(time, f"({time} + interval '{offset}')")
        return statement, parameters

    @asynccontextmanager
    async def in_use(self) -> AsyncGenerator[None]:
        """Use this clock in all engines of this process, including those that workers create."""
        event.listen(Engine, "before_cursor_execute", self._rewrite, retval=True)
        try:
            yield
        finally:
            event.remove(Engine, "before_cursor_execute", self._rewrite)
            if self._offset:
                await self._return()


_in_use: list[Clock] = []


@asynccontextmanager
async def time_travel(durable: Durable[Any]) -> AsyncGenerator[Clock]:
    """Provide a clock that moves the database's time forward within the block, by `advance` and `move_to`.

    The clock moves the time in durable's own statements that this process sends: those of clients, of sessions passed
    to `spawn_with`, and of workers started before or in the block. It does not move the time of the database itself, of
    other connections and other statements, nor the timeouts of steps, which use the local clock. Leases of workers in
    other processes expire by the moved clock; those of the client's own workers are kept during the block.

    After the block the time is the real one. Times written in the block stay as they are, and may be in the future.

    Raises:
        InvalidState: another block is entered in this process.
    """
    if _in_use:
        raise InvalidState("`time_travel()`", "already in use in this process", "Leave the other block first.")
    travelling = Clock(durable)
    _in_use.append(travelling)
    try:
        async with travelling.in_use():
            yield travelling
    finally:
        _in_use.remove(travelling)
