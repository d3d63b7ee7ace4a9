"""Connections as durable's statements need them: autocommit, read committed, replaced after any doubt."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable, Row, event, text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool, Pool

from .errors import InvalidConfiguration
from .models import SCHEMA
from .statements.expressions import LEARN_TYPES, NO_ARRAYS

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import IsolationLevel

logger = logging.getLogger("durable_sa")

Bind = AsyncEngine | async_sessionmaker[Any] | URL | str

STATEMENT_DEADLINE = 30.0
"""Seconds after which a statement's connection is taken for dead."""

LOCK_NOT_AVAILABLE = "55P03"
_TRANSIENT_CLASSES = ("08", "53", "57", "58")
_TRANSIENT_STATES = frozenset({"40001", "40P01", LOCK_NOT_AVAILABLE, "25006", "25P03", "XX000"})
_CONFLICT_STATES = frozenset({"40001", "40P01", "57P01", "57P02", "57P05"})
_LOST_STATES = frozenset({"57P01", "57P02", "25006"})
_CACHED_PLAN_STATES = frozenset({"0A000", "26000", "42P05"})
_POOLER_STATES = frozenset({"26000", "42P05"})
"""A prepared statement is not there, or is there already: one server connection has prepared it, another runs it."""

_EXPLICIT = "durable_explicit"
_REPLAN = "durable_replan"
REPLAN_INTERVAL = 1.0
REPLAN_STATEMENTS = 20
"""How long, and for how many statements at least, a connection may go on with plans that were made for other tables."""
"""Key in a connection's `info`: whether statements need transactions of their own on it."""

_mixed_up: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Pools whose connections lead to a pooler that has been seen to do so."""


def sqlstate(error: BaseException) -> str | None:
    """The server's five-letter code, wherever the driver keeps it; None where the server said nothing."""
    cause: Any = error.orig if isinstance(error, DBAPIError) else error
    for name in ("sqlstate", "pgcode"):
        code = getattr(cause, name, None)
        if isinstance(code, str):
            return code
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same statement may succeed later: lost connections, restarts, deadlocks, timeouts, full servers."""
    if isinstance(error, PoolTimeout | PendingRollbackError | OSError | asyncio.TimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    code = sqlstate(error)
    if code is None:
        # Nothing came back from the server, so it is about the connection.
        return not isinstance(error.orig, ValueError | TypeError | ArithmeticError)
    return code[:2] in _TRANSIENT_CLASSES or code in _TRANSIENT_STATES or code in _CACHED_PLAN_STATES


def is_conflict(error: BaseException) -> bool:
    """Whether a transaction lost against another one, or its connection, and may be run again from its beginning."""
    if not isinstance(error, DBAPIError):
        return False
    return is_lost(error) or sqlstate(error) in _CONFLICT_STATES


def is_lost(error: BaseException) -> bool:
    """Whether the connection was lost, ended by an administrator or a crash, or leads where nothing can be written.

    That is a server that is no longer, or not yet, the primary: another connection may lead to the one that is.
    """
    if not isinstance(error, DBAPIError):
        return False
    code = sqlstate(error) or ""
    return error.connection_invalidated or code[:2] == "08" or code in _LOST_STATES


def is_autocommit(connection: Connection) -> bool:
    """Whether every statement commits by itself. All drivers of Postgres say so in the same way."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def backoff(attempt: int, *, base: float = 0.05, most: float = 5.0) -> float:
    """Seconds to wait before the next try, with jitter, so that a fleet does not come back all at once."""
    return min(most, base * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.0)  # noqa: S311


def resolve_url(url: str | URL, what: str = "bind") -> URL:
    """A URL as given by a user or a platform, with asyncpg where it names no driver, which calls `sslmode` `ssl`."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidConfiguration(
            what, "it is not a database URL", "Write postgresql://user:password@host/database."
        ) from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+asyncpg")
    if not parsed.drivername.startswith("postgresql+"):
        raise InvalidConfiguration(
            what,
            f"{parsed.drivername!r} is no PostgreSQL driver",
            "Use postgresql+asyncpg:// or postgresql+psycopg://.",
        )
    if parsed.drivername not in ("postgresql+asyncpg", "postgresql+psycopg", "postgresql+psycopg_async"):
        raise InvalidConfiguration(
            what,
            f"{parsed.drivername!r} has no asyncio mode",
            "Use postgresql+asyncpg:// or postgresql+psycopg://.",
        )
    if parsed.drivername == "postgresql+asyncpg" and "sslmode" in parsed.query:
        query = dict(parsed.query)
        parsed = parsed.set(query={"ssl": query.pop("sslmode"), **query})
    return parsed


def default_bind() -> str | URL:
    """Where the tables are when nobody says: `DURABLE_DATABASE_URL`, else the embedded server."""
    if url := os.environ.get("DURABLE_DATABASE_URL"):
        return url
    from .embedded import server

    return server().url()


def _date_style(driver_connection: Any) -> str | None:
    """The style that psycopg gets times in, and reads no other than ISO; None of a driver that reads all."""
    connection = getattr(driver_connection, "pgconn", None)
    return None if connection is None else str(connection.parameter_status(b"DateStyle").decode())


def _set_date_style(connection: Any, _: Any) -> None:
    """Have a new connection of an engine of ours give times as the driver reads them, whatever the server's default."""
    style = _date_style(connection.driver_connection)
    if style is not None and not style.startswith("ISO"):
        cursor = connection.cursor()
        cursor.execute("SET datestyle = ISO")
        cursor.close()
        connection.commit()


