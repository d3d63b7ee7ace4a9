"""The end of connections, which the other end of a connection cannot hold up.

A proxy, a partition or a stopped server may neither answer a ROLLBACK nor close after a Terminate, and the drivers wait
for both without a limit. Here every such wait is bounded, and the socket is torn down when the time is over, which ends
whatever else waits on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncTransaction
from sqlalchemy.pool import Pool

from ..concurrency.blocking import retrieve_exception
from ..concurrency.branches import detached
from . import private

CLOSING_TIMEOUT = 2.0
"""Seconds that the other end has to answer before the socket is torn down."""
_NOTICING_TIMEOUT = 0.5
"""Seconds that a driver has to notice that its socket was torn down."""

_drivers: weakref.WeakKeyDictionary[Pool, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
"""The drivers' connections of the pools that are disposed of here."""


def driver_of(connection: AsyncConnection | Connection | None) -> Any:
    """Return the driver's connection, or None if it is closed or invalidated. Never reconnects."""
    inner = connection.sync_connection if isinstance(connection, AsyncConnection) else connection
    if inner is None or inner.closed or inner.invalidated:
        return None
    return inner.connection.driver_connection


def tear_down(driver: Any) -> None:
    """End the socket of a driver's connection, if it has one, without a word to the other end."""
    with contextlib.suppress(Exception):  # it is closed already, or belongs to a closed event loop
        if (transport := private.transport_of(driver)) is not None:
            transport.abort()
        elif (connection := getattr(driver, "pgconn", None)) is not None:
            # Closing it instead would leave its number, which another socket may get, with the event loop.
            shared = socket.socket(fileno=connection.socket)
            try:
                shared.shutdown(socket.SHUT_RDWR)
            finally:
                shared.detach()
        elif (terminate := getattr(driver, "terminate", None)) is not None:
            terminate()


async def _bounded(closing: Callable[[], Awaitable[object]], tear: Callable[[], object]) -> None:
    """Await the end of connections, which `tear` brings about if the other end does not answer.

    Raises:
        SQLAlchemyError, OSError, TimeoutError: the end was not an orderly one.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:

            def give_up() -> None:
                # The socket comes before the cancellation: cancelled, a driver asks the server to cancel the statement
                # first. The time for noticing begins here, because the process may have been stopped until now.
                tear()
                limit.reschedule(loop.time() + _NOTICING_TIMEOUT)

            timer = loop.call_later(CLOSING_TIMEOUT, give_up)
            try:
                await closing()
            finally:
                timer.cancel()
    except BaseException:
        tear()
        raise


async def give_back(connection: AsyncConnection) -> None:
    """Return a connection to its pool, which closes it if it keeps no more, or close it if that fails."""
    try:
        await _bounded(connection.close, functools.partial(tear_down, driver_of(connection)))
    except (SQLAlchemyError, OSError, TimeoutError):
        await discard(connection)


async def discard(connection: AsyncConnection) -> None:
    """Close a connection in an unknown state. Raises only when cancelled, and the connection is closed even then."""

    async def close() -> None:
        try:
            await connection.invalidate()
        finally:
            await connection.close()

    loop = asyncio.get_running_loop()
    with detached():
        task = loop.create_task(_bounded(close, functools.partial(tear_down, driver_of(connection))))
    task.add_done_callback(retrieve_exception)
    await asyncio.wait([task])


async def connected(connecting: Awaitable[AsyncConnection]) -> AsyncConnection:
    """Await a new connection, which is closed if the caller is cancelled meanwhile.

    SQLAlchemy before 2.1.9 drops a connection whose set-up is cancelled, with its socket open.
    """
    with detached():
        task = asyncio.ensure_future(connecting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=CLOSING_TIMEOUT)
        task.add_done_callback(retrieve_exception)
        if not task.cancel() and not task.cancelled() and task.exception() is None:
            await discard(task.result())
        raise


@asynccontextmanager
async def begun(connection: AsyncConnection) -> AsyncGenerator[AsyncTransaction]:
    """Begin a transaction, which ends with the block: by a commit, or after an exception by a bounded rollback."""
    transaction = await connection.begin().__aenter__()
    try:
        yield transaction
    except BaseException as error:
        leave = functools.partial(transaction.__aexit__, type(error), error, error.__traceback__)
        try:
            await _bounded(leave, functools.partial(tear_down, driver_of(connection)))
        except (SQLAlchemyError, OSError, TimeoutError):
            await discard(connection)
        raise
    await transaction.__aexit__(None, None, None)


def know_connections(engine: AsyncEngine) -> AsyncEngine:
    """Remember the connections of an engine that :func:`dispose` is to dispose of, and return the engine."""
    drivers: weakref.WeakSet[Any] = weakref.WeakSet()

    def connected(connection: Any, _: Any) -> None:
        drivers.add(connection.driver_connection)

    pool = engine.sync_engine.pool
    event.listen(pool, "connect", connected)
    _drivers[pool] = drivers
    return engine


async def dispose(engine: AsyncEngine) -> None:
    """Dispose of an engine of our own. Connections of it that are in use are closed when they are returned."""
    drivers = _drivers.get(engine.sync_engine.pool, ())

    def tear() -> None:
        for driver in list(drivers):
            tear_down(driver)

    with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
        await _bounded(engine.dispose, tear)


def abandon(engine: AsyncEngine) -> None:
    """Let the server end the connections of an engine whose event loop is closed, so that nothing can be awaited."""
    for driver in list(_drivers.get(engine.sync_engine.pool, ())):
        with contextlib.suppress(Exception):  # it is closed already
            if (transport := private.transport_of(driver)) is not None:
                transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            else:
                tear_down(driver)
