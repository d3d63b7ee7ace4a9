"""Scripts of statements, and their two drivers: one for synchronous connections, one for asynchronous ones.

A script is written once and runs in the caller's transaction, whichever of SQLAlchemy's six executors holds that, in a
transaction of its own, or in autocommit. The driver throws the error of a statement into the script, which handles it
or lets it pass.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..concurrency.branches import detached
from ..database_errors import UNDEFINED_TABLE, backoff, is_conflict, is_lost, is_mixed_up, retrying, sqlstate
from ..errors import DurableError
from ..models import SCHEMA, TaskRow
from ..statements import maintenance
from . import direct
from .connections import Database, HeldConnection, is_autocommit
from .hint import Hint, channel_name
from .notifier import send_after_commit, sender
from .rendering import Translations

P = ParamSpec("P")
T = TypeVar("T")

AsyncSessionOrConnection: TypeAlias = AsyncSession | async_scoped_session[Any] | AsyncConnection
SyncSessionOrConnection: TypeAlias = Session | scoped_session[Any] | Connection
SessionOrConnection: TypeAlias = AsyncSessionOrConnection | SyncSessionOrConnection

Script = Generator[tuple[Executable, Mapping[str, Any]], Sequence[Row[Any]], T]
"""Work that yields statements with their parameters, is sent their rows, and returns its result."""

_TRIES = 5
_STATUS_TRIES = 12


def drive(execute: Callable[[Executable, Mapping[str, Any]], Sequence[Row[Any]]], script: Script[T]) -> T:
    """Run a script on a synchronous connection."""
    try:
        statement, parameters = next(script)
        while True:
            try:
                rows = execute(statement, parameters)
            except BaseException as error:  # noqa: BLE001 - the script raises it
                statement, parameters = script.throw(error)
            else:
                statement, parameters = script.send(rows)
    except StopIteration as end:
        value: T = end.value
        return value


async def drive_async(
    execute: Callable[[Executable, Mapping[str, Any]], Awaitable[Sequence[Row[Any]]]], script: Script[T]
) -> T:
    """Run a script on an asynchronous connection."""
    try:
        statement, parameters = next(script)
        while True:
            try:
                rows = await execute(statement, parameters)
            except BaseException as error:  # noqa: BLE001 - the script raises it
                statement, parameters = script.throw(error)
            else:
                statement, parameters = script.send(rows)
    except StopIteration as end:
        value: T = end.value
        return value


def undone_by_errors(script: Callable[[Hint], Script[T]]) -> Callable[[Hint], Script[T]]:
    """Return a script for the caller's transaction, which a `DurableError` of the script leaves as it was, and usable.

    The connection must have a transaction, as one in autocommit has not.
    """

    def within_savepoint(hint: Hint) -> Script[T]:
        yield maintenance.SAVEPOINT, {}
        try:
            result = yield from script(hint)
        except DurableError:
            yield maintenance.ROLLBACK_TO_SAVEPOINT, {}
            yield maintenance.RELEASE_SAVEPOINT, {}
            raise
        yield maintenance.RELEASE_SAVEPOINT, {}
        return result

    return within_savepoint


def perform_within(
    executor: SessionOrConnection,
    schema: str,
    script: Callable[[Hint], Script[T]],
    *,
    in_autocommit: Callable[[Hint], Script[T]] | None = None,
) -> T | Coroutine[Any, Any, T]:
    """Run a script in the caller's transaction; what it adds to the hint is sent after the commit.

    The asynchronous executors (`AsyncSession`, `async_scoped_session`, `AsyncConnection`) get a coroutine; with the
    synchronous ones (`Session`, `scoped_session`, `Connection`) the script runs at once. Nothing is flushed, committed
    or closed. `in_autocommit` runs instead on a connection that has no transaction, as its statements commit at once.

    Raises:
        TypeError: the executor is none of the six.
    """
    return call_within(executor, schema, lambda connection: _perform_within(connection, schema, script, in_autocommit))


def call_within(
    executor: SessionOrConnection, schema: str, function: Callable[[Connection], T]
) -> T | Coroutine[Any, Any, T]:
    """Call a function with the caller's connection; return a coroutine for the asynchronous executors.

    Raises:
        TypeError: the executor is none of the six.
        SchemaMismatch: the tables do not exist, or are older.
    """
    if isinstance(executor, AsyncSession | async_scoped_session | AsyncConnection):
        return _call_within_async(executor, schema, function)
    if isinstance(executor, Session | scoped_session | Connection):  # pyright: ignore[reportUnnecessaryIsInstance]
        return _call_within(executor if isinstance(executor, Connection) else _connection(executor), schema, function)
    raise TypeError(
        f"expected a Session, scoped_session, Connection, AsyncSession, async_scoped_session or AsyncConnection, "
        f"not {type(executor).__name__}"
    )


def _connection(session: Session | scoped_session[Any]) -> Connection:
    """Return the session's connection for durable's tables; asking for it does not flush."""
    return session.connection(bind_arguments={"mapper": TaskRow})


async def _call_within_async(executor: AsyncSessionOrConnection, schema: str, function: Callable[[Connection], T]) -> T:
    if isinstance(executor, AsyncConnection):
        return await executor.run_sync(_call_within, schema, function)
    session: AsyncSession = executor() if isinstance(executor, async_scoped_session) else executor
    return await session.run_sync(lambda inner: _call_within(_connection(inner), schema, function))


def _call_within(connection: Connection, schema: str, function: Callable[[Connection], T]) -> T:
    try:
        return function(connection)
    except DBAPIError as error:
        if sqlstate(error) == UNDEFINED_TABLE and f"{schema}." in str(error.orig):
            from ..migrations.version import mismatch

            # The transaction has failed, so the connection cannot be asked for the schema's version.
            raise mismatch(None, schema) from error
        raise


def _perform_within(
    connection: Connection,
    schema: str,
    script: Callable[[Hint], Script[T]],
    in_autocommit: Callable[[Hint], Script[T]] | None,
) -> T:
    if in_autocommit is not None and is_autocommit(connection):
        script = in_autocommit
    translations: Translations | None = None if schema == SCHEMA else {SCHEMA: schema}

    def execute(statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        return direct.execute_within(connection, statement, parameters, translations)

    hint = Hint()
    result = drive(execute, script(hint))
    if hint:
        send_after_commit(connection, channel_name(schema), hint)
    return result


def _shielded(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let calls of a coroutine function finish even if the caller is cancelled."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with detached():
            task = asyncio.get_running_loop().create_task(function(*args, **kwargs), name="durable:client")
        return await asyncio.shield(task)

    return call


@_shielded
async def perform_in_autocommit(database: Database, script: Callable[[Hint], Script[T]]) -> T:
    """Run a script as :func:`perform` does, but each statement commits by itself, and must be one that can be repeated.

    One statement takes one round trip this way, where a transaction takes four.
    """
    hint = Hint()
    async with HeldConnection(database) as held:
        result = await drive_async(held.execute, script(hint))
    sender(database).send(hint)
    return result


@_shielded
async def perform(database: Database, script: Callable[[Hint], Script[T]]) -> T:
    """Run a script in a transaction of its own, retry it if that loses against another one, and then send its hint."""
    try:
        done = await retrying(lambda: _perform_once(database, script), tries=_TRIES, when=_is_worth_another)
        if isinstance(done, DBAPIError):
            raise done
    except DBAPIError as error:
        await database.explain(error)
        raise
    result, hint = done
    sender(database).send(hint)
    return result


@_shielded
async def read(database: Database, function: Callable[[Connection], T]) -> T:
    """Call a function that only reads on a connection of the pool, and once more if that was lost."""

    async def call() -> T:
        async with database.transaction(explained=False) as connection:
            return await connection.run_sync(function)

    try:
        return await retrying(call, tries=_TRIES, when=_is_worth_another)
    except DBAPIError as error:
        await database.explain(error)
        raise


def _is_worth_another(error: BaseException) -> bool:
    return is_conflict(error) or is_mixed_up(error)


async def _perform_once(database: Database, script: Callable[[Hint], Script[T]]) -> tuple[T, Hint] | DBAPIError:
    """Run a script in a transaction. The error of a lost connection is returned if the commit may have succeeded.

    A retry would then take its own work for that of another transaction.
    """
    hint = Hint()
    done: tuple[T, Hint] | None = None
    transaction_id: str | None = None
    try:
        async with database.transaction(explained=False) as connection:
            result = await drive_async(functools.partial(database.execute_on, connection), script(hint))
            transaction_id = (await connection.execute(maintenance.TRANSACTION_ID)).scalar()
            done = result, hint
    except DBAPIError as error:
        if done is None or transaction_id is None or not is_lost(error):
            raise
        status = await _status(database, transaction_id)
        if status == "aborted":
            raise
        if status != "committed":
            return error
    assert done is not None  # noqa: S101 - an exception of the block is raised, or the block has come to its end
    return done


async def _status(database: Database, transaction_id: str) -> str | None:
    """Return the status of a transaction whose commit was not answered: "committed", "aborted", or None: not known."""
    status: str | None = None
    for attempt in range(_STATUS_TRIES):
        rows = await database.execute(maintenance.TRANSACTION_STATUS, {"transaction_id": transaction_id})
        status = rows[0].status
        if status != "in progress":
            break
        await asyncio.sleep(backoff(attempt))
    return status
