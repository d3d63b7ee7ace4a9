"""Connections kept for one kind of work each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ..database_errors import backoff, is_conflict, is_read_only
from ..statements.expressions import INTROSPECT_TYPES, NO_ARRAYS
from .connections import Database
from .loans import discard

T = TypeVar("T")

logger = logging.getLogger("durable_sa")

STATEMENT_DEADLINE = 30.0
"""Seconds after which a statement's connection is taken for dead."""
POOL_PATIENCE = 5.0
"""Seconds that a lost connection's successor is waited for in the application's pool."""


RECONNECTIONS = 5
"""How often a call is made that loses its connection each time: for less than a second."""


async def reconnecting(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call that may be repeated, again if its connection was lost: a server ends those that are idle for long.

    Not often, as for one that stays away: then whoever calls is to hear of it.
    """
    for attempt in range(RECONNECTIONS):
        try:
            return await call()
        except SQLAlchemyError as error:
            if attempt + 1 == RECONNECTIONS or is_read_only(error) or not is_conflict(error):
                raise
            await asyncio.sleep(backoff(attempt))
    raise AssertionError("unreachable")


class Executing(Protocol):
    """Something that runs one statement as a transaction: a database, a channel."""

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run a statement."""
        ...


class DedicatedConnection:
    """One connection kept for one kind of work, with statements in sequence.

    After an error of the connection, or a cancellation, SQLAlchemy would reconnect without autocommit, and what is
    then executed never commits: so it is given up, and the next statement gets another.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: AsyncConnection | None = None
        self._own: AsyncEngine | None = None
        """Of a connection that the application's pool has not given."""
        self._lock = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether a statement is on its way."""
        return self._lock.locked()

    async def answered(self) -> None:
        """Wait for the statements that have been given to it."""
        async with self._lock:
            pass

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run one statement as a transaction of its own."""
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
        """A connection of the pool, or one beside it where that has none left.

        Those who have taken them all may be runs that wait for what is to be written here.
        """
        try:
            async with asyncio.timeout(POOL_PATIENCE):
                return await self._database.connect()
        except (PoolTimeout, TimeoutError):
            logger.warning("the pool has no connection left for the worker, which makes one of its own")
        self._own = self._database.private()
        return await Database(self._own, self._database.schema).connect()

    async def _dispose(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            await own.dispose()

    async def connect(self) -> None:
        """Take a connection from the pool before the next statement needs it."""
        async with self._lock:
            if self._connection is None:
                self._connection = await self._database.connect()

    async def open(self) -> None:
        """Take a connection from the pool before the first statement needs it, and let the driver get to know it."""
        await self.connect()
        await self.execute(INTROSPECT_TYPES, NO_ARRAYS)

    async def close(self) -> None:
        """Give the connection back to the pool, once the statement that is on its way has been answered."""
        async with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                try:
                    async with asyncio.timeout(5.0):
                        await connection.close()
                except (SQLAlchemyError, OSError, TimeoutError):
                    await discard(connection)
            await self._dispose()
