"""One statement on one connection, by the shortest way there is.

A statement that SQLAlchemy executes takes three times as much of the client's CPU time as one that asyncpg does. Where
nobody listens to what SQLAlchemy would tell of it, asyncpg is asked itself: the text, the connection and the errors are
the same. SQLAlchemy executes everything for an engine that echoes, has listeners for cursors or keeps no prepared
statements, for one with another driver, and the first statement of a transaction, which begins it.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs] - it has no types
from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.ext.asyncio import AsyncConnection

from .rendering import Translations, render

REPLAN_INTERVAL = 1.0
REPLAN_SECONDS = 0.2
"""For how long, and how many seconds of waiting for the server in that time, plans are kept before they are renewed."""

_REPLAN = "durable_replan"
"""Key in a connection's `info`: since when its plans are kept, and for how long statements have taken since then."""
_PREPARED = "durable_prepared"
"""Key in a connection's `info`: what has been prepared on it, by its text."""


def leads_directly(connection: Connection, *, alone: bool = True) -> bool:
    """Whether asyncpg is asked itself: for a statement that is `alone`, or in the transaction that has been begun.

    Statements that are alone commit by themselves then, whatever SQLAlchemy's isolation level.
    """
    return (
        connection.dialect.driver == "asyncpg"
        and not _has_listeners(connection)
        and not connection.dialect.dispatch.do_execute
        and not connection.dialect.dispatch.do_execute_no_params
        and not connection._echo  # pyright: ignore[reportPrivateUsage]
        # What the application has begun when the connection left the pool would be rolled back when it returns.
        and (not in_transaction(connection) if alone else _has_begun(connection))
        # Whoever has told SQLAlchemy to keep no prepared statements has a pooler that loses them.
        and getattr(connection.connection.dbapi_connection, "_prepared_statement_cache", None) is not None
    )


def _has_listeners(connection: Connection) -> bool:
    """Whether somebody listens to its statements.

    To look for them takes long on a new connection, and SQLAlchemy knows whether there has ever been one of any kind.
    """
    for target in (connection, connection.engine):
        if target._has_events:  # pyright: ignore[reportPrivateUsage]
            dispatch = target.dispatch
            if dispatch.before_cursor_execute or dispatch.after_cursor_execute:
                return True
    return False


def _has_begun(connection: Connection) -> bool:
    """Whether SQLAlchemy's transaction is there on the server, which it is from the first statement on, and usable."""
    innermost = connection.get_nested_transaction() or connection.get_transaction()
    adapted = connection.connection.dbapi_connection
    return innermost is not None and innermost.is_active and getattr(adapted, "_transaction", None) is not None


def in_transaction(connection: Connection) -> bool:
    """Whether the server's connection is in a transaction, whoever began it; SQLAlchemy may know nothing of it."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status.name != "IDLE")


async def run(
    connection: AsyncConnection,
    statement: Executable,
    parameters: Mapping[str, Any] | None,
    translations: Translations | None,
    *,
    alone: bool,
) -> Sequence[Row[Any]]:
    """Run a statement, with a new plan now and then.

    One that is `alone` is in no transaction, and commits by itself.
    """
    rows = await run_directly(connection, statement, parameters, translations, alone=alone)
    if rows is not None:
        return rows
    info = connection.info
    if _has_old_plans(info):
        await connection.exec_driver_sql("DISCARD PLANS")
        del info[_REPLAN]
    began = time.monotonic()
    rendered = render(statement, connection.dialect, translations)
    if rendered is None:
        result = await connection.execute(statement, parameters)
    else:
        result = await connection.exec_driver_sql(rendered.text, rendered.bind(parameters))
    rows = result.all() if result.returns_rows else ()
    _add_wait(info, time.monotonic() - began)
    return rows


async def run_directly(
    connection: AsyncConnection,
    statement: Executable,
    parameters: Mapping[str, Any] | None,
    translations: Translations | None,
    *,
    alone: bool,
) -> Sequence[Row[Any]] | None:
    """As :func:`run`; but None, and nothing is done, where SQLAlchemy has to execute it."""
    inner = cast("Connection", connection.sync_connection)
    rendered = render(statement, inner.dialect, translations)
    if rendered is None or not leads_directly(inner, alone=alone):
        return None
    info = inner.connection.info
    if _has_old_plans(info):
        await _fetch_ours(connection, "DISCARD PLANS")
        del info[_REPLAN]
    began = time.monotonic()
    rows = await _fetch_ours(connection, rendered.text, rendered.bind(parameters), again=alone)
    _add_wait(info, time.monotonic() - began)
    return rows


def _has_old_plans(info: dict[Any, Any]) -> bool:
    """Whether a connection's plans are to be renewed.

    The server keeps one plan for whatever values, which is right for tables of the size that they had when it was
    made. Queues grow from nothing to millions sooner than autovacuum looks at them. A connection that is waited for
    much may have such a plan; one that is not has no need of others.
    """
    since, waited = cast("tuple[float, float]", info.get(_REPLAN, (0.0, 0.0)))
    return waited >= REPLAN_SECONDS and time.monotonic() - since >= REPLAN_INTERVAL


def _add_wait(info: dict[Any, Any], seconds: float) -> None:
    since, waited = info.get(_REPLAN, (time.monotonic() - seconds, 0.0))
    info[_REPLAN] = since, waited + seconds


def run_within(
    connection: Connection, statement: Executable, parameters: Mapping[str, Any], translations: Translations | None
) -> Sequence[Row[Any]]:
    """Run a statement in the transaction of the application's that the connection is in; its plans are its own."""
    rendered = render(statement, connection.dialect, translations)
    if rendered is None:
        options = {} if translations is None else {"schema_translate_map": translations}
        result = connection.execute(statement, parameters, execution_options=options)
    elif leads_directly(connection, alone=False):
        return _fetch_within(connection, rendered.text, rendered.bind(parameters))
    else:
        result = connection.exec_driver_sql(rendered.text, rendered.bind(parameters))
    return result.all() if result.returns_rows else ()


