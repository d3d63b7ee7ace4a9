"""A run of the tasks that an open transaction has spawned, in that transaction, which a test rolls back."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar, overload
from weakref import WeakKeyDictionary

from sqlalchemy import Boolean, Integer, Row, Text, Uuid, bindparam, case, func, null, update
from sqlalchemy.engine import Connection, RootTransaction
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..app import App, clients
from ..client import Durable
from ..client.tasks import CASCADE_BATCH
from ..concurrency.threads import in_event_loop
from ..database.scripts import Script, SessionOrConnection
from ..errors import InvalidConfiguration, TaskNotRegistered
from ..execution.hooks import around_task, task_failed
from ..execution.journal import Entry
from ..execution.waits import PendingWait
from ..models import SCHEMA, TaskRow
from ..results import TaskInfo
from ..serialization.failures import encode_error, is_retryable, put_off, retry_delay, with_members
from ..statements import cancelling, scheduling
from ..statements.claiming import ClaimedRun
from ..statements.expressions import as_json, clock, constant
from ..statements.follow_ups import ending
from ..tasks import Task
from .assertions import SPAWNED, not_an_executor, task_info
from .contexts import MemorySyncContext
from .inline_messages import next_message
from .inline_run import (
    InlineContext,
    InlineRun,
    InlineSyncContext,
    OpenTransaction,
    event_payload,
    join_target,
    scoped_hooks,
)

__all__ = ["run_spawned"]

T = TypeVar("T")

MOST_PUT_OFF = 100
"""Attempts after which a task that is always put off is taken for one that would be for ever."""

_target = TaskRow.task_id == bindparam("target_id", type_=Uuid())
_attempt = bindparam("attempts", type_=Integer())

BEGIN = (
    update(TaskRow)
    .where(_target)
    .values(
        state=constant("running"),
        attempt=_attempt,
        available_at=func.coalesce(TaskRow.available_at, clock()),
        first_started_at=func.coalesce(TaskRow.first_started_at, clock()),
        started_at=clock(),
    )
)
# Also a task that was cancelled while it ran has ended.
_unended = _target & TaskRow.outcome.is_(None)
SUSPEND = update(TaskRow).where(_unended).values(state=constant("sleeping"), available_at=null())
COMPLETE = (
    update(TaskRow)
    .where(_unended)
    .values(
        state=constant("completed"),
        outcome=constant("completed"),
        output=as_json(bindparam("encoded", type_=Text())),
        error=null(),
        finished_at=clock(),
    )
)
FAIL = ending(
    update(TaskRow)
    .where(_unended)
    .values(
        state=case((bindparam("final", type_=Boolean()), constant("failed")), else_=constant("pending")),
        outcome=case((bindparam("final", type_=Boolean()), constant("failed"))),
        failures=TaskRow.failures + case((bindparam("put_off", type_=Boolean()), constant(0)), else_=constant(1)),
        error=as_json(bindparam("encoded", type_=Text())),
        finished_at=case((bindparam("final", type_=Boolean()), clock())),
        fence=TaskRow.fence + constant(1),
    ),
    (TaskRow.task_id,),
)


@overload
def run_spawned(
    session: AsyncSession | async_scoped_session[Any] | AsyncConnection, durable: Durable[Any] | None = None
) -> Coroutine[Any, Any, list[TaskInfo]]: ...
@overload
def run_spawned(
    session: Session | scoped_session[Any] | Connection, durable: Durable[Any] | None = None
) -> list[TaskInfo]: ...
def run_spawned(session: SessionOrConnection, durable: Durable[Any] | None = None) -> Any:
    """Run the tasks that the open transaction has spawned, inside it, and return them as they are then.

        order = place_order(session, "lamp")  # spawns a task
        (task,) = run_spawned(session)
        assert task.status == "completed"

    With an asynchronous session this is a coroutine. Steps, transactions and retries are those of a worker, the hooks
    of the client are around them, and subtasks, events, messages, values and follow-ups are rows of the transaction;
    `ctx.transaction` works in a savepoint of the session. Sleeps, delays and the pauses between attempts are skipped.
    The timeout of a wait ends it once nothing else can run; without one, a task that waits for what does not come stays
    `sleeping`. The test's rollback undoes all of it, and no further connection is opened.

    A later call in the same transaction continues the tasks that were suspended, from their steps. Timeouts and
    cancellation policies of tasks have no effect.

    The tasks run one after the other, `async def` tasks in an event loop of their own if the session is synchronous.
    `ctx.state` is the client's `state`. Without a client, it is the first one of the process that knows the task.

    Raises:
        TypeError: it is neither a session nor a connection.
        TaskNotRegistered: no client knows one of the tasks.
        InvalidConfiguration: several clients know it, each with a task of its own.
    """
    match session:
        case async_scoped_session() | scoped_session():
            inner: Session | AsyncSession = session()
        case AsyncConnection():
            # It is not closed, which would do nothing.
            inner = AsyncSession(session, join_transaction_mode="rollback_only", expire_on_commit=False)
        case Connection():
            inner = Session(session, join_transaction_mode="rollback_only")
        case Session() | AsyncSession():
            inner = session
        case _:
            raise not_an_executor(session)
    runner = _Runner(inner, durable)
    if isinstance(inner, AsyncSession):
        return runner.run()
    # With a synchronous session nothing of it suspends.
    return returned(runner.run())


def returned(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    coroutine.close()
    raise AssertionError("it has suspended")


@dataclass
class _Progress:
    """A task's progress: its records, and the waits for which it is suspended."""

    records: dict[uuid.UUID, Entry] = field(default_factory=dict[uuid.UUID, Entry])
    waiting: tuple[PendingWait, ...] = ()
    timed_out: set[uuid.UUID] = field(default_factory=set[uuid.UUID])
    attempt: int = 0


