"""Reading for pages: few connections of its own, read-only transactions, and limits of time.

A page consists of sections. One that takes too long is left out, and the page says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

from sqlalchemy import Executable, func, select, true
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..app import App
from ..concurrency.loops import PerLoop
from ..database.closing import abandon, dispose
from ..database.connections import Database
from ..database_errors import is_conflict, is_mixed_up, sqlstate

T = TypeVar("T")

CONNECTIONS: Final = 2
STATEMENT_TIMEOUT: Final = 2.0
"""Seconds that a statement of a page may take."""
MOST_LATE: Final = 2
"""Sections that may be late before the rest of a page is left out, too."""
CONNECTION_TIMEOUT: Final = 2.0
"""Seconds that a page waits for a connection while others use all."""
FRESH: Final = 2.0
"""Seconds for which pages that refresh themselves share what was read."""
REFRESHES_PER_SECOND: Final = 5
"""Statements with which all pages together may refresh themselves in a second, on average."""
USUAL: Final = 10
"""Statements that a page which refreshes itself is expected to need, until it is known how many it did."""

_QUERY_CANCELED: Final = "57014"


class TooBusy(Exception):  # noqa: N818 - no error: the page is refreshed later
    """A page that refreshes itself has to wait for its next turn."""


class _Connections:
    """The engine of an event loop, and what was read over it last."""

    def __init__(self, app: App) -> None:
        self.engine = app.database.private()
        self.database = Database(self.engine, app.schema)
        self.free = asyncio.Semaphore(CONNECTIONS)
        self.shared: dict[Hashable, tuple[float, asyncio.Future[Any]]] = {}
        self._refreshes = float(REFRESHES_PER_SECOND)
        self._counted_at = time.monotonic()

    def may_refresh(self) -> bool:
        """Return whether it is the turn of a page that refreshes itself."""
        now = time.monotonic()
        gained = (now - self._counted_at) * REFRESHES_PER_SECOND
        self._refreshes, self._counted_at = min(self._refreshes + gained, REFRESHES_PER_SECOND), now
        return self._refreshes > 0

    def count_refresh(self, statements: int) -> None:
        """Count the statements of a page that refreshes itself. More than there are delay the next page."""
        self._refreshes -= statements

    def abandon(self) -> None:
        abandon(self.engine)


class Reader:
    """The connections of a dashboard."""

    def __init__(self, app: App) -> None:
        self.statement_timeout = STATEMENT_TIMEOUT
        self._per_loop = PerLoop(lambda: _Connections(app), _Connections.abandon)

    def sections(self, *, refreshing: bool = False) -> Sections:
        """Return a reader for one page."""
        return Sections(self._per_loop.get(), self.statement_timeout, refreshing=refreshing)

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        if (connections := self._per_loop.pop()) is not None:
            await dispose(connections.engine)


class Sections:
    """The sections of one page, read one after the other."""

    def __init__(self, connections: _Connections, statement_timeout: float, *, refreshing: bool) -> None:
        self._connections = connections
        self._timeout = statement_timeout
        self._refreshing = refreshing
        self._has_turn = False
        self._sent = 0
        self._stack: AsyncExitStack | None = None
        self._connection: AsyncConnection | None = None
        self._limit = 0.0
        self.most_late = MOST_LATE
        self.late: list[str] = []
        """The names of sections that took too long."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._release(error)
        if self._has_turn:
            self._connections.count_refresh(self._sent - USUAL)

    async def read(
        self,
        name: str,
        work: Callable[[Connection], T],
        *,
        key: Hashable = None,
        statements: int = 1,
        within: float | None = None,
    ) -> T | None:
        """Return what a function reads, or None if it takes too long.

        Pages that refresh themselves share what was read under the same `key`, which must say whatever it depends on.
        `statements` are those that the function executes. With `within`, each of them may take so many seconds, and a
        page that cannot have it so soon goes on without, as if there were no such section; it has no `key`.

        Raises:
            TooBusy: the page refreshes itself, and all of them have read enough for now.
        """
        if within is None and len(self.late) >= self.most_late:
            self.late.append(name)
            return None
        if key is None or within is not None:
            self._take_turn(statements)
            return await self._run(name, work, within)
        shared = self._connections.shared
        known = shared.get((name, key))
        if self._refreshing and known is not None and time.monotonic() - known[0] < FRESH:
            return self._note(name, cast("tuple[T] | None", await asyncio.shield(known[1])))
        self._take_turn(statements)
        return await self._share(name, work, key)

    async def _share(self, name: str, work: Callable[[Connection], T], key: Hashable) -> T | None:
        shared, now = self._connections.shared, time.monotonic()
        for other in [other for other, (since, _) in shared.items() if now - since >= FRESH]:
            del shared[other]
        future: asyncio.Future[tuple[T] | None] = asyncio.get_running_loop().create_future()
        shared[name, key] = (now, future)
        try:
            value = await self._run(name, work)
        except BaseException:
            shared.pop((name, key), None)
            future.cancel()
            raise
        future.set_result(None if name in self.late else (cast(T, value),))
        return value

    def _note(self, name: str, found: tuple[T] | None) -> T | None:
        if found is None:
            self.late.append(name)
            return None
        return found[0]

    def _take_turn(self, statements: int) -> None:
        if not self._refreshing:
            return
        if not self._has_turn and not self._connections.may_refresh():
            raise TooBusy
        if not self._has_turn:
            self._connections.count_refresh(USUAL)
        # What was begun is finished.
        self._has_turn = True
        self._sent += statements

    async def _run(self, name: str, work: Callable[[Connection], T], within: float | None = None) -> T | None:
        limit = self._timeout if within is None else min(within, self._timeout)
        try:
            was_open = self._connection is not None
            try:
                return await (await self._open(limit)).run_sync(work)
            except DBAPIError as error:
                await self._release(error)
                # A connection that the pool had kept may be dead.
                if was_open or not (is_conflict(error) or is_mixed_up(error)):
                    raise
                return await (await self._open(limit)).run_sync(work)
        except TimeoutError:
            self.late.append(name)
            return None
        except DBAPIError as error:
            await self._release(error)
            if sqlstate(error) != _QUERY_CANCELED:
                await self._connections.database.explain(error)
                raise
            if within is None:
                self.late.append(name)
            return None

    async def _open(self, limit: float) -> AsyncConnection:
        """Return the connection of the page, in a read-only transaction whose statements may take `limit` seconds."""
        if self._connection is not None:
            if limit != self._limit:
                await self._connection.execute(_limits(limit))
                self._limit = limit
            return self._connection
        stack = AsyncExitStack()
        async with asyncio.timeout(CONNECTION_TIMEOUT):
            await self._connections.free.acquire()
        stack.callback(self._connections.free.release)
        try:
            connection = await stack.enter_async_context(self._connections.database.transaction(explained=False))
            await connection.execute(_limits(limit))
        except BaseException as error:
            await _leave(stack, error)
            raise
        self._stack, self._connection, self._limit = stack, connection, limit
        return connection

    async def _release(self, error: BaseException | None = None) -> None:
        stack, self._stack, self._connection = self._stack, None, None
        if stack is not None:
            await _leave(stack, error)


def _limits(seconds: float) -> Executable:
    milliseconds = str(max(1, int(seconds * 1000)))
    setting = func.pg_catalog.set_config
    return select(
        setting("transaction_read_only", "on", true()),
        setting("statement_timeout", milliseconds, true()),
        setting("lock_timeout", milliseconds, true()),
    )


async def _leave(stack: AsyncExitStack, error: BaseException | None) -> None:
    """End a transaction and return its connection; after an error by a rollback."""
    if error is None:
        await stack.aclose()
    else:
        await stack.__aexit__(type(error), error, error.__traceback__)
