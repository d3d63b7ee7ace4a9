"""A clock for tests: the database's, as durable's statements see it, moved forward at will.

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

from sqlalchemy import Engine, Float, Uuid, bindparam, event, func, select, update

from ..client import Durable
from ..errors import InvalidConfiguration, InvalidState
from ..models import WorkerRow
from ..statements.expressions import array, clock, interval
from ..validation import Duration, seconds, timestamp
from ..worker.worker import Worker

__all__ = ["Clock", "time_travel"]

_TIMES: Final = ("pg_catalog.clock_timestamp()", "pg_catalog.now()")
"""How durable's statements write the time. Nothing else in an application writes it so."""

_NOW = select(clock())

_HELD: Final = 100 * timedelta(days=365)
"""How long the leases of workers hold while the time moves."""

_claim_timeout = interval(bindparam("claim_timeout", type_=Float(53)))
_HOLD = (
    update(WorkerRow)
    .where(WorkerRow.worker_id == func.any(array("worker_ids", Uuid())), WorkerRow.lost_at.is_(None))
    .values(claim_timeout=_claim_timeout, expires_at=clock() + _claim_timeout)
)
"""Let the leases of these workers hold for so many seconds, from now on, and again from each of their heartbeats on."""


class Clock:
    """The database's clock as durable's statements see it. Made by `time_travel`. It also runs on by itself."""

    def __init__(self, durable: Durable[Any]) -> None:
        self._durable = durable
        self._offset = timedelta()

    async def now(self) -> datetime:
        """The time."""
        rows = await self._durable.database.execute(_NOW)
        moment: datetime = rows[0][0]
        return moment

    async def advance(self, duration: Duration) -> None:
        """Move the clock forward, by seconds or a `timedelta`.

        Sleeps, timeouts, retries, limits and schedules that are due by then are due when this returns; running workers
        of the client look at once. A task counts as asleep from its call of `sleep_for` on, so let it come that far
        before: by `run_until_idle`, or by waiting for its status.
        """
        await self._move(timedelta(seconds=seconds(duration, "duration")))

    async def move_to(self, when: datetime) -> None:
        """Move the clock forward to a time, which is timezone-aware.

        Raises:
            InvalidConfiguration: it has passed.
        """
        moment = timestamp(when, "when")
        now = await self.now()
        if moment < now:
            raise InvalidConfiguration(
                "when", f"{moment.isoformat()} has passed, it is {now.isoformat()}", "The clock goes forward only."
            )
        await self._move(moment - now)

    async def _move(self, by: timedelta) -> None:
        # Nobody may find the leases of these workers over, as they are alive; but a beat that is on its way still goes
        # by the earlier time when a search for lost workers goes by the later already.
        await self._hold(self._durable.workers, _HELD + by)
        self._offset += by
        await self._hold(self._durable.workers, _HELD)
        self._tell(by)

    async def _return(self) -> None:
        workers = self._durable.workers
        self._tell(-self._offset)
        # A search that is on its way goes by the later time still.
        await asyncio.gather(*(worker.answered() for worker in workers))
        for worker in workers:
            await self._hold({worker}, timedelta(seconds=worker.settings.claim_timeout))

    async def _hold(self, workers: AbstractSet[Worker], time: timedelta) -> None:
        if workers:
            worker_ids = [worker.worker_id for worker in workers]
            parameters = {"worker_ids": worker_ids, "claim_timeout": time.total_seconds()}
            await self._durable.database.execute(_HOLD, parameters)

    def _tell(self, by: timedelta) -> None:
        for worker in self._durable.workers:
            worker.clock_moved(by)

    def _rewrite(
        self, connection: object, cursor: object, statement: str, parameters: Any, context: object, many: bool
    ) -> tuple[str, Any]:
        if self._offset and "pg_catalog." in statement:
            microseconds = self._offset // timedelta(microseconds=1)
            for time in _TIMES:
                statement = statement.replace(time, f"({time} + interval '{microseconds} microseconds')")
        return statement, parameters

    @asynccontextmanager
    async def in_use(self) -> AsyncGenerator[None]:
        """Have all engines of this process, also those that workers make for themselves, go by this clock."""
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
    """Within the block, the database's clock goes forward when it is told to: by `advance` and `move_to`.

    What moves is the time in durable's own statements, sent from this process: those of clients, of sessions that are
    passed to `spawn_with`, and of workers, started before or in the block. The database's settings, other connections
    and other statements do not notice. Neither do timeouts of steps, which are counted by the local clock, nor workers
    in other processes: their leases end by the clock as all others do. Those of the client's own workers, which are
    alive, hold for as long as the block lasts.

    After the block it is as late as it was. What was written in the block keeps its times, which may be ahead by then.

    Raises:
        InvalidState: another block is entered in this process.
    """
    if _in_use:
        raise InvalidState("`time_travel()`", "in use already, and there is one clock only", "Leave the first block.")
    travelling = Clock(durable)
    _in_use.append(travelling)
    try:
        async with travelling.in_use():
            yield travelling
    finally:
        _in_use.remove(travelling)
