"""What becomes of tasks: how they stand, their results, cancelling them and putting them back."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar, overload

from sqlalchemy import Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..app import App
from ..database.batches import Batch
from ..database.loans import HeldConnection, lent
from ..database.sessions import SessionOrConnection, perform
from ..database_errors import is_transient
from ..errors import TaskNotFound
from ..options import MAX_ATTEMPTS
from ..results import SpawnResult, TaskErrorInfo, TaskHandle, TaskPollResult, TaskStatus
from ..serialization.codec import UNTYPED, Codec
from ..serialization.failures import stored_failure
from ..statements import waits
from ..validation import Duration, integer, seconds
from . import inserting

T = TypeVar("T")

_FIRST_LOOK = 1.0
"""Seconds that the first look may take, also where there is less to wait: what has ended is told without a wait."""
_FIRST_POLL = 0.002
_LONGEST_POLL = 0.25


class Tasks(App):
    """The part of a client that deals with tasks that there are."""

    async def cancel_task(self, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> TaskStatus:
        """Cancel a task and its unfinished descendants; a running one is interrupted at its next await.

        Returns the task's status: `cancelled`, or how it had ended before, which then stays.

        Raises:
            TaskNotFound: there is no such task.
        """
        return await self._perform(inserting.cancel(_id_of(task_id)))

    @overload
    def cancel_task_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any],
    ) -> Coroutine[Any, Any, TaskStatus]: ...
    @overload
    def cancel_task_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any],
    ) -> TaskStatus: ...
    def cancel_task_with(
        self, session: SessionOrConnection, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]
    ) -> Any:
        """As :meth:`cancel_task`, in the caller's transaction."""
        return perform(session, self.schema, inserting.cancel(_id_of(task_id)))

    async def retry_task(
        self, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any], *, max_attempts: int | None = None
    ) -> TaskStatus:
        """Put a failed or cancelled task back, with its checkpoints, a fresh failure count and fresh clocks.

        Descendants that its end had cancelled are put back with it. `max_attempts` replaces the task's own.

        Raises:
            TaskNotFound: there is no such task.
            InvalidState: it has not ended, or it has completed.
        """
        if max_attempts is not None:
            integer(max_attempts, "max_attempts", minimum=1, maximum=MAX_ATTEMPTS)
        return await self._perform(inserting.retry(_id_of(task_id), max_attempts))

    @overload
    async def get_task_result(self, task: SpawnResult[T] | TaskHandle[T]) -> TaskPollResult[T] | None: ...
    @overload
    async def get_task_result(self, task: uuid.UUID) -> TaskPollResult[Any] | None: ...
    async def get_task_result(self, task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> Any:
        """How a task stands, with its output or error once it has ended; None if there is no such task."""
        row = await self._polls(_id_of(task))
        return None if row is None else self._poll_result(row)

    @overload
    async def wait_for_result(
        self, task: SpawnResult[T] | TaskHandle[T], *, timeout: Duration | None = None
    ) -> TaskPollResult[T]: ...
    @overload
    async def wait_for_result(self, task: uuid.UUID, *, timeout: Duration | None = None) -> TaskPollResult[Any]: ...
    async def wait_for_result(
        self, task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any], *, timeout: Duration | None = None
    ) -> Any:
        """Wait until a task has ended, however it did. Holds no connection while waiting.

        Once the database has answered, it may go away and come back.

        Raises:
            TaskNotFound: there is no such task.
            TimeoutError: it has not ended after `timeout` seconds; says how it stands.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        task_id = _id_of(task)
        changed = asyncio.Event()
        self._changes.setdefault(task_id, set()).add(changed)
        began = asyncio.get_running_loop().time()
        deadline = asyncio.timeout(None if limit is None else max(limit, _FIRST_LOOK))
        row: Row[Any] | None = None
        try:
            async with deadline:
                row = await self._polls(task_id)
                deadline.reschedule(None if limit is None else began + limit)
                pause = _FIRST_POLL
                while row is not None and row.outcome is None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await changed.wait()
                    changed.clear()
                    pause = min(_LONGEST_POLL, pause * 1.1)
                    try:
                        row = await self._polls(task_id)
                    except (SQLAlchemyError, OSError) as error:
                        if not is_transient(error):
                            raise
        except TimeoutError:
            if not deadline.expired():
                raise  # it is the database's
            raise TimeoutError(f"task {task_id} has not ended within {limit:g} seconds{_standing(row)}") from None
        finally:
            self._changes[task_id].discard(changed)
            if not self._changes[task_id]:
                del self._changes[task_id]
        if row is None:
            raise TaskNotFound(task_id)
        return self._poll_result(row)

    def task_changed(self, task_id: uuid.UUID) -> None:
        """A worker of this client has seen a task end: whoever waits for it here may look."""
        for changed in self._changes.get(task_id, ()):
            changed.set()

    @functools.cached_property
    def _changes(self) -> dict[uuid.UUID, set[asyncio.Event]]:
        """To be set when a task may have ended, for those who wait."""
        return {}

    @functools.cached_property
    def _polls(self) -> Batch[uuid.UUID, Row[Any] | None]:
        return Batch(lent(lambda: self.database, self._poll_batch))

    async def _poll_batch(self, loan: HeldConnection, task_ids: list[uuid.UUID]) -> list[Row[Any] | None]:
        rows = await loan.execute(waits.POLL_TASKS, {"task_ids": task_ids})
        found = {row.task_id: row for row in rows}
        return [found.get(task_id) for task_id in task_ids]

    def _poll_result(self, row: Row[Any]) -> TaskPollResult[Any]:
        output, error = None, None
        if row.outcome == "completed" and row.output is not None:
            known = self.tasks.get(row.task_name)
            codec: Codec[Any] = known.output_codec if known is not None else UNTYPED
            output = codec.decode(row.output, f"the output of task {row.task_id}")
        elif row.error is not None and row.outcome is not None:
            error = TaskErrorInfo(*stored_failure(row.error, f"the error of task {row.task_id}"))
        return TaskPollResult(row.task_id, TaskStatus(row.state), output, error)


def _standing(row: Row[Any] | None) -> str:
    """How a task that has not ended stood when it was last looked at, and what it may be waiting for."""
    if row is None:
        return ""
    if row.state != TaskStatus.PENDING:
        return f": it is {row.state}"
    return f": it is pending. Does a worker run that serves its queue and knows a task named {row.task_name!r}?"


def _id_of(task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> uuid.UUID:
    if isinstance(task, SpawnResult | TaskHandle):
        return task.task_id
    if isinstance(task, uuid.UUID):  # pyright: ignore[reportUnnecessaryIsInstance]
        return task
    try:
        return uuid.UUID(str(task))
    except ValueError:
        what = repr(task[:80]) if isinstance(task, str) else type(task).__name__
        raise TypeError(f"a task is named by its UUID, a SpawnResult or a TaskHandle, not {what}") from None
