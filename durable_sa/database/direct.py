"""One statement on one connection, by asyncpg itself where SQLAlchemy is not needed for it.

A statement that SQLAlchemy executes takes three times as much of the client's CPU time as one that asyncpg does. Where
no listener would see the difference, asyncpg is called directly: the text, the connection and the errors are the same.
SQLAlchemy executes everything for an engine that echoes, has listeners for cursors or keeps no prepared statements, for
one with another driver, and the first statement of a transaction, which begins it.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from . import private
from .rendering import Translations, render

REPLAN_INTERVAL = 1.0
"""Seconds for which the plans of a connection are kept, at least."""
REPLAN_WAIT = 0.2
"""Seconds of waiting for the server, since its plans were made, after which a connection gets new ones."""

_REPLAN = "durable_replan"
"""Key in a connection's `info`: the time since which its plans are kept, and the seconds of waiting since then."""
_PREPARED = "durable_prepared"
"""Key in a connection's `info`: the prepared statements by their text."""


def leads_directly(connection: Connection, *, alone: bool = True) -> bool:
    """Return whether asyncpg itself can execute a statement that is `alone`, or in the transaction that has begun.

    Statements that are alone then commit by themselves, whatever SQLAlchemy's isolation level.
    """
    return (
        connection.dialect.driver == "asyncpg"
        and private.all_exist(connection)
        and not _has_listeners(connection)
        and not connection.dialect.dispatch.do_execute
        and not connection.dialect.dispatch.do_execute_no_params
        and not private.echoes(connection)
        # A transaction that the application has begun at checkout would be rolled back when the connection returns.
        and (not in_transaction(connection) if alone else _has_begun(connection))
        and private.keeps_prepared_statements(connection)
    )


def _has_listeners(connection: Connection) -> bool:
    for target in (connection, connection.engine):
        if private.has_events(target):
            dispatch = target.dispatch
            if dispatch.before_cursor_execute or dispatch.after_cursor_execute:
                return True
    return False


def _has_begun(connection: Connection) -> bool:
    """Return whether SQLAlchemy's transaction is usable and exists on the server: from its first statement on."""
    innermost = connection.get_nested_transaction() or connection.get_transaction()
    return innermost is not None and innermost.is_active and private.has_server_transaction(connection)


def in_transaction(connection: Connection) -> bool:
    """Return whether the server's connection is in a transaction, even one that SQLAlchemy did not begin."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status.name != "IDLE")


async def execute(
    connection: AsyncConnection,
    statement: Executable,
    parameters: Mapping[str, Any] | None,
    translations: Translations | None,
    *,
    directly: bool,
    alone: bool,
) -> Sequence[Row[Any]]:
    """Execute a statement, `directly` by asyncpg or by SQLAlchemy, with new plans now and then.

    A statement that is `alone` is in no transaction: it commits by itself, and may be prepared and sent a second time.
    """
    inner = cast("Connection", connection.sync_connection)
    info = inner.connection.info
    rendered = render(statement, inner.dialect, translations)
    if _has_old_plans(info):
        if directly:
            await _fetch_translating(connection, "DISCARD PLANS", (), repeatable=False)
        else:
            await connection.exec_driver_sql("DISCARD PLANS")
        del info[_REPLAN]
    began = time.monotonic()
    rows: Sequence[Row[Any]]
    values = rendered.bind(parameters)
    if directly:
        rows = await _fetch_translating(connection, rendered.text, values, repeatable=alone)
    else:
        result = await connection.exec_driver_sql(rendered.text, values)
        rows = result.all() if result.returns_rows else ()
    _add_wait(info, time.monotonic() - began)
    return rows


def execute_within(
    connection: Connection, statement: Executable, parameters: Mapping[str, Any], translations: Translations | None
) -> Sequence[Row[Any]]:
    """Execute a statement in the application's transaction on a connection; the connection keeps its plans."""
    rendered = render(statement, connection.dialect, translations)
    values = rendered.bind(parameters)
    if leads_directly(connection, alone=False):
        return _fetch_within(connection, rendered.text, values)
    result = connection.exec_driver_sql(rendered.text, values)
    return result.all() if result.returns_rows else ()


