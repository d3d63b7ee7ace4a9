"""Statements in the caller's transaction, whichever of SQLAlchemy's six executors it is held by.

The asynchronous three (`AsyncSession`, `async_scoped_session`, `AsyncConnection`) give a coroutine; the synchronous
three (`Session`, `scoped_session`, `Connection`) run at once. Nothing is flushed, committed or closed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..database_errors import UNDEFINED_TABLE, sqlstate
from ..models import SCHEMA, TaskRow
from .connections import is_autocommit
from .direct import run_within
from .notifier import Hint, channel_name, send_after_commit
from .rendering import Translations

T = TypeVar("T")

AsyncSessionOrConnection: TypeAlias = AsyncSession | async_scoped_session[Any] | AsyncConnection
SyncSessionOrConnection: TypeAlias = Session | scoped_session[Any] | Connection
SessionOrConnection: TypeAlias = AsyncSessionOrConnection | SyncSessionOrConnection

Script = Generator[tuple[Executable, Mapping[str, Any]], Sequence[Row[Any]], T]
"""Work that yields statements, is sent their rows, and returns its result; so it is written once for both worlds."""


def perform(
    executor: SessionOrConnection,
    schema: str,
    script: Callable[[Hint], Script[T]],
    *,
    in_autocommit: Callable[[Hint], Script[T]] | None = None,
) -> T | Coroutine[Any, Any, T]:
    """Run a script in the caller's transaction; what it adds to the hint is sent after the commit.

    `in_autocommit` is run instead where there is no transaction, but a connection whose statements commit at once.

    Raises:
        TypeError: the executor is none of the six.
    """
    if isinstance(executor, AsyncSession | async_scoped_session | AsyncConnection):
        return _perform_async(executor, schema, script, in_autocommit)
    if isinstance(executor, Session | scoped_session | Connection):  # pyright: ignore[reportUnnecessaryIsInstance]
        connection = executor if isinstance(executor, Connection) else _connection(executor)
        return _run(connection, schema, script, in_autocommit)
    raise TypeError(
        f"expected a Session, scoped_session, Connection, AsyncSession, async_scoped_session or AsyncConnection, "
        f"not {type(executor).__name__}"
    )


def _connection(session: Session | scoped_session[Any]) -> Connection:
    """The session's connection for durable's tables; asking for it does not flush."""
    return session.connection(bind_arguments={"mapper": TaskRow})


async def _perform_async(
    executor: AsyncSessionOrConnection,
    schema: str,
    script: Callable[[Hint], Script[T]],
    in_autocommit: Callable[[Hint], Script[T]] | None,
) -> T:
    if isinstance(executor, AsyncConnection):
        return await executor.run_sync(_run, schema, script, in_autocommit)
    session: AsyncSession = executor() if isinstance(executor, async_scoped_session) else executor
    return await session.run_sync(lambda inner: _run(_connection(inner), schema, script, in_autocommit))


def _run(
    connection: Connection,
    schema: str,
    script: Callable[[Hint], Script[T]],
    in_autocommit: Callable[[Hint], Script[T]] | None,
) -> T:
    if in_autocommit is not None and is_autocommit(connection):
        script = in_autocommit
    translations: Translations | None = None if schema == SCHEMA else {SCHEMA: schema}
    hint = Hint()
    steps = script(hint)
    try:
        statement, parameters = next(steps)
        while True:
            statement, parameters = steps.send(run_within(connection, statement, parameters, translations))
    except DBAPIError as error:
        if sqlstate(error) == UNDEFINED_TABLE and f"{schema}." in str(error.orig):
            from ..migrations.version import not_installed

            # On its connection nothing more can be asked.
            raise not_installed(schema) from error
        raise
    except StopIteration as end:
        if hint:
            send_after_commit(connection, channel_name(schema), hint)
        value: T = end.value
        return value
