"""Connections on which each statement of durable is a transaction of its own, at read committed, or part of one."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, cast

from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.pool import NullPool, Pool

from ..database_errors import (
    CACHED_PLAN_STATES,
    MISSING_TABLE_STATES,
    POOLER_STATES,
    REMINDER_INTERVAL,
    is_about_connection,
    is_conflict,
    is_lost,
    is_mixed_up,
    refuse_read_only,
    retrying,
    sqlstate,
)
from ..errors import InvalidConfiguration, InvalidState, SchemaMismatch
from ..models import SCHEMA
from . import direct, private
from .closing import abandon, begun, discard, dispose, driver_of, give_back, know_connections
from .engines import Bind, check_date_style, resolve_bind
from .failover import inspect, locate
from .rendering import Translations

logger = logging.getLogger("durable_sa")

TRIES = 3
"""Number of times that a statement is sent which meets a dead connection."""

FIRST_CONNECTION_PAUSE = 0.005
"""Seconds between looks whether another event loop has its first connection."""

_EXPLICIT = "durable_explicit"
"""Key in a connection's `info`: True if statements need explicit transactions on it, False if autocommit will do."""

_LOCATED = "durable_located"
"""Key in a connection's `info`: present if it is known which server it leads to, though not its default isolation."""

_SESSION_OPTIONS = {"autobegin": True, "twophase": False}
"""Options of an application's sessions that a session inside a transaction cannot have otherwise."""

_mixed_up: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Pools whose connections lead to a pooler that was seen to mix up prepared statements."""
_explained: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Pools for which the remedy has been logged."""
_first_connections: weakref.WeakKeyDictionary[Pool, threading.Lock | None] = weakref.WeakKeyDictionary()
"""The lock of the first connection over an engine without a pool, which event loops may share; None once it exists."""
_loops: weakref.WeakKeyDictionary[Pool, asyncio.AbstractEventLoop] = weakref.WeakKeyDictionary()
"""The event loop of the connections of a pool, which keeps them."""


def _shared_between_loops() -> InvalidState:
    return InvalidState(
        "The engine's pool",
        "used on another event loop than its connections",
        "Pools of SQLAlchemy cannot be shared between event loops. Create the engine with poolclass=NullPool, or await "
        "engine.dispose() before its loop ends, or give Durable the URL: it then has an engine for each loop.",
    )


