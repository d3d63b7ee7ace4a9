"""Transaction steps: the user's writes and the checkpoint in one commit, under the fence."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session, SessionTransaction

from .annotations import is_coroutine_function
from .codec import Codec, check_size
from .connections import backoff, discard, is_conflict
from .errors import InvalidState
from .signals import LeaseLost
from .statements import checkpoints

if TYPE_CHECKING:
    from .client import Durable
    from .run import Run

T = TypeVar("T")

ATTEMPTS = 5
"""How often a transaction is run again from its beginning, after losing against another or losing its connection."""


async def run_transaction(
    run: Run,
    durable: Durable[Any],
    key: uuid.UUID,
    name: str,
    codec: Codec[T],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """Run `fn` on a session whose transaction ends with the fence and the checkpoint.

    The fence is locked last: held from the beginning, it would block the checkpoints of parallel branches for as long
    as `fn` takes. After a lost commit nobody knows what happened, so the next try looks for the checkpoint, under the
    lock, before it commits another one.
    """
    for attempt in range(ATTEMPTS):
        await run.enter()
        connection = await durable.database.transactional()
        try:
            return await _once(run, durable, connection, key, name, codec, fn, args, kwargs)
        except SQLAlchemyError as error:
            if attempt + 1 == ATTEMPTS or not is_conflict(error):
                raise
        finally:
            await _give_back(connection)
        await asyncio.sleep(backoff(attempt))
    raise AssertionError("unreachable")


async def _once(
    run: Run,
    durable: Durable[Any],
    connection: AsyncConnection,
    key: uuid.UUID,
    name: str,
    codec: Codec[T],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    what = f"the result of transaction {name!r}"
    async with connection.begin() as transaction:
        if is_coroutine_function(fn):
            session = durable.database.session(connection)
            with _Guard(session.sync_session, name):
                result = await fn(session, *args, **kwargs)
            await session.flush()
        else:
            session = durable.database.session(connection)

            def call(sync_session: Session) -> Any:
                with _Guard(sync_session, name):
                    outcome = fn(sync_session, *args, **kwargs)
                sync_session.flush()
                return outcome

            result = await session.run_sync(call)
        text, value = codec.round_trip(result, what)
        check_size(text, run.host.max_payload_bytes, what)
        locked = await connection.execute(
            checkpoints.LOCK_UNDER_FENCE, {"task_id": run.claimed.task_id, "fence": run.claimed.fence}
        )
        if locked.first() is None:
            await transaction.rollback()
            run.take_away(LeaseLost())
            raise LeaseLost
        written = await connection.execute(
            checkpoints.RECORD_IN_TRANSACTION,
            {"task_id": run.claimed.task_id, "key": key, "name": name, "value": text},
        )
        if written.first() is not None:
            return value
        # The commit of an earlier try went through although its reply was lost: what it stored counts, not this try.
        await transaction.rollback()
    stored = await run.host.reader.checkpoint(run.claimed.task_id, key)
    return codec.decode(stored or "null", what)


class _Guard:
    """Refuses a commit or rollback of the whole transaction by the code inside; savepoints are its own."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name

    def __enter__(self) -> None:
        event.listen(self._session, "before_commit", self._refuse)
        event.listen(self._session, "after_soft_rollback", self._refuse_rollback)

    def __exit__(self, *_: object) -> None:
        event.remove(self._session, "before_commit", self._refuse)
        event.remove(self._session, "after_soft_rollback", self._refuse_rollback)

    def _refuse(self, session: Session) -> None:
        if session.in_nested_transaction():
            return
        raise InvalidState(
            f"The session of transaction {self._name!r}",
            "committed by the engine, together with the checkpoint",
            "Remove the commit(); use begin_nested() for a part that may be rolled back alone.",
        )

    def _refuse_rollback(self, session: Session, previous: SessionTransaction) -> None:
        if previous.parent is None:
            raise InvalidState(
                f"The session of transaction {self._name!r}",
                "rolled back by the engine if its function raises",
                "Raise an exception instead of calling rollback().",
            )


async def _give_back(connection: AsyncConnection) -> None:
    closing = asyncio.ensure_future(connection.close())
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await discard(connection)
        raise
