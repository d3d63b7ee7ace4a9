"""Counts of the ready tasks in a worker's queues, for the gauges of telemetry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ..database.channel import DedicatedConnection
from ..database_errors import FailureLog, is_transient
from ..statements import queues

SAMPLE_INTERVAL = 15.0
"""Seconds between counts of what is ready."""
SAMPLE_PAUSE_RATIO = 50
"""Least pause between counts, as a multiple of the last one's duration."""


class QueueSampler:
    """Counts the ready tasks of some queues."""

    def __init__(self, connection: DedicatedConnection, queue_names: Sequence[str]) -> None:
        self._connection = connection
        self._queue_names = queue_names
        self.latest: dict[str, tuple[float, float]] = {}
        """The number of ready tasks in each queue when last counted, and the age of the oldest in seconds."""

    async def run(self) -> None:
        """Count until cancelled."""
        failures = FailureLog("the count of the queues")
        while True:
            began = time.monotonic()
            try:
                rows = await self._connection.execute(queues.QUEUE_STATISTICS, {"queue_names": list(self._queue_names)})
                failures.succeeded()
                self.latest = {row.queue_name: (row.ready, row.oldest_ready_seconds or 0.0) for row in rows}
            except Exception as error:  # noqa: BLE001 - logged below
                if not is_transient(error):
                    failures.failed(error)
            await asyncio.sleep(max(SAMPLE_INTERVAL, SAMPLE_PAUSE_RATIO * (time.monotonic() - began)))