def direct_engine(url: str | URL) -> AsyncEngine:
    """An engine with a connection of its own for LISTEN, to be disposed of by the caller."""
    return create_async_engine(resolve_url(url), poolclass=NullPool, hide_parameters=True)


class Database:
    """An engine and the schema in it. Gives out connections on which durable's statements mean what they say."""

    def __init__(self, bind: Bind | None, schema: str = SCHEMA) -> None:
        self.schema = schema
        self.sessionmaker: async_sessionmaker[Any] | None = None
        self.owned = False
        if isinstance(bind, async_sessionmaker):
            self.sessionmaker = bind
            bind = bind.kw.get("bind")
            if not isinstance(bind, AsyncEngine):
                raise InvalidConfiguration(
                    "bind",
                    "the async_sessionmaker is not bound to one AsyncEngine",
                    "Give the engine that has the durable tables.",
                )
        if bind is None:
            bind = default_bind()
        if isinstance(bind, AsyncEngine):
            if bind.dialect.name != "postgresql":
                raise InvalidConfiguration("bind", f"durable_sa needs PostgreSQL, not {bind.dialect.name}")
            self.engine = bind
        elif isinstance(bind, str | URL):  # pyright: ignore[reportUnnecessaryIsInstance]
            self.engine = create_async_engine(resolve_url(bind), hide_parameters=True)
            event.listen(self.engine.sync_engine, "connect", _set_date_style)
            self.owned = True
        else:
            raise InvalidConfiguration(
                "bind",
                f"it cannot be of type {type(bind).__name__}",
                "Give an AsyncEngine, an async_sessionmaker or a URL.",
            )
        self.options: dict[str, Any] = {}
        self._said = False
        if schema != SCHEMA:
            applications: dict[str, Any] = self.engine.get_execution_options().get("schema_translate_map") or {}
            self.options["schema_translate_map"] = {**applications, SCHEMA: schema}

    async def close(self) -> None:
        """Dispose of the engine if it was made here."""
        if self.owned:
            await self.engine.dispose()

    async def connect(self) -> AsyncConnection:
        """A connection on which each statement is a transaction of its own, at read committed.

        An autocommit connection runs at the isolation the server has by default. Where that is another one, the
        statements get transactions of their own instead; see :meth:`execute_on`.
        """
        connection = await self._connect("AUTOCOMMIT")
        try:
            if self._mixed_up:
                connection.info[_EXPLICIT] = True
            elif _EXPLICIT not in connection.info:
                self._check_date_style(connection)
                query = text("SELECT current_setting('default_transaction_isolation')")
                connection.info[_EXPLICIT] = (await connection.execute(query)).scalar() != "read committed"
                await connection.rollback()
            if connection.info[_EXPLICIT]:
                connection = await connection.execution_options(isolation_level="READ COMMITTED")
        except DBAPIError as error:
            await discard(connection)
            if self._mixed_up or sqlstate(error) not in _POOLER_STATES:
                raise
            _mixed_up.add(self.engine.sync_engine.pool)
            return await self.connect()
        except BaseException:
            await discard(connection)
            raise
        return connection

    def _check_date_style(self, connection: AsyncConnection) -> None:
        style = _date_style(connection.sync_connection and connection.sync_connection.connection.driver_connection)
        if style is not None and not style.startswith("ISO"):
            raise InvalidConfiguration(
                "bind",
                f"its connections have the DateStyle {style!r}, in which psycopg cannot read times",
                "Give the engine connect_args={'options': '-c datestyle=ISO'}.",
            )

    @property
    def _mixed_up(self) -> bool:
        return self.engine.sync_engine.pool in _mixed_up

    async def _connect(self, isolation_level: IsolationLevel) -> AsyncConnection:
        """A connection of that level, whatever the level of the application's engine.

        Not by an engine of that level: if the application's engine was itself derived from another with a level, that
        one would count.
        """
        connection = await self.engine.connect()
        try:
            return await connection.execution_options(isolation_level=isolation_level, **self.options)
        except BaseException:
            await discard(connection)
            raise

    async def execute_on(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        """Run one statement as a transaction of its own.

        A pooler in transaction mode may prepare a statement on one server connection and look for it on another, unless
        a transaction holds the two together. Where that is seen to happen, nothing has been executed, and statements
        get transactions from then on.
        """
        if not connection.info[_EXPLICIT]:
            try:
                await _renew_plans(connection)
                result = await connection.execute(statement, parameters)
                return result.all() if result.returns_rows else ()
            except DBAPIError as error:
                if sqlstate(error) not in _POOLER_STATES:
                    raise
            _mixed_up.add(self.engine.sync_engine.pool)
            await connection.rollback()
            connection.info[_EXPLICIT] = True
            connection = await connection.execution_options(isolation_level="READ COMMITTED")
        try:
            async with connection.begin():
                await _renew_plans(connection)
                result = await connection.execute(statement, parameters)
                return result.all() if result.returns_rows else ()
        except DBAPIError as error:
            if sqlstate(error) in _POOLER_STATES and not self._said:
                self._said = True
                logger.warning(
                    "a connection pooler mixes up prepared statements; let the driver reuse none, by connect_args: "
                    "statement_cache_size=0, prepared_statement_cache_size=0 and a prepared_statement_name_func that "
                    "gives unique names with asyncpg, prepare_threshold=None with psycopg"
                )
            raise

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run one statement on a connection of the pool, again once if the pool had kept a dead one.

        For statements that may be repeated. A cancelled caller leaves it to finish by itself, since cancelling within
        a driver costs the connection.
        """
        return await asyncio.shield(asyncio.ensure_future(self._execute(statement, parameters)))

    async def _execute(self, statement: Executable, parameters: Mapping[str, Any] | None) -> Sequence[Row[Any]]:
        for attempt in range(3):
            try:
                connection = await self.connect()
                try:
                    rows = await self.execute_on(connection, statement, parameters)
                except BaseException:
                    await discard(connection)
                    raise
                await connection.close()
                return rows
            except (SQLAlchemyError, OSError) as error:
                lost = isinstance(error, ConnectionError) or is_conflict(error)
                if attempt == 2 or not (lost or sqlstate(error) in _CACHED_PLAN_STATES):
                    raise
                await asyncio.sleep(backoff(attempt))
        raise AssertionError("unreachable")

    async def transactional(self) -> AsyncConnection:
        """A connection of the application's engine, at the isolation the application has given it.

        If that is autocommit, which knows no transactions, at read committed.
        """
        connection = await self.engine.connect()
        try:
            options = dict(self.options)
            if await connection.run_sync(is_autocommit):
                options["isolation_level"] = "READ COMMITTED"
            return await connection.execution_options(**options)
        except BaseException:
            await discard(connection)
            raise

    def session(self, connection: AsyncConnection) -> AsyncSession:
        """A session of the application's kind, inside the transaction that `connection` has begun.

        Its commits end savepoints only.
        """
        options: dict[str, Any] = {"join_transaction_mode": "create_savepoint"}
        if self.sessionmaker is None:
            return AsyncSession(connection, expire_on_commit=False, **options)
        session: AsyncSession = self.sessionmaker(bind=connection, **options)
        return session

    def private(self) -> AsyncEngine:
        """An engine with connections of its own, made as the application's are; for another thread, or to keep."""
        engine = self.engine.sync_engine
        pool = engine.pool.recreate()
        if self._mixed_up:
            _mixed_up.add(pool)
        return AsyncEngine(Engine(pool, engine.dialect, engine.url))

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncConnection]:
        """A transaction of several statements, each of which sees what was committed before it."""
        connection = await self._connect("READ COMMITTED")
        try:
            async with connection.begin():
                yield connection
        except SQLAlchemyError as error:
            if is_lost(error):
                await discard(connection)
            raise
        finally:
            await connection.close()


