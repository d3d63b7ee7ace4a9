"""Counts of the ready tasks and limit keys of a worker's queues, for the gauges of telemetry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ..database.channel import DedicatedConnection
from ..database_errors import FailureLog, is_transient
from ..statements import limiting, queues

SAMPLE_INTERVAL = 15.0
"""Seconds between counts of what is ready."""
SAMPLE_PAUSE_RATIO = 50
"""Least pause between counts, as a multiple of the last one's duration."""


class QueueSampler:
    """Counts the ready tasks and the limit keys of some queues."""

    def __init__(self, connection: DedicatedConnection, queue_names: Sequence[str]) -> None:
        self._connection = connection
        self._queue_names = queue_names
        self.latest: dict[str, tuple[float, float]] = {}
        """The number of ready tasks in each queue when last counted, and the age of the oldest in seconds."""
        self.limit_keys: dict[tuple[str, str], int] = {}
        """The number of limit keys of each queue and state when last counted."""

    async def run(self) -> None:
        """Count until cancelled."""
        failures = FailureLog("the count of the queues")
        while True:
            began = time.monotonic()
            try:
                rows = await self._connection.execute(queues.QUEUE_STATISTICS, {"queue_names": list(self._queue_names)})
                self.latest = {row.queue_name: (row.ready, row.oldest_ready_seconds or 0.0) for row in rows}
                if limited := [row.queue_name for row in rows if row.limited]:
                    keys = await self._connection.execute(limiting.COUNT_KEYS, {"queue_names": limited})
                    counted = {(row.queue_name, row.state): row.keys for row in keys}
                    # A state that no key is in any more counts 0.
                    self.limit_keys = {**dict.fromkeys(self.limit_keys, 0), **counted}
                failures.succeeded()
            except Exception as error:  # noqa: BLE001 - logged below
                if not is_transient(error):
                    failures.failed(error)
            await asyncio.sleep(max(SAMPLE_INTERVAL, SAMPLE_PAUSE_RATIO * (time.monotonic() - began)))