def is_autocommit(connection: Connection) -> bool:
    """Return whether every statement commits by itself; all drivers of Postgres have the same attribute for that."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


class Database:
    """An engine and the schema in it.

    There are two ways to execute a statement: :meth:`execute` takes a connection of the pool, :meth:`execute_on` a
    given one. A `HeldConnection` and a `DedicatedConnection` execute as the first does, but keep their connection.
    """

    def __init__(self, bind: Bind | None, schema: str = SCHEMA) -> None:
        self.schema = schema
        self.engine, self.sessionmaker, self.owned = resolve_bind(bind)
        self._used_by: tuple[Pool, asyncio.AbstractEventLoop] | None = None
        """The pool, and the event loop that was last found to be the one of its connections."""
        self._next_warning = 0.0
        """The time from which on it is logged again that the pool has no connection left."""
        self.options: dict[str, Any] = {}
        if schema != SCHEMA:
            applications: dict[str, Any] = self.engine.get_execution_options().get("schema_translate_map") or {}
            self.options["schema_translate_map"] = {**applications, SCHEMA: schema}

    async def close(self) -> None:
        """Dispose of the engine if it was made from a URL."""
        if self.owned:
            await dispose(self.engine)

    def abandon(self) -> None:
        """Drop the connections of an engine that was made from a URL, after its event loop was closed."""
        if self.owned:
            abandon(self.engine)

    async def checkout(self) -> AsyncConnection:
        """Take a connection from the pool.

        Raises:
            InvalidState: connections of the pool belong to another event loop. SQLAlchemy would hand them on, and what
                is awaited on them might never end.
        """
        pool, loop = self._pool, asyncio.get_running_loop()
        if self._used_by == (pool, loop):
            connection = await self.engine.connect()
        else:
            connection = await self._checkout_first(pool, loop)
        if private.loop_of(driver_of(connection)) not in (None, loop):
            await give_back(connection)
            raise _shared_between_loops()
        return connection

    async def _checkout_first(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> AsyncConnection:
        """Take a connection on another event loop than before, or from another pool."""
        if not isinstance(pool, NullPool):
            other = _loops.setdefault(pool, loop)
            if other is not loop and not other.is_closed():
                raise _shared_between_loops()
            _loops[pool] = loop
            self._used_by = (pool, loop)
        elif (lock := _first_connections.setdefault(pool, threading.Lock())) is not None:
            # SQLAlchemy asks the server for its version on the first connection, under a lock of one event loop.
            while not lock.acquire(blocking=False):  # noqa: ASYNC110 - an asyncio.Event is of one event loop
                await asyncio.sleep(FIRST_CONNECTION_PAUSE)
            try:
                connection = await self.engine.connect()
                _first_connections[pool] = None
            finally:
                lock.release()
            return connection
        return await self.engine.connect()

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Execute a statement that may be repeated as a transaction of its own, on a connection of the pool.

        If the caller is cancelled, the statement still finishes: cancelling within a driver costs the connection.
        """

        async def run() -> Sequence[Row[Any]]:
            async with HeldConnection(self) as held:
                return await held.execute(statement, parameters)

        return await asyncio.shield(asyncio.ensure_future(run()))

    async def execute_on(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        """Execute a statement in the transaction of a connection, or else as a transaction of its own.

        A pooler in transaction mode may prepare a statement on one server connection and look for it on another, unless
        a transaction holds the two together. Nothing has been executed where that is seen; from then on statements get
        explicit transactions.
        """
        inner = cast("Connection", connection.sync_connection)
        if inner.get_transaction() is not None and not is_autocommit(inner):
            return await self._execute_within(connection, statement, parameters)
        # asyncpg itself needs no autocommit of SQLAlchemy, which takes long to turn on.
        directly = (
            inner.connection.info.get(_EXPLICIT) is False and not self._is_mixed_up and direct.leads_directly(inner)
        )
        if not directly:
            await self._set_up(connection)
        if not inner.connection.info[_EXPLICIT]:
            try:
                return await direct.execute(
                    connection, statement, parameters, self._translations, directly=directly, alone=True
                )
            except DBAPIError as error:
                if sqlstate(error) not in POOLER_STATES:
                    raise
            _mixed_up.add(self._pool)
            await self._set_up(connection)
        try:
            async with begun(connection):
                return await self._execute_within(connection, statement, parameters)
        except DBAPIError as error:
            if sqlstate(error) in POOLER_STATES and self._pool not in _explained:
                _explained.add(self._pool)
                logger.warning(
                    "a connection pooler mixes up prepared statements; let the driver reuse none: by "
                    "?pooler=transaction in the URL of Durable, or for an engine of your own by connect_args: "
                    "statement_cache_size=0, prepared_statement_cache_size=0 and a prepared_statement_name_func that "
                    "returns unique names with asyncpg, prepare_threshold=None with psycopg"
                )
            raise

    async def _execute_within(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any] | None
    ) -> Sequence[Row[Any]]:
        directly = direct.leads_directly(cast("Connection", connection.sync_connection), alone=False)
        return await direct.execute(
            connection, statement, parameters, self._translations, directly=directly, alone=False
        )

    @property
    def _translations(self) -> Translations | None:
        return self.options.get("schema_translate_map")

    @property
    def _pool(self) -> Pool:
        return self.engine.sync_engine.pool

    @property
    def _is_mixed_up(self) -> bool:
        return self._pool in _mixed_up

    async def connect(self) -> AsyncConnection:
        """Take a connection from the pool and prepare it for :meth:`execute_on`."""
        while True:
            was_mixed_up = self._is_mixed_up
            connection = await self.checkout()
            try:
                await self._set_up(connection)
                return connection
            except BaseException as error:
                await discard(connection)
                if was_mixed_up or not isinstance(error, DBAPIError) or sqlstate(error) not in POOLER_STATES:
                    raise

    async def _set_up(self, connection: AsyncConnection) -> None:
        """Put a connection that is in no transaction into autocommit; at read committed if that will not do.

        In autocommit the server's default isolation counts. Where that is another than read committed, or a pooler
        mixes up statements, each statement gets an explicit transaction.
        """
        try:
            if self._is_mixed_up:
                connection.info[_EXPLICIT] = True
            elif _EXPLICIT not in connection.info:
                await self._set_level(connection, "AUTOCOMMIT")
                check_date_style(connection)
                await self._inspect(connection)
            await self._set_level(connection, "READ COMMITTED" if connection.info[_EXPLICIT] else "AUTOCOMMIT")
        except DBAPIError as error:
            if sqlstate(error) in POOLER_STATES:
                _mixed_up.add(self._pool)
            raise

    async def _set_level(self, connection: AsyncConnection, level: str) -> None:
        inner = cast("Connection", connection.sync_connection)
        if inner.get_execution_options().get("isolation_level") != level:
            # In autocommit SQLAlchemy has a transaction of which the server knows nothing.
            await connection.rollback()
            connection = await connection.execution_options(isolation_level=level, **self.options)

    async def _inspect(self, connection: AsyncConnection) -> None:
        """Find out, once for each connection, which server it leads to and its default isolation."""
        isolation = await inspect(connection)
        connection.info[_EXPLICIT] = isolation != "read committed"

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[AsyncConnection]:
        """Take a connection from the pool for the block."""
        connection = await self.checkout()
        try:
            yield connection
        finally:
            await give_back(connection)

    async def check_schema(self) -> None:
        """Compare the tables in the database with what this version of the package needs.

        Raises:
            SchemaMismatch: they are missing, older or newer; the message says what to do.
            InvalidConfiguration: a connection pooler does not let transactions through.
        """
        # Imported here, because importing Alembic takes a third of the package's time and few processes need it.
        with _silent("alembic.runtime.plugins"):
            from ..migrations import check

        try:
            async with self._connected() as connection:
                await connection.run_sync(check, self.schema)
        except DBAPIError as error:
            if "statement pooling" in str(error.orig):
                raise InvalidConfiguration(
                    "bind", "there is a connection pooler in statement mode", "Set its pool_mode to transaction."
                ) from error
            raise

    async def explain(self, error: BaseException) -> None:
        """Raise the error behind that of a statement, if it failed for the state of the database or its tables.

        Raises:
            SchemaMismatch: the tables do not exist, or are older.
            InvalidState: the database is read-only.
        """
        refuse_read_only(error)
        if sqlstate(error) not in MISSING_TABLE_STATES:
            return
        try:
            await self.check_schema()
        except SchemaMismatch as mismatch:
            raise mismatch from error

    async def transactional(self) -> AsyncConnection:
        """Take a connection for a transaction, at the isolation of the application's engine.

        If that is autocommit, which knows no transactions, at read committed. Logs once a minute that the pool has no
        connection left.
        """
        try:
            connection = await self.checkout()
        except PoolTimeout:
            self._warn_of_exhaustion()
            raise
        try:
            await self._locate(connection)
            options = dict(self.options)
            if await connection.run_sync(is_autocommit):
                options["isolation_level"] = "READ COMMITTED"
            return await connection.execution_options(**options)
        except BaseException:
            await discard(connection)
            raise

    def _warn_of_exhaustion(self) -> None:
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + REMINDER_INTERVAL
            logger.warning(
                "transactions wait for a connection: the pool of %s connections has none left, and the worker keeps "
                "three of them; raise pool_size or max_overflow",
                private.capacity(self._pool),
            )

    async def _locate(self, connection: AsyncConnection) -> None:
        """Find out which server a connection leads to, even if the application has begun a transaction at checkout."""
        if _EXPLICIT in connection.info or _LOCATED in connection.info:
            return
        if await connection.run_sync(direct.in_transaction):
            await connection.run_sync(locate)
            connection.info[_LOCATED] = True
        else:
            await self._inspect(connection)

    @asynccontextmanager
    async def transaction(self, *, explained: bool = True) -> AsyncGenerator[AsyncConnection]:
        """Begin a transaction at read committed: each of its statements sees what was committed before that.

        Callers that retry have errors `explained` (see :meth:`explain`) by themselves, after the last try.
        """
        connection = await self.checkout()
        try:
            # An engine of that level would not do: if the application's was derived from another, that one's counts.
            connection = await connection.execution_options(isolation_level="READ COMMITTED", **self.options)
            await self._locate(connection)
        except BaseException:
            await discard(connection)
            raise
        try:
            try:
                async with begun(connection):
                    yield connection
            except SQLAlchemyError as error:
                if is_lost(error) or is_mixed_up(error):
                    await discard(connection)
                raise
            finally:
                await give_back(connection)
        except SQLAlchemyError as error:
            if explained:
                await self.explain(error)
            raise

    def session(self, connection: AsyncConnection) -> AsyncSession:
        """Make a session of the application's kind, inside the transaction that `connection` has begun.

        Its commits end savepoints only. Classes that the application has bound to this engine are bound to the
        connection. As the transaction exists already, the session need not begin one, nor one in two phases.
        """
        options: dict[str, Any] = {"join_transaction_mode": "create_savepoint"}
        if self.sessionmaker is None:
            return AsyncSession(connection, expire_on_commit=False, **options)
        applications = self.sessionmaker.kw
        options.update({name: value for name, value in _SESSION_OPTIONS.items() if name in applications})
        if binds := applications.get("binds"):
            options["binds"] = {key: connection if self._is_ours(bind) else bind for key, bind in binds.items()}
        session: AsyncSession = self.sessionmaker(bind=connection, **options)
        return session

    def _is_ours(self, bind: Any) -> bool:
        """Return whether an engine, or a variant of it with other options, has the connections of this one."""
        return getattr(getattr(bind, "sync_engine", bind), "pool", None) is self._pool

    def private(self) -> AsyncEngine:
        """Make an engine like the application's, with connections of its own: for another thread, or to keep them."""
        engine = self.engine.sync_engine
        pool = engine.pool.recreate()
        if self._is_mixed_up:
            _mixed_up.add(pool)
        return know_connections(
            AsyncEngine(Engine(pool, engine.dialect, engine.url, hide_parameters=engine.hide_parameters))
        )