@dataclass
class _Story:
    """The progress of the tasks of a transaction, from which later calls in it continue."""

    progress: dict[uuid.UUID, _Progress] = field(default_factory=dict[uuid.UUID, _Progress])
    now: datetime | None = None

    def of(self, row: Row[Any]) -> _Progress:
        """Return the progress of a task, which begins anew if a savepoint was rolled back since."""
        known = self.progress.get(row.task_id)
        if known is None or known.attempt != row.attempt:
            known = self.progress[row.task_id] = _Progress()
        return known


_stories: WeakKeyDictionary[RootTransaction, _Story] = WeakKeyDictionary()
"""By the transaction, so that they end with it."""


class _Runner:
    """Runs the tasks of a transaction until no more can run."""

    def __init__(self, session: Session | AsyncSession, durable: Durable[Any] | None) -> None:
        self._session = session
        self._durable = durable
        self._transaction = OpenTransaction(session, SCHEMA if durable is None else durable.schema)
        self._story = _Story()

    async def run(self) -> list[TaskInfo]:
        self._story = _stories.setdefault(await self._transaction.root(), self._story)
        while (row := await self._next()) is not None:
            await self._run(row, self._story.of(row))
        return [task_info(row) for row in await self._rows()]

    async def _rows(self) -> Sequence[Row[Any]]:
        return await self._transaction.select(SPAWNED)

    async def _next(self) -> Row[Any] | None:
        """Return a task that can run: one that is ready, else one whose wait is over, or whose timeout is next."""
        rows = [row for row in await self._rows() if row.outcome is None]
        suspended: list[tuple[datetime, PendingWait, Row[Any]]] = []
        for row in rows:
            progress = self._story.of(row)
            if not progress.waiting:
                return row
            for wait in progress.waiting:
                if await self._is_over(row, wait):
                    return row
                if wait.due_at is not None:
                    suspended.append((wait.due_at, wait, row))
        if not suspended:
            return None
        _, wait, row = min(suspended, key=lambda item: item[0])
        self._story.of(row).timed_out.add(wait.key)
        return row

    async def _is_over(self, row: Row[Any], wait: PendingWait) -> bool:
        if wait.event_name is not None:
            return await event_payload(self._transaction, row.queue_name, wait.event_name) is not None
        if wait.child_task_id is not None:
            target = await join_target(self._transaction, wait.child_task_id)
            return target is None or target.outcome is not None
        if wait.kind == "message":
            return await self._transaction.perform(next_message(row.task_id, wait.name)) is not None
        return False

    async def _run(self, row: Row[Any], progress: _Progress) -> None:
        app, task = self._app_of(row.task_name)
        if not progress.waiting:
            progress.attempt = row.attempt + 1
        progress.waiting = ()
        await self._transaction.execute(BEGIN, {"target_id": row.task_id, "attempts": progress.attempt})
        now: datetime = (await self._transaction.execute(scheduling.DATABASE_TIME, {}))[0].now
        now = self._story.now = now if self._story.now is None else max(now, self._story.now)
        claimed = ClaimedRun(
            task_id=row.task_id,
            run_id=row.run_id,
            queue_name=row.queue_name,
            priority=row.priority,
            available_at=row.available_at or now,
            task_name=row.task_name,
            params=row.params,
            headers=row.headers,
            attempt=progress.attempt,
            fence=1,
            cancel_at=None,
            now=now,
        )
        hooks = scoped_hooks(app, self._session)
        run = InlineRun(claimed, task, app, self._transaction, hooks, progress.records, progress.timed_out)
        context = InlineContext(run, app, getattr(app, "state", None), self._session)
        try:
            try:
                output = await self._execute(context, task, row.params)
            finally:
                await run.write_values()
            if run.mismatch is not None:
                raise run.mismatch
            encoded = task.output_codec.encode(output, f"the output of task {task.name!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or self._is_cancelled(error):
                raise
            if run.signal is None:
                await self._fail(row, task, run, progress, error)
        else:
            if run.signal is None:
                await self._transaction.execute(COMPLETE, {"target_id": row.task_id, "encoded": encoded})
        if run.signal is not None:
            # Code that catches the signal changes nothing.
            progress.waiting = run.waiting
            await self._transaction.execute(SUSPEND, {"target_id": row.task_id})
        self._story.now = max(now, run.now())

    def _is_cancelled(self, error: BaseException) -> bool:
        """Return whether it is the test that is cancelled, and not the task that has raised the error by itself."""
        if not isinstance(error, asyncio.CancelledError) or not isinstance(self._session, AsyncSession):
            return False
        current = asyncio.current_task()
        return current is not None and current.cancelling() > 0

    async def _execute(self, context: InlineContext, task: Task[Any, Any], params: str | None) -> Any:
        arguments = (task.decode_params(params),) if task.takes_params else ()

        async def start() -> Any:
            if task.is_async:
                with context:
                    return await task.function(context, *arguments)
            if isinstance(self._session, AsyncSession):
                with InlineSyncContext(context, asyncio.get_running_loop()) as beside:
                    return await asyncio.to_thread(task.function, beside, *arguments)
            with MemorySyncContext(context) as blocking:
                return task.function(blocking, *arguments)

        around = functools.partial(around_task, context.hooks.around_task, context, task.name, start)
        if isinstance(self._session, AsyncSession):
            return await around()
        if not in_event_loop():
            return asyncio.run(around())
        # The test has an event loop in this thread.
        inner = contextvars.copy_context()
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inner.run, lambda: asyncio.run(around())).result()

    async def _fail(
        self, row: Row[Any], task: Task[Any, Any], run: InlineRun, progress: _Progress, error: BaseException
    ) -> None:
        raised = {id(member) for member in with_members(error)}
        for key, timeout in run.timeouts:
            if id(timeout) in raised:
                # The next attempt waits anew.
                progress.records.pop(key, None)
                progress.timed_out.discard(key)
        retryable = is_retryable(error, task.no_retry_on, task.retry_on)
        if row.retry_kind == "none" and retry_delay(error) is None:
            retryable = False
        final = not retryable or row.failures + 1 >= row.max_attempts
        if is_put_off := put_off(error) is not None:
            final = False
            if progress.attempt >= MOST_PUT_OFF:
                raise AssertionError(
                    f"task {row.task_name!r} was put off {MOST_PUT_OFF} times by RateLimited"
                ) from error
        encoded = encode_error(error, row.run_id)
        values = {"final": final, "put_off": is_put_off, "encoded": encoded}
        if await self._transaction.execute(FAIL, {"target_id": row.task_id, **values}) and final:
            hooks = run.hooks.on_failed
            task_failed(hooks, row.task_id, row.task_name, row.queue_name, row.params, encoded)
            await self._transaction.perform(_cancel_descendants(row.task_id))

    def _app_of(self, name: str) -> tuple[App, Task[Any, Any]]:
        if self._durable is not None:
            return self._durable, self._durable.registered(name)
        everyone = [app for _, app in sorted(clients.items())]
        knowing = [app for app in everyone if name in app.tasks]
        if not knowing:
            raise TaskNotRegistered(name, sorted({known for app in everyone for known in app.tasks}))
        if len({id(app.tasks[name]) for app in knowing}) > 1:
            raise InvalidConfiguration(
                "durable",
                f"several clients have a task {name!r} of their own",
                "Pass one: run_spawned(session, durable).",
            )
        # The first one is more likely the application's than one that a test has made.
        return knowing[0], knowing[0].tasks[name]


def _cancel_descendants(task_id: uuid.UUID) -> Script[None]:
    while True:
        rows = yield cancelling.DESCENDANTS, {"ancestor_ids": [task_id], "wanted": CASCADE_BATCH, "passed": 0}
        if not rows:
            return
        rows = yield cancelling.cancel_descendants(), {"task_ids": [row.task_id for row in rows], "origin": task_id}
        if not rows:
            return
