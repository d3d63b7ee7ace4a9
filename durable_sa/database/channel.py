"""Connections that a worker dedicates to one kind of work each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ..database_errors import is_conflict, is_read_only, retrying
from ..statements.expressions import INTROSPECT_TYPES, NO_ARRAYS
from .closing import CLOSING_TIMEOUT, discard, dispose, driver_of, give_back, tear_down
from .connections import Database

T = TypeVar("T")

logger = logging.getLogger("durable_sa")

STATEMENT_DEADLINE = 30.0
"""Seconds of a statement after which its connection is taken for dead."""
POOL_PATIENCE = 5.0
"""Seconds to wait for a connection of the application's pool before one is made beside it."""
RECONNECTIONS = 5
"""Number of times that a call is made which loses its connection each time: within a second."""


async def reconnecting(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call that may be repeated, and retry it if its connection was lost: servers end those that idle for long.

    Retries are few: if the server stays down, the caller gets the error.
    """
    return await retrying(call, tries=RECONNECTIONS, when=lambda error: is_conflict(error) and not is_read_only(error))


class Executing(Protocol):
    """A database or a connection that executes one statement as a transaction."""

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Execute a statement."""
        ...


class DedicatedConnection:
    """A connection that is kept for one kind of work, and executes one statement at a time.

    After an error of the connection, or a cancellation, SQLAlchemy would reconnect without autocommit, and what is
    then executed would never commit: so the connection is discarded, and the next statement gets another.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: AsyncConnection | None = None
        self._own: AsyncEngine | None = None
        """The engine of a connection that did not come from the application's pool."""
        self._lock = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """True if a statement is in flight."""
        return self._lock.locked()

    async def answered(self) -> None:
        """Wait until all statements so far have been answered."""
        async with self._lock:
            pass

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Execute a statement as a transaction of its own."""
        async with self._lock:
            try:
                async with asyncio.timeout(STATEMENT_DEADLINE):
                    if self._connection is None:
                        self._connection = await self._connect()
                    return await self._database.execute_on(self._connection, statement, parameters)
            except BaseException:
                connection, self._connection = self._connection, None
                if connection is not None:
                    await discard(connection)
                await self._dispose()
                raise

    async def _connect(self) -> AsyncConnection:
        """Take a connection of the pool, or make one beside it if the pool has none left.

        The connections may be taken by runs that wait for what is to be written on this one.
        """
        try:
            async with asyncio.timeout(POOL_PATIENCE):
                return await self._database.connect()
        except (PoolTimeout, TimeoutError):
            logger.warning("the pool has no connection left for the worker, which makes its own")
        self._own = self._database.private()
        return await Database(self._own, self._database.schema).connect()

    async def _dispose(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            await dispose(own)

    async def connect(self) -> None:
        """Take a connection from the pool before the next statement needs it."""
        async with self._lock:
            if self._connection is None:
                self._connection = await self._database.connect()

    async def open(self) -> None:
        """Take a connection from the pool before the first statement needs it, and let the driver look up its types."""
        await self.connect()
        await self.execute(INTROSPECT_TYPES, NO_ARRAYS)

    def tear_down(self) -> None:
        """Have the statement in flight fail, whose connection may never answer it."""
        if self.busy and self._connection is not None:
            tear_down(driver_of(self._connection))

    async def close(self) -> None:
        """Return the connection to the pool once the statement in flight has been answered, or does not answer."""
        try:
            async with asyncio.timeout(CLOSING_TIMEOUT):
                await self.answered()
        except TimeoutError:
            self.tear_down()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_TIMEOUT):
                await self.answered()
        connection, self._connection = self._connection, None
        if connection is not None:
            await give_back(connection)
        await self._dispose()
