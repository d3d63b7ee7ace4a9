"""The lease of a worker, and the heartbeat that renews it while the event loop turns.

The heartbeat has a thread of its own, so that a step that blocks the event loop for a while cannot delay it. If the
thread is late, because it needs a dozen round trips for a new connection, the event loop sends one heartbeat itself:
see `Registration`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from sqlalchemy.exc import SQLAlchemyError

from ..concurrency.threads import LoopThread
from ..database.channel import DedicatedConnection
from ..database.closing import dispose
from ..database.connections import Database
from ..database_errors import FailureLog, Outage
from ..statements import claiming

logger = logging.getLogger("durable_sa")

BEATS_PER_LEASE = 3
OVERDUE_SHARE = 0.6
"""The share of a lease that is left when the next heartbeat is overdue."""
CONNECT_TIMEOUT = 15.0
"""Seconds that a new connection may take: a dozen round trips, while a heartbeat takes one."""

TAKEN_OVER = "another worker has taken over the runs of this one"


def end_process(reason: str) -> NoReturn:
    """End the process at once, because code in one of its threads may run a task that another worker runs, too."""
    logger.critical("%s; ending the process", reason)
    logging.shutdown()
    os._exit(1)


class Lease:
    """The time until which the worker may run tasks, by the local clock: counted from before a heartbeat was sent."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.valid_until = 0.0
        self.turned_at = time.monotonic()

    @property
    def valid(self) -> bool:
        """True while no other worker can have taken over."""
        return time.monotonic() < self.valid_until

    @property
    def heartbeat_overdue(self) -> bool:
        """True if a heartbeat is overdue, perhaps because its thread connects over a slow network."""
        return self.valid_until - time.monotonic() < self.seconds * OVERDUE_SHARE

    @property
    def age(self) -> float | None:
        """Seconds since the heartbeat was sent that has renewed the lease; None if the lease has ended."""
        valid_until, now = self.valid_until, time.monotonic()
        return now - valid_until + self.seconds if now < valid_until else None

    def renewed(self, sent_at: float) -> None:
        """Extend the lease: a heartbeat that was sent at `sent_at` has been committed."""
        self.valid_until = max(self.valid_until, sent_at + self.seconds)


class Heartbeat:
    """Renews the lease of one registration, until it is stopped or finds the worker declared lost."""

    def __init__(
        self,
        database: Database,
        worker_id: uuid.UUID,
        lease: Lease,
        *,
        fatal: bool,
        on_lost: Callable[[], None],
        outage: Outage | None = None,
        watch: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Make a heartbeat, whose thread executes `watch` as well."""
        self._database = database
        self._watch = watch
        self._worker_id = worker_id
        self._lease = lease
        self._fatal = fatal
        self._on_lost = on_lost
        self._outage = outage
        self._loop = asyncio.get_running_loop()
        self._thread = LoopThread("durable-heartbeat", self._renew, _log_failure)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Stop the thread, and wait up to 5 seconds for its end."""
        await self._thread.stop(5.0)

    async def _renew(self, stop: asyncio.Event) -> None:
        engine = self._database.private()
        connection = DedicatedConnection(Database(engine, self._database.schema))
        interval = self._lease.seconds / BEATS_PER_LEASE
        timeout = min(2 * interval, 10.0)
        began = time.monotonic()
        failures = FailureLog("heartbeat", self._outage)
        watching = None if self._watch is None else asyncio.create_task(self._watch())
        try:
            if self._lease.seconds < 2 * CONNECT_TIMEOUT:
                # With a longer lease there is time to connect when the first heartbeat is due.
                with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
                    async with asyncio.timeout(CONNECT_TIMEOUT):
                        await connection.connect()
            pause = max(0.0, interval - (time.monotonic() - began))
            while not self._loop.is_closed():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await stop.wait()
                        return
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT):
                        await connection.connect()
                    sent_at = time.monotonic()
                    stuck = sent_at - self._lease.turned_at > self._lease.seconds
                    async with asyncio.timeout(timeout):
                        statement = claiming.LEASE_STATUS if stuck else claiming.HEARTBEAT
                        rows = await connection.execute(statement, {"beating_id": self._worker_id})
                except Exception as error:  # noqa: BLE001 - a driver may raise errors of any class; the lease goes on
                    failures.failed(error)
                    pause = min(1.0, interval / 4)
                    continue
                pause = interval
                failures.succeeded()
                if not rows:
                    self._lost()
                    return
                if not stuck:
                    self._lease.renewed(sent_at)
        finally:
            if watching is not None:
                watching.cancel()
            await connection.close()
            await dispose(engine)

    def _lost(self) -> None:
        if self._thread.stopping:
            # The worker has noticed the loss by its own clock, and may have registered anew.
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
