"""Connections that the pool lends: for statements in a row, and given up after any doubt."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import Pool

from ..database_errors import (
    CACHED_PLAN_STATES,
    backoff,
    is_conflict,
    sqlstate,
)
from .batches import BatchFunction

if TYPE_CHECKING:
    from .connections import Database

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

TRIES = 3
"""How often a statement is sent that meets a dead connection."""


class HeldConnection:
    """One connection of the pool for statements in a row, each a transaction of its own; for a task of our own.

    Nobody cancels that: cancelling within a driver costs the connection.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pool: Pool | None = None
        self._connection: AsyncConnection | None = None
        self._prepared = False
        """Whether SQLAlchemy, too, executes in autocommit on it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run one statement that may be repeated: it is, on another connection, if the pool had kept a dead one."""
        for attempt in range(TRIES):
            try:
                return await self._execute(statement, parameters)
            except (SQLAlchemyError, OSError) as error:
                lost = isinstance(error, ConnectionError) or is_conflict(error)
                if attempt + 1 == TRIES or not (lost or sqlstate(error) in CACHED_PLAN_STATES):
                    await self._database.explain(error)
                    raise
                await asyncio.sleep(backoff(attempt))
        raise AssertionError("unreachable")

    async def _execute(self, statement: Executable, parameters: Mapping[str, Any] | None) -> Sequence[Row[Any]]:
        try:
            if self._connection is None:
                self._pool = self._database.engine.sync_engine.pool
                self._connection, self._prepared = await self._database.engine.connect(), False
            if not self._prepared:
                rows = await self._database.execute_directly(self._connection, statement, parameters)
                if rows is not None:
                    return rows
                self._connection = await self._database.prepare(self._connection)
                self._prepared = True
            return await self._database.execute_on(self._connection, statement, parameters)
        except BaseException:
            connection, self._connection = self._connection, None
            if connection is not None:
                await discard(connection)
            raise

    async def end(self) -> None:
        """Give the connection back, or close it if the application has disposed of the pool that it came from."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._database.engine.sync_engine.pool is not self._pool:
            await discard(connection)
            return
        try:
            await connection.close()
        except (SQLAlchemyError, OSError):
            await discard(connection)


def lent(
    database: Callable[[], Database],
    function: Callable[[HeldConnection, list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]],
) -> Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]]:
    """For a batch whose function has a connection lent, the same one for calls in a row."""

    @asynccontextmanager
    async def ready() -> AsyncGenerator[BatchFunction[ItemT, ResultT]]:
        async with HeldConnection(database()) as loan:
            yield functools.partial(function, loan)

    return ready


async def discard(connection: AsyncConnection) -> None:
    """Get rid of a connection in an unknown state. Takes no longer than 5 seconds, and raises only when cancelled."""

    async def close() -> None:
        try:
            await connection.invalidate()
        finally:
            await connection.close()

    task = asyncio.ensure_future(close())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait([task], timeout=5.0)
