"""Transaction steps: the application's writes and the checkpoint in one commit, under the fence."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, AsyncTransaction
from sqlalchemy.orm import SessionTransaction

from ..database.closing import begun, discard, give_back
from ..database.connections import Database
from ..database_errors import (
    UNTRANSLATABLE,
    backoff,
    is_conflict,
    is_lost,
    is_mixed_up,
    is_transient,
    retrying,
    sqlstate,
)
from ..errors import InvalidState, SerializationError
from ..serialization.annotations import is_coroutine_function
from ..serialization.codec import Codec, check_size, in_ascii
from ..signals import LeaseLost
from ..statements import checkpoints
from .run import Run

T = TypeVar("T")

MAX_CONFLICTS = 5
"""After so many serialization failures and deadlocks, the error is raised."""
MAX_LOST_CONNECTIONS = 20
"""After so many lost connections, the error is raised. Few are due to `fn`, but its query may crash the server."""

_COMMITTED: Final = (
    "committed by the engine, together with the checkpoint",
    "Remove the commit(); use begin_nested() for a part that may be rolled back alone.",
)
_ROLLED_BACK: Final = (
    "rolled back by the engine if its function raises",
    "Raise an exception instead of calling rollback().",
)
_CLOSED: Final = (
    "closed by the engine, and what is written before that is undone by a close() of one's own",
    "Remove the close(), or the `async with` or `with` around the session.",
)
_ONE_BIND: Final = (
    "Give the client a sessionmaker whose sessions leave the choice to their bind, and go to other databases in a step."
)
_ENDING: Final = re.compile(
    r"\s*(?:(?P<commit>commit|end|prepare\s+transaction)|(?:rollback|abort)(?!\s+(?:work\s+|transaction\s+)?to\b))\b",
    re.IGNORECASE,
)


async def run_transaction(
    run: Run,
    database: Database,
    key: uuid.UUID,
    name: str,
    codec: Codec[T],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """Run `fn` on a session whose transaction ends with the fence and the checkpoint.

    The fence is locked last: held from the beginning, it would block the checkpoints of parallel branches for as long
    as `fn` takes. After a lost reply to a commit its outcome is unknown, so the next attempt looks for the checkpoint,
    under the lock, before it commits another one.
    """
    conflicts = lost = interruptions = 0
    ascii_only = False
    while True:
        await run.enter()
        connection = await retrying(database.transactional)
        try:
            return await _attempt(run, database, connection, key, name, codec, fn, args, kwargs, ascii_only)
        except _Interrupted:
            interruptions += 1
        except _Untranslatable:
            ascii_only = True
        except SQLAlchemyError as error:
            # The engine's own SAVEPOINT is the first statement that a pooler may mix up.
            mixed_up = is_mixed_up(error)
            if mixed_up or is_lost(error):
                lost += 1
                await discard(connection)
            else:
                conflicts += 1
            if lost == MAX_LOST_CONNECTIONS or conflicts == MAX_CONFLICTS or not (mixed_up or is_conflict(error)):
                raise
        finally:
            await _close(connection)
        # The next call of `fn` makes the same durable calls as this one, so their occurrences are counted from 0.
        run.branch().begin_anew()
        run.steps[key] = name, time.monotonic()
        await asyncio.sleep(backoff(conflicts + lost + interruptions))


async def _attempt(
    run: Run,
    database: Database,
    connection: AsyncConnection,
    key: uuid.UUID,
    name: str,
    codec: Codec[T],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ascii_only: bool,
) -> T:
    what = f"the result of transaction {name!r}"
    async with _transaction(connection) as transaction:
        session = database.session(connection)
        async with _guarded(session, connection, name):
            if is_coroutine_function(fn):
                result = await fn(session, *args, **kwargs)
            else:
                result = await session.run_sync(fn, *args, **kwargs)
                refuse_awaitable(result, what)
            await session.flush()
        text, value = codec.round_trip(result, what)
        check_size(text, run.host.max_payload_bytes, what)
        if ascii_only:
            text = in_ascii(text)
        try:
            locked = await database.execute_on(
                connection,
                checkpoints.LOCK_UNDER_FENCE,
                {"task_id": run.claimed.task_id, "fence": run.claimed.fence},
            )
            if not locked:
                run.take_away(LeaseLost())
                raise LeaseLost
            written = await database.execute_on(
                connection,
                checkpoints.RECORD_IN_TRANSACTION,
                {"task_id": run.claimed.task_id, "key": key, "name": name, "value": text},
            )
        except SQLAlchemyError as error:
            if is_transient(error):
                raise _Interrupted from error
            if sqlstate(error) == UNTRANSLATABLE and not text.isascii():
                raise _Untranslatable from error
            raise
        if written:
            return value
        # An earlier attempt was committed although its reply was lost, so its result counts, and this one is undone.
        await transaction.rollback()
    stored = await run.host.reader.checkpoint(run.claimed.task_id, key)
    return codec.decode(stored or "null", what)


def refuse_awaitable(result: object, what: str) -> None:
    """Refuse the awaitable that a plain function returns if it calls a coroutine function: `lambda s: save(s)`.

    Awaiting it would not help, because the function was called with a `Session`.

    Raises:
        SerializationError: with what to write instead.
    """
    if not inspect.isawaitable(result):
        return
    if inspect.iscoroutine(result):
        result.close()  # or Python warns that it was never awaited
    raise SerializationError(
        what,
        f"is a {type(result).__name__}, which is never awaited, as its function is a plain one that gets a Session. "
        "Pass the coroutine function itself, followed by its arguments, or write an `async def` instead of a lambda",
    )


class _Interrupted(Exception):  # noqa: N818
    """A statement of the engine's own has failed for a while, which is retried without limit: `fn` is not the cause."""


