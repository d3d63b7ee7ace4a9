"""A run in the open transaction of a test: its children and events are rows of that transaction."""

from __future__ import annotations

import asyncio
import queue
import random
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Generator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar, cast

from sqlalchemy import Executable, Row, Text, Uuid, bindparam, select
from sqlalchemy.engine import RootTransaction
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ..app import App
from ..client.events import emit
from ..concurrency.threads import in_event_loop
from ..context import TaskContext
from ..database import direct
from ..database.hint import Hint
from ..database.rendering import Translations
from ..database.scripts import Script, drive
from ..errors import TaskTimeout
from ..execution.calls import Call
from ..execution.hooks import HookChain
from ..execution.journal import Entry, Journal
from ..execution.messages import Outgoing
from ..execution.reader import EmittedEvent, JoinTarget
from ..execution.run import Run
from ..execution.session_transactions import InThread
from ..execution.waits import PendingWait, Stored
from ..execution.writes import (
    CheckpointValues,
    ChildValues,
    EventValues,
    Kind,
    MessageValues,
    ReceiptValues,
    Values,
)
from ..models import SCHEMA, Event, TaskRow
from ..options import SpawnOptions
from ..results import Race, TaskHandle
from ..serialization.codec import UNTYPED
from ..signals import Suspended, TaskCancelled
from ..statements import spawning
from ..statements.claiming import ClaimedRun
from ..statements.expressions import arrays, as_text
from ..statements.spawning import LIMITED_SPAWN_COLUMNS
from ..steps import result_codec
from ..tasks import Task
from ..validation import Duration, seconds
from . import inline_messages
from .assertions import connection_of
from .contexts import MemoryContext, MemorySyncContext
from .memory import MemoryRun

T = TypeVar("T")

_EVENT = select(as_text(Event.payload).label("payload")).where(
    Event.queue_name == bindparam("event_queue", type_=Text()), Event.name == bindparam("event_name", type_=Text())
)
_TARGET = select(
    TaskRow.parent_task_id,
    TaskRow.task_name,
    TaskRow.outcome,
    as_text(TaskRow.output).label("output"),
    as_text(TaskRow.error).label("error"),
).where(TaskRow.task_id == bindparam("target_id", type_=Uuid()))


class OpenTransaction:
    """The transaction of a test, in which everything is read and written."""

    def __init__(self, session: Session | AsyncSession, schema: str) -> None:
        self.session = session
        self.schema = schema
        self._translations: Translations | None = None if schema == SCHEMA else {SCHEMA: schema}

    async def perform(self, script: Script[T]) -> T:
        """Run a script. With a synchronous session it returns without having suspended."""
        if isinstance(self.session, AsyncSession):
            return await self.session.run_sync(self._perform, script)
        return self._perform(self.session, script)

    def _perform(self, session: Session, script: Script[T]) -> T:
        connection = connection_of(session)

        def execute(statement: Executable, parameters: Mapping[str, Any]) -> Any:
            return direct.execute_within(connection, statement, parameters, self._translations)

        return drive(execute, script)

    async def execute(self, statement: Executable, parameters: Mapping[str, Any]) -> list[Row[Any]]:
        """Execute a statement, and return its rows."""

        def script() -> Script[list[Row[Any]]]:
            return list((yield statement, parameters))

        return await self.perform(script())

    async def root(self) -> RootTransaction:
        """Return the transaction itself, outside of all savepoints."""

        def found(session: Session) -> RootTransaction:
            return cast(RootTransaction, connection_of(session).get_transaction())

        return await self.session.run_sync(found) if isinstance(self.session, AsyncSession) else found(self.session)

    async def select(self, statement: Executable) -> Sequence[Row[Any]]:
        """Return the rows of a statement of SQLAlchemy, converted to its types."""

        def rows(session: Session) -> Sequence[Row[Any]]:
            options = {} if self._translations is None else {"schema_translate_map": self._translations}
            return connection_of(session).execute(statement, execution_options=options).all()

        return await self.session.run_sync(rows) if isinstance(self.session, AsyncSession) else rows(self.session)