def _has_old_plans(info: dict[Any, Any]) -> bool:
    """Return whether a connection's plans are to be renewed.

    The server keeps one plan for all values, which is right for tables of the size that they had when it was made.
    Queues grow from nothing to millions before autovacuum analyzes them. A connection with long waits may have such a
    plan; one without them has no need of another.
    """
    since, waited = cast("tuple[float, float]", info.get(_REPLAN, (0.0, 0.0)))
    return waited >= REPLAN_WAIT and time.monotonic() - since >= REPLAN_INTERVAL


def _add_wait(info: dict[Any, Any], seconds: float) -> None:
    since, waited = info.get(_REPLAN, (time.monotonic() - seconds, 0.0))
    info[_REPLAN] = since, waited + seconds


async def _fetch_translating(
    connection: AsyncConnection, text: str, values: Any, *, repeatable: bool
) -> Sequence[Row[Any]]:
    inner = cast("Connection", connection.sync_connection)
    try:
        return await _fetch(inner, text, values, repeatable=repeatable)
    except Exception as error:  # noqa: BLE001 - SQLAlchemy decides which are errors of the database
        return await connection.run_sync(_raise, error, text, values)


def _fetch_within(connection: Connection, text: str, values: Any) -> Sequence[Row[Any]]:
    async def fetch(_: Any) -> Sequence[Row[Any]]:
        # asyncpg takes one statement at a time, and several of the application's tasks may share the connection.
        async with private.execute_mutex(connection):
            return await _fetch(connection, text, values, repeatable=False)

    adapted: Any = connection.connection.dbapi_connection
    try:
        return cast("Sequence[Row[Any]]", adapted.run_async(fetch))
    except Exception as error:  # noqa: BLE001 - SQLAlchemy decides which are errors of the database
        _raise(connection, error, text, values)


async def _fetch(connection: Connection, text: str, values: Any, *, repeatable: bool) -> Sequence[Row[Any]]:
    """Fetch the rows of a statement; prepare a `repeatable` one anew if a migration has changed its columns.

    Nothing has been executed then; but a transaction that the statement was in has failed.
    """
    prepared: dict[str, Any] | None = connection.info.get(_PREPARED)
    if prepared is None:
        prepared = connection.info[_PREPARED] = {}
        private.declare_array_types(connection.connection.driver_connection)
    try:
        records = await (prepared.get(text) or await _prepare(connection, prepared, text)).fetch(*values)
    except Exception as error:
        if not private.is_invalid_statement(error):
            raise
        prepared.pop(text, None)
        if not repeatable:
            raise
        records = await (await _prepare(connection, prepared, text)).fetch(*values)
    if not records:
        return []
    row = _row(tuple(records[0].keys()))
    return [row(record) for record in records]


async def _prepare(connection: Connection, prepared: dict[str, Any], text: str) -> Any:
    """Prepare a statement under a name that no other client of a pooler uses.

    By the names that asyncpg makes, a pooler that mixes up connections would find statements of other processes.
    """
    driver: Any = connection.connection.driver_connection
    statement = prepared[text] = await driver.prepare(text, name=f"durable_{uuid.uuid4().hex}")
    return statement


@functools.lru_cache(maxsize=256)
def _row(keys: tuple[str, ...]) -> Callable[[Any], Row[Any]]:
    """Return what makes rows of records. SQLAlchemy's results make the same rows, but are slower to set up."""
    metadata, indexes = private.row_metadata(keys)
    return cast("Callable[[Any], Row[Any]]", functools.partial(Row, metadata, None, indexes))


def _raise(connection: Connection, error: Exception, statement: str, parameters: Any) -> NoReturn:
    """Raise what SQLAlchemy would have raised, after it has invalidated the connection and its pool if need be."""
    private.raise_as_sqlalchemy(connection, error, statement, parameters)
    raise error