async def _renew_plans(connection: AsyncConnection) -> None:
    """Have the statements that are prepared on a connection planned anew, now and then.

    The server keeps one plan for whatever values, which is right for tables of the size that they had when it was made.
    Queues grow from nothing to millions sooner than autovacuum looks at them.
    """
    count, since = connection.info.get(_REPLAN, (0, time.monotonic()))
    if count >= REPLAN_STATEMENTS and time.monotonic() - since >= REPLAN_INTERVAL:
        await connection.exec_driver_sql("DISCARD PLANS")
        count, since = 0, time.monotonic()
    connection.info[_REPLAN] = count + 1, since


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


class Channel:
    """One connection kept for one kind of work, with statements in sequence.

    After an error of the connection, or a cancellation, SQLAlchemy would reconnect without autocommit, and what is
    then executed never commits: so it is given up, and the next statement gets another.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: AsyncConnection | None = None
        self._lock = asyncio.Lock()

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run one statement as a transaction of its own."""
        async with self._lock:
            try:
                async with asyncio.timeout(STATEMENT_DEADLINE):
                    if self._connection is None:
                        self._connection = await self._database.connect()
                    return await self._database.execute_on(self._connection, statement, parameters)
            except BaseException:
                connection, self._connection = self._connection, None
                if connection is not None:
                    await discard(connection)
                raise

    async def open(self) -> None:
        """Take a connection from the pool before the first statement needs it, and let the driver get to know it."""
        async with self._lock:
            if self._connection is None:
                self._connection = await self._database.connect()
        await self.execute(LEARN_TYPES, NO_ARRAYS)

    async def close(self) -> None:
        """Give the connection back to the pool."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                async with asyncio.timeout(5.0):
                    await connection.close()
            except (SQLAlchemyError, OSError, TimeoutError):
                await discard(connection)
