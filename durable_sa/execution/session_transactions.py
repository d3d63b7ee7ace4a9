"""Transaction steps in threads, on a synchronous session of the application."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Any, Generic, TypeAlias, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..database.failover import Timeline
from ..database.synchronous import SyncDatabase
from ..database_errors import UNTRANSLATABLE, is_lost, is_mixed_up, is_transient, sqlstate
from ..serialization.codec import Codec, check_size, in_ascii
from ..statements import checkpoints
from .guards import guarded
from .run import Run
from .transactions import Interrupted, Untranslatable, end_cancelled, lose, refuse_awaitable, repeated

T = TypeVar("T")

InThread: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""A function that calls another one in a thread, and returns its result."""


class _Ended(Enum):
    """The reason why an attempt has no checkpoint although its function has returned."""

    LOST = auto()
    """The run has lost its task."""
    CANCELLED = auto()
    """The transaction has cancelled the task. It alone is committed, all others are rolled back."""
    RECORDED = auto()
    """An earlier attempt was committed although its reply was lost."""
    ABANDONED = auto()
    """The caller was cancelled."""


async def run_session_transaction(
    run: Run,
    database: SyncDatabase,
    timeline: Timeline,
    in_thread: InThread,
    key: uuid.UUID,
    name: str,
    codec: Codec[T],
    fn: Callable[[Session], Any],
) -> T:
    """Run `fn` in a thread, on a session whose transaction ends with the fence and the checkpoint.

    It is the same as :func:`.transactions.run_transaction` in all else. The thread of a caller that was cancelled
    finishes `fn` and rolls back.
    """
    what = f"the result of transaction {name!r}"

    async def attempt(ascii_only: bool) -> T:
        transaction = _Transaction(run, database, timeline, key, name, codec, fn, ascii_only)
        try:
            result: T | _Ended = await in_thread(transaction.execute)
        except asyncio.CancelledError:
            transaction.abandoned = True
            raise
        if result is _Ended.LOST:
            await lose(run, name)
        if result is _Ended.CANCELLED:
            end_cancelled(run)
        if isinstance(result, _Ended):
            stored = await run.host.reader.checkpoint(run.claimed.task_id, key)
            return codec.decode(stored or "null", what)
        return result

    return await repeated(run, key, attempt)


class _Transaction(Generic[T]):
    """One attempt."""

    def __init__(
        self,
        run: Run,
        database: SyncDatabase,
        timeline: Timeline,
        key: uuid.UUID,
        name: str,
        codec: Codec[T],
        fn: Callable[[Session], Any],
        ascii_only: bool,
    ) -> None:
        self.abandoned = False
        """True if the caller does not wait for it any more, so that it must not be committed."""
        self._run = run
        self._database = database
        self._timeline = timeline
        self._key = key
        self._name = name
        self._codec = codec
        self._fn = fn
        self._ascii_only = ascii_only
        self._call, self._began = run.steps[key]

    def execute(self) -> T | _Ended:
        """Begin the transaction, call the function, and commit; all in the calling thread."""
        try:
            session, connection = self._database.begin(self._timeline)
        except Exception as error:
            if is_transient(error):
                raise Interrupted from error
            raise
        try:
            return self._execute(session, connection)
        except SQLAlchemyError as error:
            if is_mixed_up(error) or is_lost(error):
                session.invalidate()
            raise
        finally:
            session.close()

    def _execute(self, session: Session, connection: Connection) -> T | _Ended:
        what = f"the result of transaction {self._name!r}"
        with guarded(session, connection, self._name, joined=False), self._database.scoped(session):
            result = self._fn(session)
            refuse_awaitable(result, what)
            session.flush()
        text, value = self._codec.round_trip(result, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        ended = self._record(connection, in_ascii(text) if self._ascii_only else text)
        if self.abandoned:
            ended = _Ended.ABANDONED
        if ended is None or ended is _Ended.CANCELLED:
            session.commit()
        return value if ended is None else ended

    def _record(self, connection: Connection, text: str) -> _Ended | None:
        """Take the fence and write the checkpoint; return why it is not written, if so."""
        claimed = self._run.claimed
        fenced = {"task_id": claimed.task_id, "fence": claimed.fence}
        try:
            if not self._database.execute(connection, checkpoints.LOCK_UNDER_FENCE, fenced):
                cancelled = self._database.execute(connection, checkpoints.CANCELLED_IN_TRANSACTION, fenced)
                return _Ended.CANCELLED if cancelled else _Ended.LOST
            if not self._database.execute(
                connection,
                checkpoints.RECORD_IN_TRANSACTION,
                {
                    "task_id": claimed.task_id,
                    "key": self._key,
                    "name": self._name,
                    "value": text,
                    "duration": time.monotonic() - self._began,
                    "arguments": self._call.summary,
                },
            ):
                return _Ended.RECORDED
        except SQLAlchemyError as error:
            if is_transient(error):
                raise Interrupted from error
            if sqlstate(error) == UNTRANSLATABLE and not text.isascii():
                raise Untranslatable from error
            raise
        return None
