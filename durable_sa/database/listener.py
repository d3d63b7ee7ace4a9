"""LISTEN in the worker: on a connection of its own, replaced when it is lost, and probed with a NOTIFY."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ..concurrency.blocking import retrieve_exception
from ..database_errors import backoff, reason
from ..statements.notifying import NOTIFY
from .closing import CLOSING_TIMEOUT, connected, discard, dispose
from .connections import Database, HeldConnection
from .engines import direct_engine
from .hint import channel_name

logger = logging.getLogger("durable_sa")

ARRIVAL_DEADLINE = 5.0
"""Seconds after which a probe is taken for lost."""
CONNECT_DEADLINE = 30.0
"""Seconds after which a new connection, or the first statements on it, are taken for dead."""
CHECK_INTERVAL = 30.0
"""Seconds between probes."""
LONGEST_PAUSE = 15.0
"""Seconds between tries to connect, at most."""
UNDELIVERED_PAUSE = 60.0
"""Seconds until the next try if LISTEN has no effect."""
EVERYTHING = ""
"""In place of a payload: hints may have been missed, so everything may be due."""


class Listener:
    """Listens for a worker's hints, which are sent over the database's engine; `url` may be a more direct way to it."""

    def __init__(self, database: Database, url: str | URL | None, on_payload: Callable[[str], None]) -> None:
        self._database = database
        self._url = url
        self._channel = channel_name(database.schema)
        self._on_payload = on_payload
        self.working = False
        """True while hints arrive; the worker polls more often otherwise."""
        self._warned = False

    async def run(self) -> None:
        """Listen until cancelled."""
        failures, pause = 0, 0.0
        while True:
            engine = self._database.private() if self._url is None else direct_engine(self._url)
            try:
                async with asyncio.timeout(CONNECT_DEADLINE):
                    connection = await connected(engine.execution_options(isolation_level="AUTOCOMMIT").connect())
                try:
                    await self._listen(connection)
                finally:
                    await discard(connection)
            except _NotDelivered:
                self._warn(
                    "LISTEN has no effect here (a connection pooler in transaction mode?): polling instead; "
                    "give the worker a listen_url that leads around it"
                    if self._url is None
                    else "notifications do not arrive over listen_url (another database?): polling instead"
                )
                pause = UNDELIVERED_PAUSE
            except Exception as error:  # noqa: BLE001 - the worker polls without it
                self._warn(f"LISTEN is interrupted ({reason(error)}): polling until it works again")
                failures = 0 if self.working else failures + 1
                pause = backoff(failures, base=1.0, most=LONGEST_PAUSE)
            finally:
                worked, self.working = self.working, False
                await asyncio.shield(dispose(engine))
            if worked:
                # Hints may have been lost since, and the worker has to poll from now on.
                self._on_payload(EVERYTHING)
            await asyncio.sleep(pause)

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
            self._warned = True

    async def _listen(self, connection: AsyncConnection) -> NoReturn:
        """Listen until the connection is lost."""
        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection
        arrived = asyncio.Event()
        lost = asyncio.Event()
        probe = f"probe:{id(self)}:{time.monotonic_ns()}"

        def receive(payload: str) -> None:
            if payload == probe:
                arrived.set()
            elif not payload.startswith("probe:"):
                self._on_payload(payload)

        def lose(_: Any) -> None:
            lost.set()
            arrived.set()  # A lost connection does not bring the probe.

        reading: asyncio.Task[None] | None = None
        if hasattr(driver, "add_listener"):
            await self._subscribe_asyncpg(driver, receive, lose)
        else:
            reading = await self._subscribe_psycopg(driver, receive, lose)
        try:
            await self._probe(probe)
            try:
                async with asyncio.timeout(ARRIVAL_DEADLINE):
                    await arrived.wait()
            except TimeoutError:
                raise _NotDelivered from None
            if not lost.is_set():
                self.working = True
                self._warned = False
                self._on_payload(EVERYTHING)
            while not lost.is_set():
                try:
                    async with asyncio.timeout(CHECK_INTERVAL):
                        await lost.wait()
                except TimeoutError:
                    if reading is None:
                        async with asyncio.timeout(ARRIVAL_DEADLINE):
                            await driver.fetchval("SELECT 1")
                    else:
                        arrived.clear()
                        await self._probe(probe)
                        async with asyncio.timeout(ARRIVAL_DEADLINE):
                            await arrived.wait()
            raise ConnectionError("the connection was closed")
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.wait([reading], timeout=CLOSING_TIMEOUT)

    async def _subscribe_asyncpg(
        self, driver: Any, receive: Callable[[str], None], lose: Callable[[Any], None]
    ) -> None:
        def received(_: Any, __: int, ___: str, payload: Any) -> None:
            receive(str(payload))

        driver.add_termination_listener(lose)
        # asyncpg prepares the statement, and a pooler keeps both parts together in a transaction only.
        transaction: AbstractAsyncContextManager[Any] = driver.transaction()
        async with asyncio.timeout(CONNECT_DEADLINE):
            async with transaction:
                await driver.add_listener(self._channel, received)
            # pg_stat_activity shows the latest statement: with this one, what the connection is for.
            await driver.execute(f'LISTEN "{self._channel}"')

    async def _subscribe_psycopg(
        self, driver: Any, receive: Callable[[str], None], lose: Callable[[Any], None]
    ) -> asyncio.Task[None]:
        """Return a task that reads the notifications until the connection is lost."""
        async with asyncio.timeout(CONNECT_DEADLINE):
            await driver.execute(f'LISTEN "{self._channel}"')

        async def read() -> None:
            async for notification in driver.notifies():
                receive(notification.payload)

        def ended(done: asyncio.Task[None]) -> None:
            retrieve_exception(done)
            lose(done)

        reading = asyncio.create_task(read(), name="durable:notifies")
        reading.add_done_callback(ended)
        return reading

    async def _probe(self, payload: str) -> None:
        """Send a probe to this listener as hints are sent, but not over the application's connections."""

        async def send() -> None:
            engine: AsyncEngine = self._database.private()
            try:
                async with asyncio.timeout(CONNECT_DEADLINE), HeldConnection(Database(engine)) as held:
                    await held.execute(NOTIFY, {"channel": self._channel, "payload": payload})
            finally:
                await dispose(engine)

        # Cancelled in the middle of opening or closing, a driver would leave its connection open.
        sending = asyncio.ensure_future(send())
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait([sending], timeout=CLOSING_TIMEOUT)
            raise


class _NotDelivered(Exception):  # noqa: N818
    """The probe did not arrive."""