class InlineRun(MemoryRun):
    """Takes the place of a `Run`. Its records are kept for the next attempt of the task."""

    def __init__(
        self,
        claimed: ClaimedRun,
        task: Task[Any, Any],
        app: App,
        transaction: OpenTransaction,
        hooks: HookChain,
        records: dict[uuid.UUID, Entry],
        timed_out: set[uuid.UUID],
    ) -> None:
        super().__init__(claimed, app.max_payload_bytes, {}, {}, {}, self._refuse_child)
        self.signal: Any = None
        self.mismatch: Any = None
        self.replay: Any = task.replay
        self.hooks = hooks
        self.journal = Journal(dict(records))
        self.waiting: tuple[PendingWait, ...] = ()
        """The wait for which the task is suspended, or those of a race."""
        self._unwritten: dict[str, str] = {}
        self._transaction = transaction
        self._records = records
        self._timed_out = timed_out
        self.timeouts: list[tuple[uuid.UUID, TaskTimeout]] = []
        """Keys of the waits that have timed out in this attempt, with their errors."""

    async def _refuse_child(self, *_: object) -> Any:
        raise AssertionError("children are tasks of the transaction")

    async def enter(self) -> None:
        """Refuse calls of a task that was cancelled, and of branches that go on after the suspension."""
        if self.signal is None:
            this = await join_target(self._transaction, self.claimed.task_id)
            if this is None or this.outcome is not None:
                self.signal = TaskCancelled()
        if self.signal is not None:
            raise self.signal

    def warn(self, message: str, *arguments: object) -> None:
        """Drop a warning, which the worker logs."""

    async def write(self, kind: Kind, key: uuid.UUID, values: Values, *, size: int = 0) -> Stored | None:
        """Record a call; insert the child that it spawns, or the event that it emits."""
        match values:
            case CheckpointValues():
                self._record(key, values)
            case ChildValues(checkpoint=checkpoint, spawn=spawn):
                values_by_column = arrays(LIMITED_SPAWN_COLUMNS, [spawn])
                parameters = {**values_by_column, "lock_timeout": None}
                if not await self._transaction.execute(spawning.SPAWN_LIMITED, parameters):
                    child = await join_target(self._transaction, cast(uuid.UUID, checkpoint.child_task_id))
                    if child is None:
                        return Stored("refused", None)
                self._record(key, checkpoint)
            case EventValues(checkpoint=checkpoint, event_name=name, payload=payload):
                script = emit(self.claimed.queue_name, name, payload)(Hint())
                first = "true" if await self._transaction.perform(script) else "false"
                self._record(key, checkpoint._replace(value=first))
                return Stored("completed", first)
            case MessageValues(checkpoint=checkpoint):
                if not await self._transaction.perform(inline_messages.send(Outgoing(*values[1:]))):
                    return Stored("refused", None)
                self._record(key, checkpoint)
            case ReceiptValues(topic=topic):
                text = await self._transaction.perform(inline_messages.receive(self.claimed.task_id, topic))
                if text is None:
                    return Stored("none", None)
                self._record(key, CheckpointValues("message", topic, "completed", text))
                return Stored("completed", text)
            case _:
                raise AssertionError(f"a run in memory writes no {kind.value}")
        return None

    def _record(self, key: uuid.UUID, values: CheckpointValues) -> None:
        self._records[key] = Entry(values.kind, values.name, values.status, values.value, values.child_task_id)

    async def park(self, wait: PendingWait) -> Stored:
        """End a sleep at once, by letting its time pass; suspend for anything else, until its time has to pass."""
        due_at = self.due(wait)
        if due_at is not None and (wait.key in self._timed_out or (wait.kind == "sleep" and not self._racing)):
            self.pass_until(due_at)
            if wait.kind == "sleep":
                return Stored("completed", None)
            stored = CheckpointValues(wait.kind, wait.name, "timeout", None, wait.child_task_id)
            self._record(wait.key, stored)
            return Stored("timeout", None)
        if self._racing:
            return await super().park(wait)
        raise self._suspend(wait)

    def _suspend(self, *waits: PendingWait) -> Suspended:
        self.waiting = waits
        signal = self.signal = Suspended()
        return signal

    async def decided(self, name: str, key: uuid.UUID, winner: str) -> None:
        """Record the winner of a race."""
        self._record(key, CheckpointValues("race", name, "completed", UNTYPED.encode(winner, "the winner of a race")))

    async def undecided(self, name: str, pending: Mapping[str, PendingWait]) -> Race[Any]:
        """Suspend for the waits of a race."""
        raise self._suspend(*pending.values())

    def keep_timeouts(self, keys: Collection[uuid.UUID]) -> None:
        """Keep the records of waits that have timed out, whatever fails the run: a race is decided once."""
        self.timeouts = [timeout for timeout in self.timeouts if timeout[0] not in keys]

    def publish(self, name: str, text: str) -> None:
        """Note a value, which is written at the end of the run."""
        self._unwritten[name] = text

    async def write_values(self) -> None:
        """Write the values that the run has published."""
        for name, text in self._unwritten.items():
            await self._transaction.perform(inline_messages.publish(self.claimed.task_id, name, text))

    async def receiver(self, task_id: uuid.UUID) -> tuple[str, str | None] | None:
        """Return the state and the outcome of a task to which a message could not be sent."""
        return await self._transaction.perform(inline_messages.receiver(task_id))

    async def was_sent(self, receiver_id: uuid.UUID, message_id: uuid.UUID) -> bool:
        """Return False, because `write` has found the message if it was sent before."""
        return False

    def timed_out(self, key: uuid.UUID, error: TaskTimeout) -> TaskTimeout:
        """Note the error of a wait."""
        self.timeouts.append((key, error))
        return error

    async def event(self, queue_and_name: tuple[str, str]) -> EmittedEvent | None:
        """Return an event that the transaction sees."""
        payload = await event_payload(self._transaction, *queue_and_name)
        return None if payload is None else EmittedEvent(payload, None)

    async def task(self, task_id: uuid.UUID) -> JoinTarget | None:
        """Return a task that the transaction sees."""
        return await join_target(self._transaction, task_id)