class _Untranslatable(Exception):  # noqa: N818
    """The encoding of the database lacks a character of the result, which is retried once with escapes."""


@asynccontextmanager
async def _transaction(connection: AsyncConnection) -> AsyncGenerator[AsyncTransaction]:
    """Begin a transaction that is over after the block, even if its commit or rollback was refused.

    SQLAlchemy takes a refused transaction for ended although nothing was sent. The pool would hand its connection on
    with uncommitted writes, for the next transaction to commit.
    """
    async with begun(connection) as transaction:
        try:
            yield transaction
        except BaseException:
            if not transaction.is_active:
                await discard(connection)
            raise


@asynccontextmanager
async def _guarded(session: AsyncSession, connection: AsyncConnection, name: str) -> AsyncGenerator[None]:
    """Refuse to let the code inside end the whole transaction, even if it catches the refusal.

    Refused are a commit, a rollback, either of them as SQL, and a close of the session, which undoes its writes.
    Savepoints are allowed. Another connection is refused as well, because its transaction would never be committed: a
    session may have classes of another database, or choose its engine by itself.
    """
    what = f"The session of transaction {name!r}"
    refusals: list[InvalidState] = []
    others: list[Connection] = []

    def refuse(refusal: tuple[str, str]) -> NoReturn:
        refusals.append(InvalidState(what, *refusal))
        raise refusals[0]

    def refuse_commit(target: object) -> None:
        if target is connection.sync_connection or not session.in_nested_transaction():
            refuse(_COMMITTED)

    def refuse_rollback(_: object, previous: SessionTransaction | None = None) -> None:
        if previous is None or previous.parent is None:
            refuse(_ROLLED_BACK)

    def refuse_sql(_: object, __: object, statement: str, *___: object) -> None:
        if ending := _ENDING.match(statement):
            refuse(_COMMITTED if ending["commit"] else _ROLLED_BACK)

    def note_close(_: object, ended: SessionTransaction) -> None:
        # Noted, not raised: a session is also closed because of an exception, which must not be replaced.
        if ended.parent is None:
            refusals.append(InvalidState(what, *_CLOSED))

    def refuse_others(_: object, __: object, begun: Connection) -> None:
        if begun is not connection.sync_connection:
            others.append(begun)
            database = begun.engine.url.database
            refuse((f"about to use another connection, to {database!r}, whose transaction is not this one", _ONE_BIND))

    listeners: list[tuple[object, str, Callable[..., None]]] = [
        (session.sync_session, "after_begin", refuse_others),
        (session.sync_session, "before_commit", refuse_commit),
        (session.sync_session, "after_soft_rollback", refuse_rollback),
        (session.sync_session, "after_transaction_end", note_close),
        (connection.sync_connection, "commit", refuse_commit),
        (connection.sync_connection, "rollback", refuse_rollback),
        (connection.sync_connection, "before_cursor_execute", refuse_sql),
    ]
    for target, event_name, listener in listeners:
        event.listen(target, event_name, listener)
    try:
        yield
        if refusals:
            raise refusals[0]
    finally:
        for target, event_name, listener in listeners:
            event.remove(target, event_name, listener)
        for other in others:
            await session.run_sync(_close_in_greenlet, other)


def _close_in_greenlet(_: object, connection: Connection) -> None:
    connection.close()


async def _close(connection: AsyncConnection) -> None:
    """Return the connection to the pool, or discard it if the caller is cancelled meanwhile."""
    closing = asyncio.ensure_future(give_back(connection))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await discard(connection)
        raise
