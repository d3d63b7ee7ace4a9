"""The worker's sign of life, sent from a thread so that no step can hold it up, as long as the event loop turns.

When the thread is late, which needs a dozen round trips where its connection was lost, the event loop sends one beside
it: see `durable_sa.registration`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from typing import NoReturn

from sqlalchemy.exc import SQLAlchemyError

from ..concurrency.threads import LoopThread
from ..database.channel import DedicatedConnection
from ..database.connections import Database
from ..database_errors import is_transient, reason, without_values
from ..statements import claiming

logger = logging.getLogger("durable_sa")

BEATS_PER_LEASE = 3
LATE = 0.6
"""The share of a lease that is left when a heartbeat is overdue."""
CONNECT_DEADLINE = 15.0
"""Seconds that a new connection may take: a dozen round trips, where a heartbeat is one."""


TAKEN_OVER = "another worker has taken this one's runs over"


def end_process(reason: str) -> NoReturn:
    """End it at once: others run what code here, in whatever thread, may still be in the middle of."""
    logger.critical("%s; ending the process", reason)
    logging.shutdown()
    os._exit(1)


class Lease:
    """How long the worker may go on by the local clock: counted from before a heartbeat was sent, so never too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.valid_until = 0.0
        self.turned_at = time.monotonic()

    @property
    def valid(self) -> bool:
        """Whether nobody can have taken over yet."""
        return time.monotonic() < self.valid_until

    @property
    def late(self) -> bool:
        """Whether a heartbeat is overdue: its thread may be busy with a new connection, over a slow network."""
        return self.valid_until - time.monotonic() < self.seconds * LATE

    @property
    def age(self) -> float | None:
        """Seconds since the heartbeat that it stands on was sent; None if it is over."""
        valid_until, now = self.valid_until, time.monotonic()
        return now - valid_until + self.seconds if now < valid_until else None

    def renewed(self, sent_at: float) -> None:
        """A heartbeat that was sent at `sent_at` has been committed."""
        self.valid_until = max(self.valid_until, sent_at + self.seconds)


class Heartbeat:
    """Beats for one worker start until it is stopped or finds the worker lost."""

    def __init__(
        self, database: Database, worker_id: uuid.UUID, lease: Lease, *, fatal: bool, on_lost: Callable[[], None]
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._lease = lease
        self._fatal = fatal
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._thread = LoopThread("durable-heartbeat", self._beat, _log_failure)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Stop the thread, and wait a moment for it."""
        await self._thread.stop(5.0)

    async def _beat(self, stop: asyncio.Event) -> None:
        engine = self._database.private()
        channel = DedicatedConnection(Database(engine, self._database.schema))
        interval = self._lease.seconds / BEATS_PER_LEASE
        deadline = min(2 * interval, 10.0)
        began = time.monotonic()
        try:
            if self._lease.seconds < 2 * CONNECT_DEADLINE:
                # What there is time for later with a longer one.
                with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
                    async with asyncio.timeout(CONNECT_DEADLINE):
                        await channel.connect()
            pause = max(0.0, interval - (time.monotonic() - began))
            while not self._loop.is_closed():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await stop.wait()
                        return
                try:
                    async with asyncio.timeout(CONNECT_DEADLINE):
                        await channel.connect()
                    sent_at = time.monotonic()
                    stuck = sent_at - self._lease.turned_at > self._lease.seconds
                    async with asyncio.timeout(deadline):
                        statement = claiming.STILL_HELD if stuck else claiming.HEARTBEAT
                        rows = await channel.execute(statement, {"beating_id": self._worker_id})
                except (SQLAlchemyError, OSError, TimeoutError) as error:
                    if is_transient(error):
                        logger.warning("a heartbeat failed: %s", reason(error))
                    else:
                        logger.error("a heartbeat failed", exc_info=without_values(error))
                    pause = min(1.0, interval / 4)
                    continue
                pause = interval
                if not rows:
                    self._lost()
                    return
                if not stuck:
                    self._lease.renewed(sent_at)
        finally:
            await channel.close()
            await engine.dispose()

    def _lost(self) -> None:
        if self._thread.stopping:
            # The worker has noticed by itself, and may be back under another id.
            return
        if self._fatal:
            end_process(TAKEN_OVER)
        self._lease.valid_until = 0.0
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_lost)


def _log_failure(error: Exception) -> None:
    logger.error(
        "the thread of the heartbeat has ended; a step that blocks the event loop may cost the lease", exc_info=error
    )
