"""How many tasks are ready in a worker's queues, counted now and then for the gauges."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ..database.channel import DedicatedConnection
from ..database_errors import is_transient, without_values
from ..statements import queues

logger = logging.getLogger("durable_sa")

SAMPLE_INTERVAL = 15.0
"""Seconds between counts of what is ready."""
SAMPLE_SHARE = 50
"""And at least so many times as long as the last count took."""


class QueueSampler:
    """Counts what is ready in some queues."""

    def __init__(self, channel: DedicatedConnection, queue_names: Sequence[str]) -> None:
        self._channel = channel
        self._queue_names = queue_names
        self.latest: dict[str, tuple[float, float]] = {}
        """How many tasks were ready in each queue when they were last counted, and the age of the oldest."""

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            began = time.monotonic()
            try:
                rows = await self._channel.execute(queues.QUEUE_STATISTICS, {"queue_names": list(self._queue_names)})
                self.latest = {row.queue_name: (row.ready, row.oldest_ready_seconds or 0.0) for row in rows}
            except Exception as error:
                if not is_transient(error):
                    logger.error("counting the queues failed", exc_info=without_values(error))
            await asyncio.sleep(max(SAMPLE_INTERVAL, SAMPLE_SHARE * (time.monotonic() - began)))
