"""The tasks that ended per minute, counted in the worker's memory and written every few seconds, for charts."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Final, NamedTuple

from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database_errors import FailureLog, is_transient
from ..statements import minutes
from .registration import Registration

WRITE_INTERVAL: Final = 10.0
"""Seconds between writes, which are lost with the worker at most."""
BATCH: Final = 1000
"""Counts in one write."""

_MINUTE: Final = 60.0
"""Seconds."""


class _Key(NamedTuple):
    minute: datetime
    worker_id: uuid.UUID
    queue_name: str
    task_name: str


class _Count:
    """The numbers of one task in one minute."""

    __slots__ = ("cancelled", "changed", "completed", "failed", "milliseconds", "slowest")

    def __init__(self) -> None:
        self.completed = self.failed = self.cancelled = 0
        self.milliseconds = self.slowest = 0.0
        self.changed = True


class Minutes:
    """Counts the tasks that this worker has seen end.

    A write has the totals of its minutes, not what was added, so that it can be repeated.
    """

    def __init__(self, connection: DedicatedConnection, registration: Registration, clock: LocalClock) -> None:
        self._connection = connection
        self._registration = registration
        self._clock = clock
        self._failures = FailureLog("the count of ended tasks")
        # The last write waits for the one that is in flight, which has taken counts and may fail.
        self._writing = asyncio.Lock()
        self._counts: dict[_Key, _Count] = {}
        self._current: dict[tuple[str, str], _Count] = {}
        self._minute = datetime.min.replace(tzinfo=UTC)
        self._worker_id = registration.worker_id

    def ended(self, queue_name: str, task_name: str, outcome: str, began: datetime | None = None) -> None:
        """Count a task that has completed, failed or been cancelled, with its run since `began`."""
        passed = self._clock.seconds_since(self._minute)
        if not 0.0 <= passed < _MINUTE or self._worker_id is not self._registration.worker_id:
            passed = self._turn()
        count = self._current.get((queue_name, task_name))
        if count is None:
            count = self._begin(queue_name, task_name)
        if outcome == "completed":
            count.completed += 1
        elif outcome == "failed":
            count.failed += 1
        else:
            count.cancelled += 1
        if began is not None:
            milliseconds = 1000.0 * (passed - (began - self._minute).total_seconds())
            if milliseconds > 0.0:
                count.milliseconds += milliseconds
                if milliseconds > count.slowest:
                    count.slowest = milliseconds
        count.changed = True

    def _turn(self) -> float:
        """Begin a minute, and return the seconds of it that have passed."""
        self._minute = self._clock.now().replace(second=0, microsecond=0)
        self._worker_id = self._registration.worker_id
        self._current = {}
        return self._clock.seconds_since(self._minute)

    def _begin(self, queue_name: str, task_name: str) -> _Count:
        key = _Key(self._minute, self._worker_id, queue_name, task_name)
        count = self._current[queue_name, task_name] = self._counts.setdefault(key, _Count())
        return count

    async def run(self) -> None:
        """Write every few seconds until cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL)
            await self.try_to_write()

    async def try_to_write(self) -> None:
        """Write what has changed. What the database does not take is written the next time."""
        try:
            async with self._writing:
                if await self._write():
                    self._failures.succeeded()
        except Exception as error:  # noqa: BLE001 - logged below; tasks go on without charts
            if not is_transient(error):
                self._failures.failed(error)

    async def _write(self) -> bool:
        """Write what has changed, and forget the minutes that are over. Return False if nothing has."""
        changed = [(key, count) for key, count in self._counts.items() if count.changed]
        for first in range(0, len(changed), BATCH):
            batch = changed[first : first + BATCH]
            for _, count in batch:
                # Before the write, because what is counted meanwhile is to be written once more.
                count.changed = False
            try:
                await self._connection.execute(minutes.WRITE, _parameters(batch))
            except BaseException:
                for _, count in batch:
                    count.changed = True
                raise
        over = [key for key, count in self._counts.items() if not count.changed and key.minute != self._minute]
        for key in over:
            del self._counts[key]
        return bool(changed)


def _parameters(batch: list[tuple[_Key, _Count]]) -> dict[str, list[object]]:
    return {
        "queue_names": [key.queue_name for key, _ in batch],
        "minutes": [key.minute for key, _ in batch],
        "task_names": [key.task_name for key, _ in batch],
        "worker_ids": [key.worker_id for key, _ in batch],
        "completed": [count.completed for _, count in batch],
        "failed": [count.failed for _, count in batch],
        "cancelled": [count.cancelled for _, count in batch],
        "milliseconds": [round(count.milliseconds) for _, count in batch],
        "slowest": [round(count.slowest) for _, count in batch],
    }
