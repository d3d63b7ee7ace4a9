"""Connections as durable's statements need them: autocommit, read committed, replaced after any doubt."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable, Row, event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool, Pool

from ..database_errors import (
    MISSING_TABLE_STATES,
    POOLER_STATES,
    is_conflict,
    is_lost,
    refuse_read_only,
    sqlstate,
)
from ..errors import InvalidConfiguration, SchemaMismatch
from ..models import SCHEMA
from . import direct
from .failover import inspect, locate
from .loans import HeldConnection, discard
from .rendering import Translations
from .urls import default_bind, resolve_url

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import IsolationLevel

logger = logging.getLogger("durable_sa")

Bind = AsyncEngine | async_sessionmaker[Any] | URL | str

_EXPLICIT = "durable_explicit"
"""Key in a connection's `info`: whether statements need transactions of their own on it."""

_LOCATED = "durable_located"
"""Key in a connection's `info`: that it is known where it leads, though not the other."""

_ENTERED = {"autobegin": True, "twophase": False}
"""What of an application's options for its sessions cannot be kept inside of a transaction that has begun."""

_mixed_up: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Pools whose connections lead to a pooler that has been seen to mix up prepared statements."""
_explained: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Pools of which it has been logged what to do about that."""


def is_autocommit(connection: Connection) -> bool:
    """Whether every statement commits by itself. All drivers of Postgres say so in the same way."""
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


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
        return await self.prepare(await self.engine.connect())

    async def prepare(self, connection: AsyncConnection) -> AsyncConnection:
        """Make of a connection of the pool what :meth:`connect` gives."""
        connection = await self._set_level(connection, "AUTOCOMMIT")
        try:
            if self._mixed_up:
                connection.info[_EXPLICIT] = True
            elif _EXPLICIT not in connection.info:
                self._check_date_style(connection)
                await self._inspect(connection)
            if connection.info[_EXPLICIT]:
                connection = await connection.execution_options(isolation_level="READ COMMITTED")
        except DBAPIError as error:
            await discard(connection)
            if self._mixed_up or sqlstate(error) not in POOLER_STATES:
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
    def _translations(self) -> Translations | None:
        return self.options.get("schema_translate_map")

    @property
    def _mixed_up(self) -> bool:
        return self.engine.sync_engine.pool in _mixed_up

    async def _inspect(self, connection: AsyncConnection) -> None:
        """Find out, once for each connection, where it leads and what isolation it has by default."""
        isolation = await inspect(connection)
        connection.info[_EXPLICIT] = isolation != "read committed"

    async def _connect(self, isolation_level: IsolationLevel) -> AsyncConnection:
        """A connection of that level, whatever the level of the application's engine.

        Not by an engine of that level: if the application's engine was itself derived from another with a level, that
        one would count.
        """
        return await self._set_level(await self.engine.connect(), isolation_level)

    async def _set_level(self, connection: AsyncConnection, isolation_level: IsolationLevel) -> AsyncConnection:
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
                return await direct.run(connection, statement, parameters, self._translations, alone=True)
            except DBAPIError as error:
                if sqlstate(error) not in POOLER_STATES:
                    raise
            _mixed_up.add(self.engine.sync_engine.pool)
            await connection.rollback()
            connection.info[_EXPLICIT] = True
            connection = await connection.execution_options(isolation_level="READ COMMITTED")
        try:
            async with connection.begin():
                return await self.execute_within(connection, statement, parameters)
        except DBAPIError as error:
            pool = self.engine.sync_engine.pool
            if sqlstate(error) in POOLER_STATES and pool not in _explained:
                _explained.add(pool)
                logger.warning(
                    "a connection pooler mixes up prepared statements; let the driver reuse none, by connect_args: "
                    "statement_cache_size=0, prepared_statement_cache_size=0 and a prepared_statement_name_func that "
                    "gives unique names with asyncpg, prepare_threshold=None with psycopg"
                )
            raise

    async def execute_within(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        """Run one statement in the transaction that `connection` is in."""
        return await direct.run(connection, statement, parameters, self._translations, alone=False)

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run one statement on a connection of the pool, again once if the pool had kept a dead one.

        For statements that may be repeated. A cancelled caller leaves it to finish by itself, since cancelling within
        a driver costs the connection.
        """
        return await asyncio.shield(asyncio.ensure_future(self.execute_unshielded(statement, parameters)))

    async def execute_unshielded(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        """As :meth:`execute`, for a caller that is a task of our own, which nobody cancels."""
        async with HeldConnection(self) as loan:
            return await loan.execute(statement, parameters)

    async def execute_directly(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]] | None:
        """As :meth:`execute_on`, on a connection that has not been prepared for it, which takes a while.

        None, and nothing is done, where SQLAlchemy has to hear of autocommit first.
        """
        if connection.info.get(_EXPLICIT) is not False or self._mixed_up:
            return None
        try:
            return await direct.run_directly(connection, statement, parameters, self._translations, alone=True)
        except DBAPIError as error:
            if sqlstate(error) not in POOLER_STATES:
                raise
        _mixed_up.add(self.engine.sync_engine.pool)
        return None

    async def check_schema(self) -> None:
        """Compare the tables in the database with what this version of the package needs.

        Raises:
            SchemaMismatch: they are missing, older or newer; the message says what to do.
            InvalidConfiguration: a connection pooler does not let transactions through.
        """
        # Imported here, because importing Alembic takes a third of the package's time and few processes need it.
        from ..migrations import check

        try:
            async with self.engine.connect() as connection:
                await connection.run_sync(check, self.schema)
        except DBAPIError as error:
            if "statement pooling" in str(error.orig):
                raise InvalidConfiguration(
                    "bind", "there is a connection pooler in statement mode", "Set its pool_mode to transaction."
                ) from error
            raise

    async def explain(self, error: BaseException) -> None:
        """Find out whether a statement has failed for the state of the database, or of the tables in it.

        Raises:
            SchemaMismatch: they are not there, or older.
            InvalidState: they are, in a database that is read-only.
        """
        refuse_read_only(error)
        if sqlstate(error) not in MISSING_TABLE_STATES:
            return
        from ..migrations import check

        try:
            async with self.engine.connect() as connection:
                await connection.run_sync(check, self.schema)
        except SchemaMismatch as mismatch:
            raise mismatch from error

    async def transactional(self) -> AsyncConnection:
        """A connection of the application's engine, at the isolation the application has given it.

        If that is autocommit, which knows no transactions, at read committed.
        """
        connection = await self.engine.connect()
        await self._locate(connection)
        try:
            options = dict(self.options)
            if await connection.run_sync(is_autocommit):
                options["isolation_level"] = "READ COMMITTED"
            return await connection.execution_options(**options)
        except BaseException:
            await discard(connection)
            raise

    async def _locate(self, connection: AsyncConnection) -> None:
        """As :meth:`_inspect`, of a connection on which the application may have begun something already."""
        if _EXPLICIT in connection.info or _LOCATED in connection.info:
            return
        try:
            if await connection.run_sync(direct.in_transaction):
                await connection.run_sync(locate)
                connection.info[_LOCATED] = True
            else:
                await self._inspect(connection)
        except BaseException:
            await discard(connection)
            raise

    def session(self, connection: AsyncConnection) -> AsyncSession:
        """A session of the application's kind, inside the transaction that `connection` has begun.

        Its commits end savepoints only. Classes that the application has bound to this engine are bound to the
        connection, and the transaction is there already: the session need not begin one, nor one in two phases.
        """
        options: dict[str, Any] = {"join_transaction_mode": "create_savepoint"}
        if self.sessionmaker is None:
            return AsyncSession(connection, expire_on_commit=False, **options)
        applications = self.sessionmaker.kw
        options.update({name: value for name, value in _ENTERED.items() if name in applications})
        if binds := applications.get("binds"):
            options["binds"] = {key: connection if self._is_ours(bind) else bind for key, bind in binds.items()}
        session: AsyncSession = self.sessionmaker(bind=connection, **options)
        return session

    def _is_ours(self, bind: Any) -> bool:
        """Whether an engine, or a variant of it with other options, has the connections of this one."""
        return getattr(getattr(bind, "sync_engine", bind), "pool", None) is self.engine.sync_engine.pool

    def private(self) -> AsyncEngine:
        """An engine with connections of its own, made as the application's are; for another thread, or to keep."""
        engine = self.engine.sync_engine
        pool = engine.pool.recreate()
        if self._mixed_up:
            _mixed_up.add(pool)
        return AsyncEngine(Engine(pool, engine.dialect, engine.url, hide_parameters=engine.hide_parameters))

    @asynccontextmanager
    async def transaction(self, *, again: bool = False) -> AsyncGenerator[AsyncConnection]:
        """A transaction of several statements, each of which sees what was committed before it.

        `again` is for callers that repeat what has met a database that is read-only: as a failover goes on, another
        connection may lead to one that is not.
        """
        connection = await self._connect("READ COMMITTED")
        await self._locate(connection)
        try:
            try:
                async with connection.begin():
                    yield connection
            except SQLAlchemyError as error:
                if is_lost(error):
                    await discard(connection)
                raise
            finally:
                await connection.close()
        except SQLAlchemyError as error:
            if not (again and is_conflict(error)):
                await self.explain(error)
            raise


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
