"""The client: registers tasks, spawns them, asks for their results, and starts workers."""

from __future__ import annotations

import asyncio
import functools
import gc
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypedDict, TypeVar, cast, overload

from sqlalchemy import URL, Executable, Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import TypeVar as DefaultTypeVar
from typing_extensions import Unpack

from . import migrations, pgcron, schedules, scripts
from .batches import Batch
from .branches import detached
from .codec import DEFAULT_MAX_PAYLOAD_BYTES, Codec, check_size, codec_for
from .connections import LOCK_NOT_AVAILABLE, Database, backoff, is_conflict, is_lost, is_transient, sqlstate
from .context import TaskContext
from .errors import (
    DurableError,
    InvalidConfiguration,
    QueueNotFound,
    TaskAlreadyRegistered,
    TaskNotFound,
    TaskNotRegistered,
)
from .hints import Hint, HintSender, channel_name, flush, sender
from .hooks import HookChain, Hooks
from .models import DEFAULT_QUEUE, SCHEMA
from .names import validate_name, validate_schema
from .options import MAX_ATTEMPTS, Spawn, SpawnOptions, TaskOptions, WorkerOptions
from .policies import CancellationPolicy, Duration, RetryStrategy, integer, seconds
from .providers import automatic
from .results import ScheduleFilter, ScheduleInfo, SpawnResult, TaskErrorInfo, TaskHandle, TaskPollResult, TaskStatus
from .retention import delete_tasks
from .schedules import Backend, Overlap
from .sessions import Executor, Script, perform
from .spawns import Prepared, at_position, prepare
from .statements import maintenance, queues, spawning, waits
from .tasks import Task, TaskDecorator
from .tasks import task as make_task
from .ticks import Misfire
from .worker import Settings, Worker, signals_handled

if TYPE_CHECKING:
    from .telemetry import Telemetry

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")
StateT = DefaultTypeVar("StateT", default=Any)

_PLAIN: Codec[Any] = codec_for(Any)
_FIRST_POLL = 0.002
_LONGEST_POLL = 0.25
_TRIES = 5
_STATUS_TRIES = 12


class QueuePolicy(TypedDict, total=False):
    """What a queue keeps, and for how long: 30 days, unless said otherwise. None keeps it for ever."""

    retention: Duration | None
    """Age, since their end, at which finished tasks are deleted: seconds or a `timedelta`."""
    event_retention: Duration | None
    """Age at which emitted events are deleted."""


