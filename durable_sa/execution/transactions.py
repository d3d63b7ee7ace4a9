"""Transaction steps: the application's writes and the checkpoint in one commit, under the fence."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar, cast

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, AsyncTransaction

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
from ..signals import LeaseLost, TaskCancelled
from ..statements import checkpoints
from .guards import guarded
from .run import Run

T = TypeVar("T")

MAX_CONFLICTS = 5
"""After so many serialization failures and deadlocks, the error is raised."""
MAX_LOST_CONNECTIONS = 20
"""After so many lost connections, the error is raised. Few are due to `fn`, but its query may crash the server."""


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

    async def attempt(ascii_only: bool) -> T:
        connection = await retrying(database.transactional)
        try:
            return await _attempt(run, database, connection, key, name, codec, fn, args, kwargs, ascii_only)
        except SQLAlchemyError as error:
            # The engine's own SAVEPOINT is the first statement that a pooler may mix up.
            if is_mixed_up(error) or is_lost(error):
                await discard(connection)
            raise
        finally:
            await _close(connection)

    return await repeated(run, key, attempt)


async def repeated(run: Run, key: uuid.UUID, attempt: Callable[[bool], Awaitable[T]]) -> T:
    """Attempt a transaction until it is committed, with results in ASCII once the database has refused another."""
    conflicts = lost = interruptions = 0
    ascii_only = False
    while True:
        await run.enter()
        try:
            return await attempt(ascii_only)
        except Interrupted:
            interruptions += 1
        except Untranslatable:
            ascii_only = True
        except SQLAlchemyError as error:
            mixed_up = is_mixed_up(error)
            if mixed_up or is_lost(error):
                lost += 1
            else:
                conflicts += 1
            if lost == MAX_LOST_CONNECTIONS or conflicts == MAX_CONFLICTS or not (mixed_up or is_conflict(error)):
                raise
        # The next call of `fn` makes the same durable calls as this one, so their occurrences are counted from 0.
        run.branch().begin_anew()
        run.steps[key] = run.steps[key][0], time.monotonic()
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
    fenced = {"task_id": run.claimed.task_id, "fence": run.claimed.fence}
    written: Any = None
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
            locked = await database.execute_on(connection, checkpoints.LOCK_UNDER_FENCE, fenced)
            if locked:
                call, began = run.steps[key]
                written = await database.execute_on(
                    connection,
                    checkpoints.RECORD_IN_TRANSACTION,
                    {
                        "task_id": run.claimed.task_id,
                        "key": key,
                        "name": name,
                        "value": text,
                        "duration": time.monotonic() - began,
                        "arguments": call.summary,
                    },
                )
            elif not await database.execute_on(connection, checkpoints.CANCELLED_IN_TRANSACTION, fenced):
                await lose(run, name)
        except Exception as error:
            if is_transient(error):
                raise Interrupted from error
            if sqlstate(error) == UNTRANSLATABLE and not text.isascii():
                raise Untranslatable from error
            raise
        if written:
            return value
        if locked:
            # An earlier attempt was committed although its reply was lost: its result counts, and this one is undone.
            await transaction.rollback()
    if not locked:
        end_cancelled(run)
    stored = await run.host.reader.checkpoint(run.claimed.task_id, key)
    return codec.decode(stored or "null", what)


def end_cancelled(run: Run) -> NoReturn:
    """End a run whose transaction has cancelled its own task, and is committed."""
    run.take_away(TaskCancelled())
    raise TaskCancelled


async def lose(run: Run, name: str) -> NoReturn:
    """End a run whose transaction does not find the task under the fence.

    Raises:
        LeaseLost: the run has lost its task.
        InvalidState: it has not, so the transaction itself has changed the task, for no other worker to take over.
    """
    if await run.host.reader.ownership(run.claimed.key) is None:
        raise InvalidState(
            f"Task {run.claimed.task_id}",
            f"restarted by its own transaction {name!r}",
            "Spawn another task instead; a task may cancel itself, and no more.",
        )
    run.take_away(LeaseLost())
    raise LeaseLost


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


class Interrupted(Exception):  # noqa: N818
    """A statement of the engine's own has failed for a while, which is retried without limit: `fn` is not the cause."""


class Untranslatable(Exception):  # noqa: N818
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
    """Guard the session of a transaction, and close other connections that its code has begun to use."""
    inner = cast("Connection", connection.sync_connection)
    others: list[Connection] = []
    try:
        with guarded(session.sync_session, inner, name, joined=True) as others:
            yield
    finally:
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