async def _fetch_ours(
    connection: AsyncConnection, text: str, values: Any = (), *, again: bool = False
) -> Sequence[Row[Any]]:
    inner = cast("Connection", connection.sync_connection)
    try:
        return await _fetch(inner, text, values, again=again)
    except Exception as error:  # noqa: BLE001 - SQLAlchemy tells what is an error of the database
        return await connection.run_sync(_raise, error, text, values)


def _fetch_within(connection: Connection, text: str, values: Any) -> Sequence[Row[Any]]:
    adapted: Any = connection.connection.dbapi_connection

    async def fetch(_: Any) -> Sequence[Row[Any]]:
        # Several of the application's tasks may have statements for one connection, which takes one at a time.
        async with adapted._execute_mutex:
            return await _fetch(connection, text, values, again=False)

    try:
        return cast("Sequence[Row[Any]]", adapted.run_async(fetch))
    except Exception as error:  # noqa: BLE001 - SQLAlchemy tells what is an error of the database
        _raise(connection, error, text, values)


async def _fetch(connection: Connection, text: str, values: Any, *, again: bool) -> Sequence[Row[Any]]:
    """The rows of a statement, which may be sent `again` if a migration has changed what it gives.

    Nothing has been executed then; but a transaction that it was in is over.
    """
    try:
        records = await (await _prepared(connection, text)).fetch(*values)
    except asyncpg.InvalidCachedStatementError:
        _forget(connection, text)
        if not again:
            raise
        records = await (await _prepared(connection, text)).fetch(*values)
    if not records:
        return []
    row = _row(tuple(records[0].keys()))
    return [row(record) for record in records]


async def _prepared(connection: Connection, text: str) -> Any:
    """The statement as it is prepared on the connection, under a name that no other client of a pooler uses.

    By the names that asyncpg makes, a pooler that mixes up connections would find statements of other processes.
    """
    prepared: dict[str, Any] = connection.info.setdefault(_PREPARED, {})
    if text not in prepared:
        driver: Any = connection.connection.driver_connection
        prepared[text] = await driver.prepare(text, name=f"durable_{uuid.uuid4().hex}")
    return prepared[text]


def _forget(connection: Connection, text: str) -> None:
    connection.info.get(_PREPARED, {}).pop(text, None)


@functools.lru_cache(maxsize=256)
def _row(keys: tuple[str, ...]) -> Callable[[Any], Row[Any]]:
    """What makes rows of records. SQLAlchemy's results make them the same way, but take longer to set up than a row."""
    metadata = SimpleResultMetaData(keys)
    indexes = metadata._key_to_index  # pyright: ignore[reportPrivateUsage]
    return cast("Callable[[Any], Row[Any]]", functools.partial(Row, metadata, None, indexes))


def _raise(connection: Connection, error: Exception, statement: str, parameters: Any) -> NoReturn:
    """Raise what SQLAlchemy would have raised, and have it draw its conclusions about the connection and the pool."""
    adapted: Any = connection.connection.dbapi_connection
    dialect: Any = connection.dialect
    try:
        adapted._handle_exception(error)
    except dialect.loaded_dbapi.Error as translated:
        connection._handle_dbapi_exception(translated, statement, parameters, None, None)  # pyright: ignore[reportPrivateUsage]
    raise error