class HeldConnection:
    """A connection of the pool that is held for several statements, each a transaction of its own.

    For tasks of our own, which are not cancelled: cancelling within a driver costs the connection.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pool: Pool | None = None
        self._connection: AsyncConnection | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Execute a statement that may be repeated: on another connection if the pool had kept a dead one."""
        try:
            return await retrying(
                functools.partial(self._execute, statement, parameters), tries=TRIES, when=is_worth_another
            )
        except (SQLAlchemyError, OSError) as error:
            await self._database.explain(error)
            raise

    async def execute_once(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """Execute a statement that the caller repeats, if that :func:`is_worth_another` try."""
        try:
            return await self._execute(statement, parameters)
        except (SQLAlchemyError, OSError) as error:
            await self._database.explain(error)
            raise

    async def _execute(self, statement: Executable, parameters: Mapping[str, Any] | None) -> Sequence[Row[Any]]:
        try:
            if self._connection is None:
                self._pool = self._database.engine.sync_engine.pool
                self._connection = await self._database.checkout()
            return await self._database.execute_on(self._connection, statement, parameters)
        except BaseException:
            connection, self._connection = self._connection, None
            if connection is not None:
                await discard(connection)
            raise

    async def close(self) -> None:
        """Return the connection, or close it if the application has disposed of the pool that it came from."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._database.engine.sync_engine.pool is not self._pool:
            await discard(connection)
            return
        await give_back(connection)


def is_worth_another(error: BaseException) -> bool:
    """Return whether a statement that failed on one connection may succeed on another."""
    return (
        isinstance(error, ConnectionError)
        or is_about_connection(error)
        or is_conflict(error)
        or sqlstate(error) in CACHED_PLAN_STATES | POOLER_STATES
    )


@contextmanager
def _silent(name: str) -> Generator[None]:
    """Drop what a logger logs inside the block: Alembic, when it is imported, a line about each part of it."""
    silenced = logging.getLogger(name)
    silenced.addFilter(_drop)
    try:
        yield
    finally:
        silenced.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False
