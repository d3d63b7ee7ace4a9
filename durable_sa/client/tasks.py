"""Results of tasks, cancelling them and retrying them."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, overload

from sqlalchemy import Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..app import App
from ..concurrency.loops import PerLoop
from ..database.batches import Batch, with_connection
from ..database.connections import HeldConnection
from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, perform, perform_within, undone_by_errors
from ..database_errors import UNIQUE_VIOLATION, is_transient, sqlstate
from ..errors import InvalidState, TaskNotFound
from ..ids import new_id
from ..options import MAX_ATTEMPTS
from ..results import SpawnResult, TaskErrorInfo, TaskHandle, TaskPollResult, TaskStatus
from ..results import id_of as _id_of
from ..serialization.codec import UNTYPED, Codec
from ..serialization.failures import stored_failure
from ..statements import cancelling, waits
from ..validation import Duration, integer, seconds

T = TypeVar("T")

CASCADE_BATCH = 500
"""Descendants that are cancelled with one statement."""
_FIRST_LOOK = 1.0
"""Seconds that the first poll may take, also with a shorter timeout: the result of an ended task needs no wait."""
_FIRST_POLL = 0.002
_LONGEST_POLL = 0.25
"""Seconds between polls."""


class Tasks(App):
    """The part of a client that deals with existing tasks."""

    async def cancel_task(self, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> TaskStatus:
        """Cancel a task and its unfinished descendants; a running one is interrupted at its next await.

        Returns the task's status: `cancelled`, or how it had ended before, which then stays.

        Raises:
            TaskNotFound: there is no such task.
        """
        return await perform(self.database, cancel(_id_of(task_id)))

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
        """Cancel a task as :meth:`cancel_task` does, in the caller's transaction."""
        return perform_within(session, self.schema, cancel(_id_of(task_id)))

    async def retry_task(
        self, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any], *, max_attempts: int | None = None
    ) -> TaskStatus:
        """Put a failed or cancelled task back, with its checkpoints, a fresh failure count and fresh clocks.

        Descendants that its end had cancelled are put back with it, and so is a child whose failure made it fail, with
        the child's child that made that one fail, and so on. `max_attempts` replaces the task's own.

        Raises:
            TaskNotFound: there is no such task.
            InvalidState: it has not ended, or it has completed, or another unfinished task has the unique key of it or
                of one that is put back with it.
        """
        return await perform(self.database, retry(_id_of(task_id), max_attempts))

    @overload
    def retry_task_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any],
        *,
        max_attempts: int | None = None,
    ) -> Coroutine[Any, Any, TaskStatus]: ...
    @overload
    def retry_task_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any],
        *,
        max_attempts: int | None = None,
    ) -> TaskStatus: ...
    def retry_task_with(
        self,
        session: SessionOrConnection,
        task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any],
        *,
        max_attempts: int | None = None,
    ) -> Any:
        """Put a task back as :meth:`retry_task` does, in the caller's transaction.

        Raises:
            DurableError: the same errors as :meth:`retry_task`; the transaction is then still usable.
        """
        script = retry(_id_of(task_id), max_attempts)
        return perform_within(session, self.schema, undone_by_errors(script), in_autocommit=script)

    @overload
    async def get_task_result(self, task: SpawnResult[T] | TaskHandle[T]) -> TaskPollResult[T] | None: ...
    @overload
    async def get_task_result(self, task: uuid.UUID) -> TaskPollResult[Any] | None: ...
    async def get_task_result(self, task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> Any:
        """Return a task's status, with its output or error once it has ended; None if there is no such task."""
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
        changed, changes = asyncio.Event(), self._changes.get()
        changes.setdefault(task_id, set()).add(changed)
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
                raise  # a timeout of the database
            raise self._overdue(task_id, limit, row) from None
        finally:
            changes[task_id].discard(changed)
            if not changes[task_id]:
                del changes[task_id]
        if row is None:
            raise TaskNotFound(task_id)
        return self._poll_result(row)

    def _task_id(self, task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> uuid.UUID:
        return _id_of(task)

    def task_changed(self, task_id: uuid.UUID) -> None:
        """Let calls of this client that wait for a task poll now: a worker of this client has seen its end."""
        for changed in self._changes.get().get(task_id, ()):
            changed.set()

    @functools.cached_property
    def _changes(self) -> PerLoop[dict[uuid.UUID, set[asyncio.Event]]]:
        """Events to be set when a task may have ended, of the calls that wait for it."""
        return PerLoop(dict[uuid.UUID, set[asyncio.Event]])

    @functools.cached_property
    def _polls(self) -> Batch[uuid.UUID, Row[Any] | None]:
        return Batch(with_connection(lambda: self.database, self._poll_batch))

    async def _poll_batch(self, held: HeldConnection, task_ids: list[uuid.UUID]) -> list[Row[Any] | None]:
        rows = await held.execute(waits.POLL_TASKS, {"task_ids": task_ids})
        found = {row.task_id: row for row in rows}
        return [found.get(task_id) for task_id in task_ids]

    def _overdue(self, task_id: uuid.UUID, limit: float | None, row: Row[Any] | None) -> TimeoutError:
        return TimeoutError(f"task {task_id} has not ended within {limit:g} seconds{_standing(row)}")

    def _poll_result(self, row: Row[Any]) -> TaskPollResult[Any]:
        output, error = None, None
        if row.outcome == "completed" and row.output is not None:
            known = self.tasks.get(row.task_name)
            codec: Codec[Any] = known.output_codec if known is not None else UNTYPED
            output = codec.decode(row.output, f"the output of task {row.task_id}")
        elif row.error is not None and row.outcome is not None:
            error = TaskErrorInfo(*stored_failure(row.error, f"the error of task {row.task_id}"))
        return TaskPollResult(row.task_id, TaskStatus(row.state), output, error)


def cancel(task_id: uuid.UUID) -> Callable[[Hint], Script[TaskStatus]]:
    """Return the script that cancels a task and, generation by generation, its unfinished descendants."""

    def script(hint: Hint) -> Script[TaskStatus]:
        rows = yield cancelling.cancel(), {"target_id": task_id}
        if not rows:
            rows = yield cancelling.TASK_STATE, {"target_id": task_id}
            if not rows:
                raise TaskNotFound(task_id)
            return TaskStatus(rows[0].state)
        cancelled = list(rows)
        while True:
            rows = yield cancelling.DESCENDANTS, {"ancestor_ids": [task_id], "wanted": CASCADE_BATCH, "passed": 0}
            if not rows:
                break
            rows = yield (
                cancelling.cancel_descendants(),
                {"task_ids": [row.task_id for row in rows], "origin": task_id},
            )
            cancelled.extend(rows)
            if not rows:
                # They ended between the two statements, or a snapshot hides their end.
                break
        yield from after_cancel(hint, cancelled)
        return TaskStatus.CANCELLED

    return script


def after_cancel(hint: Hint, cancelled: Sequence[Row[Any]]) -> Script[None]:
    """Delete the waits of cancelled tasks, and wake up those that wait for their end."""
    hint.add_follow_ups(cancelled)
    hint.cancelled |= any(row.was == "running" or row.slot is not None for row in cancelled)
    if begun := [row.task_id for row in cancelled if row.was != "pending"]:
        yield waits.DELETE_WAITS, {"task_ids": begun}
    ended = [row.task_id for row in cancelled if row.parent_task_id is not None]
    if ended:
        waiting = yield waits.WAITING_FOR, {"task_ids": ended}
        if waiting:
            rows = yield waits.RESOLVE, {"task_ids": sorted({row.task_id for row in waiting})}
            hint.add_rows(rows)


def retry(task_id: uuid.UUID, max_attempts: int | None) -> Callable[[Hint], Script[TaskStatus]]:
    """Return the script that puts an ended task back, with the descendants that its end had cancelled."""
    if max_attempts is not None:
        integer(max_attempts, "max_attempts", minimum=1, maximum=MAX_ATTEMPTS)
    run_id = new_id()

    def script(hint: Hint) -> Script[TaskStatus]:
        rows = yield cancelling.LOCK_FOR_RETRY, {"target_id": task_id}
        if not rows:
            raise TaskNotFound(task_id)
        if rows[0].run_id == run_id:
            # This script is retried after a commit whose reply was lost.
            hint.add_rows(rows)
            return TaskStatus.PENDING
        state, cancelled_by = rows[0].state, rows[0].cancelled_by
        if state not in ("failed", "cancelled"):
            raise InvalidState(f"Task {task_id}", state, "Only failed and cancelled tasks can be retried.")
        # Read first, because the retry removes the error that names them. A parent comes before its children.
        to_retry, generation = [(task_id, run_id, max_attempts, cancelled_by)], [task_id]
        while generation:
            rows = yield cancelling.FAILED_CHILDREN, {"task_ids": generation}
            generation = [row.task_id for row in rows]
            to_retry.extend((child, new_id(), None, None) for child in generation)
        family: list[uuid.UUID] = []
        for target in to_retry:
            family += yield from _put_back(hint, *target)
        yield cancelling.DELETE_FAILED_JOINS, {"task_ids": family}
        return TaskStatus.PENDING

    return script


def _put_back(
    hint: Hint, task_id: uuid.UUID, run_id: uuid.UUID, max_attempts: int | None, cancelled_by: uuid.UUID | None
) -> Script[list[uuid.UUID]]:
    """Put one ended task back, with the descendants that its end had cancelled. Return the ids of all."""
    parameters = {"target_id": task_id, "next_run_id": run_id, "new_max_attempts": max_attempts}
    with _refusing_taken_keys(f"Task {task_id}"):
        rows = yield cancelling.RETRY, parameters
    hint.add_rows(rows)
    origins = [task_id] if cancelled_by is None else [task_id, cancelled_by]
    fallen = yield cancelling.CASCADE_CANCELLED, {"target_id": task_id, "origins": origins}
    if fallen:
        restored = sorted(row.task_id for row in fallen)
        next_run_ids = [new_id() for _ in restored]
        with _refusing_taken_keys(f"A descendant of task {task_id}"):
            rows = yield cancelling.RETRY_DESCENDANTS, {"task_ids": restored, "next_run_ids": next_run_ids}
        hint.add_rows(rows)
    return [task_id, *(row.task_id for row in fallen)]


@contextmanager
def _refusing_taken_keys(what: str) -> Generator[None]:
    """Raise `InvalidState` if the statement finds a unique key taken."""
    try:
        yield
    except IntegrityError as error:
        if sqlstate(error) != UNIQUE_VIOLATION:
            raise
        raise InvalidState(
            what,
            "without its unique key, which another unfinished task of the queue has",
            "Retry it once that task has ended, or cancel that task.",
        ) from error


def _standing(row: Row[Any] | None) -> str:
    """Describe the status of a task that has not ended, and what it may be waiting for."""
    if row is None:
        return ""
    if row.state != TaskStatus.PENDING:
        return f": it is {row.state}"
    return f": it is pending. Does a worker run that serves its queue and knows a task named {row.task_name!r}?"