class Durable(Generic[StateT]):
    """Durable execution on an application's own Postgres.

    `bind` is an `AsyncEngine`, an `async_sessionmaker` or a URL, and is looked at when it is first needed: a process
    that only calls the `*_with` methods needs none. Without it, `DURABLE_DATABASE_URL` is read; where that is unset
    too, the embedded Postgres is used. An engine that is given is neither configured nor disposed of; one that is
    made from a URL is disposed of by :meth:`close`, or at the end of ``async with Durable(...)``.

    `lifespan` is an async context manager, or a function that returns one, entered by each worker; what it yields is
    `ctx.state`, otherwise `state` is. `queue_name` is the queue of spawns and workers that name none, and
    `default_max_attempts`, `default_retry_strategy` (5 seconds between attempts) and `default_cancellation` (never) are
    for tasks that say nothing of their own. A value may have `max_payload_bytes` as JSON, 16 MiB if not given and at
    most 1 GiB. `schema` is where the tables are, if not in ``durable``. `hooks` go around all
    spawns, runs and steps of the client; see :class:`durable_sa.Hooks`. Spans and metrics go to `telemetry`, a
    :class:`durable_sa.telemetry.Telemetry`; if none is given, to OpenTelemetry's global providers as soon as the
    application has set these up; False is never.

    Raises:
        InvalidConfiguration, InvalidName: a setting that cannot work.
        TaskAlreadyRegistered: two of `tasks` have the same name.
    """

    def __init__(
        self,
        bind: AsyncEngine | async_sessionmaker[Any] | URL | str | None = None,
        *,
        queue_name: str = DEFAULT_QUEUE,
        state: StateT | None = None,
        lifespan: Callable[..., AbstractAsyncContextManager[StateT]]
        | AbstractAsyncContextManager[StateT]
        | None = None,
        schema: str = SCHEMA,
        default_max_attempts: int = 5,
        default_retry_strategy: RetryStrategy | None = None,
        default_cancellation: CancellationPolicy | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        hooks: Iterable[Hooks] = (),
        telemetry: Telemetry | Literal[False] | None = None,
        tasks: Iterable[Task[Any, Any]] = (),
    ) -> None:
        self.queue_name = validate_name("queue", queue_name)
        """The queue of spawns and workers that name none."""
        self.state = state
        """What `ctx.state` is without a lifespan."""
        self.lifespan = lifespan
        self.schema = validate_schema(schema)
        self.max_payload_bytes = integer(max_payload_bytes, "max_payload_bytes", minimum=1, maximum=2**30)
        self.default_retry_strategy = default_retry_strategy or RetryStrategy.fixed(5)
        self.defaults = TaskOptions(
            integer(default_max_attempts, "default_max_attempts", minimum=1, maximum=MAX_ATTEMPTS),
            self.default_retry_strategy,
            default_cancellation,
            self.queue_name,
        )
        self.hooks = HookChain(hooks)
        self._telemetry: Telemetry | Literal[False] | None = telemetry
        self.tasks: dict[str, Task[Any, Any]] = {}
        """The registered tasks by name."""
        self._bind = bind
        self._database: Database | None = None
        self._workers: set[Worker] = set()
        self._changes: dict[uuid.UUID, set[asyncio.Event]] = {}
        self._spawns: Batch[Prepared, SpawnResult[Any]] = Batch(self._spawn_batch)
        self._keyed_spawns: Batch[Prepared, SpawnResult[Any] | None] = Batch(self._spawn_keyed)
        self._polls: Batch[uuid.UUID, Row[Any] | None] = Batch(self._poll_batch)
        for task in tasks:
            self.register(task)

    def __repr__(self) -> str:
        return f"<Durable queue={self.queue_name!r} tasks={len(self.tasks)}>"

    @property
    def database(self) -> Database:
        """The engine as durable uses it, resolved on first use."""
        if self._database is None:
            self._database = Database(self._bind, self.schema)
        return self._database

    @property
    def engine(self) -> AsyncEngine:
        """The engine in use. Resolves `bind`."""
        return self.database.engine

    @property
    def telemetry(self) -> Telemetry | None:
        """Where spans and metrics go; None as long as that is nowhere."""
        if self._telemetry is None:
            self._telemetry = automatic()
        return None if self._telemetry is False else self._telemetry

    @property
    def workers(self) -> frozenset[Worker]:
        """The workers of this client that have been started and have not ended."""
        return frozenset(self._workers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Shut down workers that still run, and dispose of the engine if it was made from a URL.

        Wake-up hints on their way are seen off, also over engines of the application: dispose of those afterwards.
        """
        for worker in list(self._workers):
            await worker.shutdown()
        await flush(channel_name(self.schema))
        if self._database is not None:
            await self._database.close()
            if self._database.owned:
                self._database = None

    async def migrate(self) -> None:
        """Bring the durable tables to the newest version, creating their schema if need be; safe to call at any time.

        For applications without Alembic, for tests and demos. Several processes may call it at once.
        """
        engine = self.database.engine.execution_options(isolation_level="READ COMMITTED")
        async with engine.begin() as connection:
            await connection.run_sync(migrations.migrate, self.schema)

    async def check_schema(self) -> None:
        """Compare the tables in the database with what this version of the package needs.

        Raises:
            SchemaMismatch: they are not there, older or newer; the message says what to do.
            InvalidConfiguration: there is a connection pooler that does not let transactions through.
        """
        try:
            async with self.database.engine.connect() as connection:
                await connection.run_sync(migrations.check, self.schema)
        except DBAPIError as error:
            if "statement pooling" in str(error.orig):
                raise InvalidConfiguration(
                    "bind", "there is a connection pooler in statement mode", "Set its pool_mode to transaction."
                ) from error
            raise

    def _sender(self) -> HintSender:
        return sender(self.database.engine, channel_name(self.schema))

    @overload
    def task(self, name: Callable[[TaskContext[Any], ParamsT], Coroutine[Any, Any, T]], /) -> Task[ParamsT, T]: ...
    @overload
    def task(self, name: Callable[[TaskContext[Any]], Coroutine[Any, Any, T]], /) -> Task[None, T]: ...
    @overload
    def task(self, name: Callable[[Any, ParamsT], T], /) -> Task[ParamsT, T]: ...
    @overload
    def task(self, name: Callable[[Any], T], /) -> Task[None, T]: ...
    @overload
    def task(
        self,
        name: str | None = None,
        *,
        max_attempts: int | None = None,
        retry_strategy: RetryStrategy | None = None,
        cancellation: CancellationPolicy | None = None,
        queue_name: str | None = None,
        no_retry_on: Iterable[type[BaseException]] = (),
    ) -> TaskDecorator: ...
    def task(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        max_attempts: int | None = None,
        retry_strategy: RetryStrategy | None = None,
        cancellation: CancellationPolicy | None = None,
        queue_name: str | None = None,
        no_retry_on: Iterable[type[BaseException]] = (),
    ) -> Any:
        """As :func:`durable_sa.task`, and registers what it makes."""
        if callable(name):
            return self.register(make_task(name))
        decorate = make_task(
            name,
            max_attempts=max_attempts,
            retry_strategy=retry_strategy,
            cancellation=cancellation,
            queue_name=queue_name,
            no_retry_on=no_retry_on,
        )

        def registering(function: Callable[..., Any]) -> Task[Any, Any]:
            return self.register(decorate(function))

        return registering

    def register(self, task: Task[ParamsT, T]) -> Task[ParamsT, T]:
        """Make a task known: its workers claim it from now on, and it may be spawned by name. Returns the task.

        Raises:
            TaskAlreadyRegistered: another task has that name.
        """
        if not isinstance(task, Task):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"register() takes a task, made by @task, not {type(task).__name__}")
        if self.tasks.setdefault(task.name, task) is not task:
            raise TaskAlreadyRegistered(task.name)
        return task

    def registered(self, name: str) -> Task[Any, Any]:
        """The task of that name.

        Raises:
            TaskNotRegistered: there is none.
        """
        try:
            return self.tasks[name]
        except KeyError:
            raise TaskNotRegistered(name, self.tasks) from None

    @overload
    async def spawn(
        self, task: Task[None, T], params: None = None, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[T]: ...
    @overload
    async def spawn(
        self, task: Task[ParamsT, T], params: ParamsT, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[T]: ...
    async def spawn(
        self, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[Any]:
        """Enqueue a task, in a transaction of its own.

        Raises:
            InvalidTaskParams, PayloadTooLarge: params that do not fit.
            InvalidConfiguration, InvalidName: an option that cannot work.
            QueueNotFound: there is no such queue.
            IdempotencyConflict: the idempotency key belongs to a task of another name or with other params.
        """
        return await self._spawn(prepare(self, task, params, options))

    async def spawn_by_name(
        self, name: str, params: Any = None, *, unchecked: bool = False, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[Any]:
        """Enqueue a task by its name. `unchecked` allows names that only the workers know; params are plain JSON then.

        Raises:
            TaskNotRegistered: nobody here knows the name, and `unchecked` is not set.
        """
        return await self._spawn(prepare(self, name, params, options, unchecked=unchecked))

    @overload
    def spawn_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: Task[None, T],
        params: None = None,
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, SpawnResult[T]]: ...
    @overload
    def spawn_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: Task[ParamsT, T],
        params: ParamsT,
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, SpawnResult[T]]: ...
    @overload
    def spawn_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task: Task[None, T],
        params: None = None,
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[T]: ...
    @overload
    def spawn_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task: Task[ParamsT, T],
        params: ParamsT,
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[T]: ...
    def spawn_with(
        self, session: Executor, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]
    ) -> Any:
        """Enqueue a task in the caller's transaction: it exists if and only if that commits.

        With an asynchronous session or connection this is a coroutine, with a synchronous one it returns directly.
        Nothing is flushed: if the params need `order.id`, flush before. Nothing is committed or closed either.

        Raises:
            DurableError: whatever :meth:`spawn` raises; the transaction is then still usable.
        """
        prepared = prepare(self, task, params, options)
        return perform(session, self.schema, lambda hint: _first(scripts.spawn([prepared])(hint)))

    @overload
    def spawn_by_name_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str,
        params: Any = None,
        *,
        unchecked: bool = False,
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, SpawnResult[Any]]: ...
    @overload
    def spawn_by_name_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        name: str,
        params: Any = None,
        *,
        unchecked: bool = False,
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[Any]: ...
    def spawn_by_name_with(
        self,
        session: Executor,
        name: str,
        params: Any = None,
        *,
        unchecked: bool = False,
        **options: Unpack[SpawnOptions],
    ) -> Any:
        """As :meth:`spawn_with`, by the task's name."""
        prepared = prepare(self, name, params, options, unchecked=unchecked)
        return perform(session, self.schema, lambda hint: _first(scripts.spawn([prepared])(hint)))

    async def spawn_many(self, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]) -> list[SpawnResult[Any]]:
        """Enqueue many tasks, all or none, with one statement a thousand. Results come in the order of the items.

        Raises:
            DurableError: whatever :meth:`spawn` raises, for the first item that is at fault, with its position in a
                note.
        """
        return await self._perform(scripts.spawn(self._prepare_many(items)))

    @overload
    def spawn_many_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]],
    ) -> Coroutine[Any, Any, list[SpawnResult[Any]]]: ...
    @overload
    def spawn_many_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]],
    ) -> list[SpawnResult[Any]]: ...
    def spawn_many_with(self, session: Executor, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]) -> Any:
        """As :meth:`spawn_many`, in the caller's transaction."""
        return perform(session, self.schema, scripts.spawn(self._prepare_many(items)))

    def _prepare_many(self, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]) -> list[Prepared]:
        prepared: list[Prepared] = []
        spawning = None if (telemetry := self.telemetry) is None else telemetry.spawn()
        ready = functools.partial(prepare, self, spawning=spawning, observed=spawning is not None)
        for position, item in enumerate(items):
            try:
                match item:
                    case Spawn():
                        prepared.append(ready(item.task, item.params, item.options))
                    case (task, params):
                        prepared.append(ready(task, params, {}))
                    case _:
                        raise TypeError(
                            "what is to be spawned is a tuple of a task and its params, or Spawn(task, params, ...), "
                            f"not {type(item).__name__}"
                        )
            except Exception as error:
                if spawning is not None:
                    spawning.over((), error)
                if isinstance(error, DurableError):
                    at_position(error, position)
                raise
        return prepared

    async def _spawn(self, prepared: Prepared) -> SpawnResult[Any]:
        """Together with others, but none waits for a transaction that has the idempotency key of another one."""
        if prepared.idempotency_key is None:
            return await self._spawns(prepared)
        attempt = 0
        while (spawned := await self._keyed_spawns(prepared)) is None:
            await asyncio.sleep(backoff(attempt, most=0.5))
            attempt += 1
        return spawned

    async def _spawn_keyed(self, prepared: list[Prepared]) -> Sequence[SpawnResult[Any] | BaseException | None]:
        """As `_spawn_batch`, with None for those whose key is in somebody's open transaction."""
        try:
            return await self._spawn_batch(prepared, spawning.SPAWN_KEYED)
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
        if len(prepared) == 1:
            return [None]
        middle = len(prepared) // 2
        return [*await self._spawn_keyed(prepared[:middle]), *await self._spawn_keyed(prepared[middle:])]

    async def _spawn_batch(
        self, prepared: list[Prepared], insert: Executable = spawning.SPAWN
    ) -> Sequence[SpawnResult[Any] | BaseException]:
        """Spawns of callers that came at the same time: one statement, an outcome each."""
        hint = Hint()
        script = scripts.insert(prepared, hint, insert)
        try:
            statement, parameters = next(script)
            while True:
                statement, parameters = script.send(await self.database.execute(statement, parameters))
        except StopIteration as end:
            results: list[SpawnResult[Any] | DurableError] = end.value
        # A worker beside it need not be told by way of the database.
        here = next((worker for worker in self._workers if worker.loop is asyncio.get_running_loop()), None)
        if here is None or not here.offer(hint) or any(spawn.task_name not in self.tasks for spawn in prepared):
            self._sender().send(hint)
        return cast("list[SpawnResult[Any] | BaseException]", results)

    async def emit_event(self, name: str, payload: Any = None, *, queue_name: str | None = None) -> bool:
        """Emit an event of a queue. The first of a name wins: False, and no change, for any later one.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or payload that cannot be stored.
            QueueNotFound: there is no such queue.
        """
        return await self._perform(self._emission(name, payload, queue_name))

    @overload
    def emit_event_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str,
        payload: Any = None,
        *,
        queue_name: str | None = None,
    ) -> Coroutine[Any, Any, bool]: ...
    @overload
    def emit_event_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        name: str,
        payload: Any = None,
        *,
        queue_name: str | None = None,
    ) -> bool: ...
    def emit_event_with(
        self, session: Executor, name: str, payload: Any = None, *, queue_name: str | None = None
    ) -> Any:
        """As :meth:`emit_event`, in the caller's transaction; whoever waits is woken after the commit."""
        return perform(session, self.schema, self._emission(name, payload, queue_name))

    def _emission(self, name: str, payload: Any, queue_name: str | None) -> Callable[[Hint], Script[bool]]:
        validate_name("event", name)
        queue = self.queue_name if queue_name is None else validate_name("queue", queue_name)
        what = f"the payload of event {name!r}"
        text = _PLAIN.encode(payload, what)
        check_size(text, self.max_payload_bytes, what)
        telemetry = self.telemetry
        return scripts.emit(queue, name, text, None if telemetry is None else telemetry.emit(name, queue))

    async def cancel_task(self, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> TaskStatus:
        """Cancel a task and its unfinished descendants; a running one is interrupted at its next await.

        Returns the task's status: `cancelled`, or how it had ended before, which then stays.

        Raises:
            TaskNotFound: there is no such task.
        """
        return await self._perform(scripts.cancel(_id_of(task_id)))

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
    def cancel_task_with(self, session: Executor, task_id: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> Any:
        """As :meth:`cancel_task`, in the caller's transaction."""
        return perform(session, self.schema, scripts.cancel(_id_of(task_id)))

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
        return await self._perform(scripts.retry(_id_of(task_id), max_attempts))

    async def _perform(self, script: Callable[[Hint], Script[T]]) -> T:
        """Run a script in a transaction of its own, again if it loses against another one."""

        async def run() -> T:
            for attempt in range(_TRIES):
                hint = Hint()
                done: tuple[T, str | None] | None = None
                try:
                    async with self.database.transaction() as connection:
                        result = await _drive(connection, script(hint))
                        done = result, (await connection.execute(maintenance.TRANSACTION_ID)).scalar()
                except DBAPIError as error:
                    status: str | None = "aborted"
                    if done is not None and done[1] is not None and is_lost(error):
                        # Run again after a commit without a reply, it would take its own work for somebody else's.
                        status = await self._status(done[1])
                    if status == "aborted" and is_conflict(error) and attempt + 1 < _TRIES:
                        await asyncio.sleep(backoff(attempt))
                        continue
                    if done is None or status != "committed":
                        raise
                self._sender().send(hint)
                return done[0]
            raise AssertionError("unreachable")

        with detached():
            task = asyncio.get_running_loop().create_task(run(), name="durable:client")
        return await asyncio.shield(task)

    async def _status(self, transaction_id: str) -> str | None:
        """What became of a transaction that nobody was told about: "committed", "aborted", or not known."""
        status: str | None = None
        for attempt in range(_STATUS_TRIES):
            rows = await self.database.execute(maintenance.TRANSACTION_STATUS, {"transaction_id": transaction_id})
            status = rows[0].status
            if status != "in progress":
                break
            await asyncio.sleep(backoff(attempt))
        return status

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
            TimeoutError: it has not ended after `timeout` seconds.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        task_id = _id_of(task)
        changed = asyncio.Event()
        self._changes.setdefault(task_id, set()).add(changed)
        deadline = asyncio.timeout(limit)
        try:
            async with deadline:
                row = await self._polls(task_id)
                pause = _FIRST_POLL
                while row is not None and row.outcome is None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await changed.wait()
                    changed.clear()
                    pause = min(_LONGEST_POLL, pause * 1.3)
                    try:
                        row = await self._polls(task_id)
                    except (SQLAlchemyError, OSError) as error:
                        if not is_transient(error):
                            raise
        except TimeoutError:
            if not deadline.expired():
                raise  # it is the database's
            raise TimeoutError(f"task {task_id} has not ended within {limit:g} seconds") from None
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

    async def _poll_batch(self, task_ids: list[uuid.UUID]) -> list[Row[Any] | None]:
        rows = await self.database.execute(waits.POLL_TASKS, {"task_ids": task_ids})
        found = {row.task_id: row for row in rows}
        return [found.get(task_id) for task_id in task_ids]

    def _poll_result(self, row: Row[Any]) -> TaskPollResult[Any]:
        output, error = None, None
        if row.outcome == "completed" and row.output is not None:
            known = self.tasks.get(row.task_name)
            codec: Codec[Any] = known.output_codec if known is not None else _PLAIN
            output = codec.decode(row.output, f"the output of task {row.task_id}")
        elif row.error is not None and row.outcome is not None:
            stored = _PLAIN.decode(row.error, f"the error of task {row.task_id}")
            error = TaskErrorInfo(str(stored.get("name")), str(stored.get("message")), stored.get("raw"))
        return TaskPollResult(row.task_id, TaskStatus(row.state), output, error)

    async def count_unclaimed_ready_tasks(self, queue_name: str | None = None) -> int:
        """How many tasks of a queue a worker could claim at this moment; 0 for one that is paused or not there.

        It counts rows: ask every few seconds, not with every request.
        """
        queue = self.queue_name if queue_name is None else validate_name("queue", queue_name)
        rows = await self.database.execute(spawning.COUNT_READY, {"queue_name": queue})
        return int(rows[0][0])

    async def create_queue(self, name: str | None = None, **policy: Unpack[QueuePolicy]) -> None:
        """Create a queue; if it is there, only the policies that are given change.

        `retention` is the age at which finished tasks are deleted, `event_retention` the age of events, in seconds or
        as a `timedelta`: 30 days for a new queue unless given. None keeps them. Workers delete in the background.

        Raises:
            InvalidName: a name that breaks the rules.
            InvalidConfiguration: an age below 0 or above 100 years.
        """
        if unknown := policy.keys() - QueuePolicy.__annotations__.keys():
            raise TypeError(f"create_queue() got an unexpected keyword argument {min(unknown)!r}")
        parameters: dict[str, Any] = {"queue_name": self._queue(name)}
        for key in ("retention", "event_retention"):
            value = policy.get(key)
            parameters[f"set_{key}"] = key in policy
            parameters[key] = None if value is None else seconds(value, key)
        await self.database.execute(queues.CREATE_QUEUE, parameters)

    async def drop_queue(self, name: str | None = None) -> None:
        """Delete a queue with its tasks, events and schedules. Nothing happens if there is none of that name.

        What open transactions have spawned into it cannot be seen yet: drop it once more when they are over.
        """
        queue = self._queue(name)
        async with self.database.transaction() as connection:
            for row in await connection.execute(queues.DROP_SCHEDULES, {"queue_name": queue}):
                await pgcron.remove_job(connection, row.pgcron_job_name)
            await connection.execute(queues.DROP_QUEUE, {"queue_name": queue})
            await connection.execute(queues.DELETE_QUEUE_EVENTS, {"queue_name": queue})
        while await self.database.execute(queues.DELETE_QUEUE_TASKS, {"queue_name": queue, "wanted": 1000}):
            pass
        self._sender().send(Hint(taken=True))

    async def list_queues(self) -> list[str]:
        """The names of all queues, sorted."""
        return [row.queue_name for row in await self.database.execute(queues.LIST_QUEUES)]

    async def require_queue(self, name: str) -> None:
        """Raise `QueueNotFound` unless there is a queue of that name."""
        if not await self.database.execute(queues.KNOWN_QUEUES, {"queue_names": [name]}):
            raise QueueNotFound(name)

    def _queue(self, name: str | None) -> str:
        return self.queue_name if name is None else validate_name("queue", name)

    async def cleanup_tasks(self, older_than: Duration, *, limit: int = 1000, queue_name: str | None = None) -> int:
        """Delete up to `limit` tasks that ended longer ago than `older_than`, with all that belongs to them.

        What a live ancestor, a child or a waiting task still needs stays, and so does what a foreign key of the
        application refers to. Returns the number deleted: fewer than `limit` when nothing more is to go.

        Raises:
            InvalidConfiguration: an age below 0 or above 100 years, a `limit` below 1.
        """
        queue, age = self._queue(queue_name), seconds(older_than, "older_than")
        _check_limit(limit)
        deleted = 0
        # Parents stay until their children have gone.
        while deleted < limit and (more := await delete_tasks(self.database, queue, age, limit - deleted)):
            deleted += more
        return deleted

    async def cleanup_events(self, older_than: Duration, *, limit: int = 1000, queue_name: str | None = None) -> int:
        """Delete up to `limit` events emitted longer ago than `older_than` that nobody waits for.

        Their names are free again. Returns the number deleted.
        """
        queue, age = self._queue(queue_name), seconds(older_than, "older_than")
        _check_limit(limit)
        parameters = {"queue_name": queue, "age": age, "wanted": limit}
        return len(await self.database.execute(queues.DELETE_EVENTS, parameters))

    async def pause_queue(self, name: str | None = None) -> None:
        """Let no worker claim from a queue until it is resumed; what runs goes on.

        Raises:
            QueueNotFound: there is no such queue.
        """
        await self._pause(name, paused=True)

    async def resume_queue(self, name: str | None = None) -> None:
        """Let workers claim from a paused queue again.

        Raises:
            QueueNotFound: there is no such queue.
        """
        await self._pause(name, paused=False)

    async def _pause(self, name: str | None, *, paused: bool) -> None:
        queue = self._queue(name)
        if not await self.database.execute(queues.PAUSE_QUEUE, {"name": queue, "paused": paused}):
            raise QueueNotFound(queue)
        if not paused:
            hint = Hint()
            hint.add(queue, 0, datetime(1970, 1, 1, tzinfo=UTC))
            self._sender().send(hint)

    async def create_schedule(
        self,
        name: str,
        *,
        task: Task[Any, Any] | str,
        cron_expression: str,
        params: Any = None,
        timezone: str = "UTC",
        metadata: Mapping[str, Any] | None = None,
        backend: Backend = "worker",
        misfire: Misfire | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[SpawnOptions],
    ) -> None:
        """Spawn a task at each tick of a cron expression; defining a name again replaces what it stood for.

        Workers fire it, each tick once across the fleet, in the queue given by `queue_name`. Five fields, or six with
        seconds first. `misfire` is for ticks that no worker was there to fire within a minute: `skip` them, `run_once`
        for the latest, which is what happens if nothing is said, or `run_all`, up to the latest hundred.
        `overlap="skip"` leaves out ticks while the task of the one before has not ended. The options of the task and
        of this client are stored with it; those of the process that fires it do not count.

        `backend="pg_cron"` hands the schedule to the extension; see :func:`durable_sa.setup_pgcron`. It goes by the
        server's time zone and by minutes, knows five fields without `L`, `W` and `#`, and makes up for no ticks.

        Raises:
            InvalidCron: an expression that cannot be read, or never comes true.
            InvalidName, InvalidTaskParams, InvalidConfiguration, TaskNotRegistered: as for a spawn.
            QueueNotFound: there is no such queue.
        """
        await schedules.create(
            self,
            schedules.Definition(
                validate_name("schedule", name),
                task,
                params,
                cron_expression,
                timezone,
                metadata,
                backend,
                misfire,
                overlap,
                options,
            ),
        )
        self._sender().send(Hint(limits=True))

    async def delete_schedule(self, name: str) -> None:
        """Remove a schedule; tasks that it has spawned go on.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await schedules.delete(self, validate_name("schedule", name))

    async def list_schedules(self, filter: ScheduleFilter | None = None) -> list[ScheduleInfo]:  # noqa: A002
        """Schedules by name, those that match everything in `filter`."""
        return await schedules.listed(self, filter or ScheduleFilter())

    async def pause_schedule(self, name: str) -> None:
        """Let a schedule not fire until it is resumed. Ticks of the pause are not made up for.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await schedules.pause(self, validate_name("schedule", name), paused=True)

    async def resume_schedule(self, name: str) -> None:
        """Let a paused schedule fire again, from its next tick on.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await schedules.pause(self, validate_name("schedule", name), paused=False)
        self._sender().send(Hint(limits=True))

    async def trigger_schedule(self, name: str) -> SpawnResult[Any]:
        """Spawn a schedule's task now, besides its ticks.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        prepared = await schedules.triggered(self, validate_name("schedule", name))
        return await self._spawn(prepared)

    async def start_worker(self, **options: Unpack[WorkerOptions]) -> Worker:
        """Start a worker in the background of the running event loop; end it with `await worker.shutdown()`.

        Raises:
            InvalidConfiguration: an option that cannot work, such as a `claim_timeout` below 1 second.
            QueueNotFound: one of its queues does not exist.
            SchemaMismatch: the tables are not those that this version needs.
        """
        worker = Worker(self, Settings.resolve(options, self.queue_name))
        await worker.start()
        self._workers.add(worker)
        return worker

    @asynccontextmanager
    async def worker(self, **options: Unpack[WorkerOptions]) -> AsyncGenerator[Worker]:
        """A worker for the length of an ``async with`` block; at its end it is shut down. As :meth:`start_worker`."""
        worker = await self.start_worker(**options)
        try:
            yield worker
        finally:
            await worker.shutdown()

    async def run_worker(self, **options: Unpack[WorkerOptions]) -> None:
        """Run a worker until SIGTERM or SIGINT. A second signal gives its runs back without waiting for them.

        It takes the process to be there for the worker: what is in memory once it has started, code above all, is left
        out of garbage collections from then on (`gc.freeze`), which would cost a quarter of the throughput.

        Raises:
            DurableError: whatever :meth:`start_worker` raises.
        """
        worker = await self.start_worker(**options)
        try:
            async with signals_handled(worker):
                gc.collect()
                gc.freeze()
                await worker.wait()
        finally:
            await worker.shutdown()

    def forget_worker(self, worker: Worker) -> None:
        """A worker has ended."""
        self._workers.discard(worker)


def _first(script: Script[list[SpawnResult[Any]]]) -> Script[SpawnResult[Any]]:
    results = yield from script
    return results[0]


async def _drive(connection: AsyncConnection, script: Script[T]) -> T:
    try:
        statement, parameters = next(script)
        while True:
            result = await connection.execute(statement, parameters)
            statement, parameters = script.send(result.all() if result.returns_rows else ())
    except StopIteration as end:
        value: T = end.value
        return value


def _check_limit(limit: int) -> None:
    integer(limit, "limit", minimum=1, maximum=2**31 - 1)


def _id_of(task: uuid.UUID | SpawnResult[Any] | TaskHandle[Any]) -> uuid.UUID:
    if isinstance(task, SpawnResult | TaskHandle):
        return task.task_id
    if isinstance(task, uuid.UUID):  # pyright: ignore[reportUnnecessaryIsInstance]
        return task
    try:
        return uuid.UUID(str(task))
    except ValueError:
        raise TypeError(
            f"a task is named by its UUID, a SpawnResult or a TaskHandle, not {type(task).__name__}"
        ) from None