async def event_payload(transaction: OpenTransaction, queue_name: str, name: str) -> str | None:
    """Return the payload of an event that the transaction sees."""
    rows = await transaction.execute(_EVENT, {"event_queue": queue_name, "event_name": name})
    return (rows[0].payload or "null") if rows else None


async def join_target(transaction: OpenTransaction, task_id: uuid.UUID) -> JoinTarget | None:
    """Return a task that the transaction sees."""
    rows = await transaction.execute(_TARGET, {"target_id": task_id})
    return JoinTarget._make(rows[0]) if rows else None


class InlineContext(MemoryContext):
    """The context of a task in the transaction of a test."""

    def __init__(self, run: InlineRun, app: App, state: Any, session: Session | AsyncSession) -> None:
        TaskContext.__init__(self, cast(Run, run), app, state)
        self._memory = run
        self.session = session
        self._options = {}
        self._random = random.Random()  # noqa: S311
        self.hooks = run.hooks

    async def _spawn(
        self, call: Call, task: Task[Any, Any] | str, params: Any, options: SpawnOptions, *, unchecked: bool
    ) -> TaskHandle[Any]:
        return await TaskContext._spawn(self, call, task, params, options, unchecked=unchecked)

    async def _transaction(
        self,
        call: Call,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_thread: InThread | None = None,
    ) -> Any:
        codec = result_codec(fn)
        if (entry := await self._recall(call)) is not None:
            return codec.decode(entry.value or "null", f"the result of transaction {call.name!r}")
        with self._around(call):
            return await super()._transaction(call, fn, args, kwargs)


class InlineSyncContext(MemorySyncContext):
    """The context of a `def` task, in a thread beside the event loop of an asynchronous session."""

    def __init__(self, context: InlineContext, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(context)
        self._loop = loop

    def _perform(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def call() -> T:
            return await make()

        bodies: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        outer, self._bodies = self._bodies, bodies
        try:
            result = asyncio.run_coroutine_threadsafe(call(), self._loop)
            result.add_done_callback(lambda _: bodies.put(None))
            while (body := bodies.get()) is not None:
                body()
            return result.result()
        finally:
            self._bodies = outer

    def heartbeat(self, duration: Duration | None = None) -> None:
        """Check that the task goes on. In a transaction this is the thread of the event loop, which cannot wait."""
        if not in_event_loop():
            super().heartbeat(duration)
        elif duration is not None:
            seconds(duration, "duration")

    def transaction(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a transaction on the event loop, where the session is."""
        return self._call(lambda: self._memory.transaction(name, fn, *args, **kwargs))


def scoped_hooks(app: App, session: Session | AsyncSession) -> HookChain:
    """Return the hooks of a client, and inside of them one that makes the session that of its scoped sessions.

    Outside of them is another session: at the end of an application context Flask removes the session of the scope,
    which would roll back the transaction of the test.
    """
    hooks = app.hooks
    if not isinstance(session, Session):
        return hooks

    @contextmanager
    def around_step(_: object, __: str) -> Generator[None]:
        with app.scoped(session):
            yield

    @asynccontextmanager
    async def around_task(_: object) -> AsyncGenerator[None]:
        with app.scoped(session):
            yield

    @contextmanager
    def outside() -> Generator[None]:
        with ExitStack() as stack:
            # The sessions of Flask-SQLAlchemy have no scope outside of an application context.
            with suppress(RuntimeError):
                stack.enter_context(app.scoped(Session(), hold=False))
            yield

    @contextmanager
    def outside_step(_: object, __: str) -> Generator[None]:
        with outside():
            yield

    @asynccontextmanager
    async def outside_task(_: object) -> AsyncGenerator[None]:
        with outside():
            yield

    if hooks.around_task:
        hooks = hooks._replace(around_task=(outside_task, *hooks.around_task, around_task))
    return hooks._replace(around_step=(outside_step, *hooks.around_step, around_step))
