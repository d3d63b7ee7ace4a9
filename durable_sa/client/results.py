"""Results of tasks for callers without an event loop, and in the caller's transaction."""

from __future__ import annotations

import time
import uuid
from collections.abc import Coroutine
from typing import Any, Final, TypeVar, overload

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..concurrency.threads import in_event_loop
from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, perform_within
from ..database_errors import is_transient
from ..errors import InvalidState, TaskNotFound
from ..results import SpawnResult, TaskHandle, TaskPollResult
from ..statements import waits
from ..validation import Duration, seconds
from .tasks import Tasks

T = TypeVar("T")

_FIRST_POLL: Final = 0.002
_LONGEST_POLL: Final = 0.25
"""Seconds between polls."""


class Results(Tasks):
    """The part of a client that returns results of tasks without an event loop."""

    @overload
    def get_task_result_with(
        self, session: AsyncSession | async_scoped_session[Any] | AsyncConnection, task: SpawnResult[T] | TaskHandle[T]
    ) -> Coroutine[Any, Any, TaskPollResult[T] | None]: ...
    @overload
    def get_task_result_with(
        self, session: AsyncSession | async_scoped_session[Any] | AsyncConnection, task: uuid.UUID
    ) -> Coroutine[Any, Any, TaskPollResult[Any] | None]: ...
    @overload
    def get_task_result_with(
        self, session: Session | scoped_session[Any] | Connection, task: SpawnResult[T] | TaskHandle[T]
    ) -> TaskPollResult[T] | None: ...
    @overload
    def get_task_result_with(
        self, session: Session | scoped_session[Any] | Connection, task: uuid.UUID
    ) -> TaskPollResult[Any] | None: ...
    def get_task_result_with(
        self, session: SessionOrConnection, task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]
    ) -> Any:
        """Return what :meth:`get_task_result` does, as the caller's transaction sees it."""
        task_id = self._task_id(task)

        def script(_: Hint) -> Script[TaskPollResult[Any] | None]:
            rows = yield waits.POLL_TASKS, {"task_ids": [task_id]}
            return self._poll_result(rows[0]) if rows else None

        return perform_within(session, self.schema, script)

    @overload
    def wait_for_result_sync(
        self, task: SpawnResult[T] | TaskHandle[T], *, timeout: Duration | None = None
    ) -> TaskPollResult[T]: ...
    @overload
    def wait_for_result_sync(self, task: uuid.UUID, *, timeout: Duration | None = None) -> TaskPollResult[Any]: ...
    def wait_for_result_sync(
        self, task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any], *, timeout: Duration | None = None
    ) -> Any:
        """Wait until a task has ended, as :meth:`wait_for_result` does, and block the calling thread meanwhile.

        It polls on a connection of its own, taken from the synchronous engine of this client, and holds none between
        polls. So commit the spawn before, or it waits for a task that does not exist.

        Raises:
            TaskNotFound: there is no such task.
            TimeoutError: it has not ended after `timeout` seconds; says how it stands.
            InvalidState: an event loop runs in this thread.
            InvalidConfiguration: the driver is asyncpg, which has no synchronous form, and there is no `sync_bind`.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        task_id = self._task_id(task)
        if in_event_loop():
            raise InvalidState(
                "The event loop of this thread",
                "running, and wait_for_result_sync would block it",
                "Use `await durable.wait_for_result(...)`.",
            )
        database = self.require_sync_database()
        deadline = None if limit is None else time.monotonic() + limit
        pause = _FIRST_POLL
        rows = database.read(waits.POLL_TASKS, {"task_ids": [task_id]})
        while rows and rows[0].outcome is None:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise self._overdue(task_id, limit, rows[0])
            time.sleep(pause if remaining is None else min(pause, remaining))
            pause = min(_LONGEST_POLL, pause * 1.1)
            try:
                rows = database.read(waits.POLL_TASKS, {"task_ids": [task_id]})
            except (SQLAlchemyError, OSError) as error:
                # Once the database has answered, it may go away and come back.
                if not is_transient(error):
                    raise
        if not rows:
            raise TaskNotFound(task_id)
        return self._poll_result(rows[0])

    def _close_sync(self) -> None:
        """Dispose of the synchronous engine, if one was made for this client."""
        if self._sync_database is not None and self._sync_database[1] is not None:
            self._sync_database[1].close()
