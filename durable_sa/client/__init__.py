"""The client: registers tasks, spawns them, returns their results, and starts workers."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, cast

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import scoped_session, sessionmaker
from typing_extensions import TypeVar as DefaultTypeVar
from typing_extensions import Unpack

from ..database.batches import Batch
from ..database.hint import channel_name
from ..database.notifier import flush
from ..hooks import Hooks, chain, scopes
from ..models import DEFAULT_QUEUE, SCHEMA
from ..options import Replay, WorkerOptions
from ..policies import DEFAULT_RETRY_STRATEGY, MAX_LOST_WORKERS, CancellationPolicy, RetryStrategy
from ..serialization.codec import DEFAULT_MAX_PAYLOAD_BYTES
from ..tasks import FollowUp, Task
from .bulk import Bulk
from .events import Events
from .messages import Messages
from .queues import QueuePolicy, Queues
from .reading import Reading
from .registry import Registry
from .results import Results
from .schedules import Schedules
from .streams import StreamReading

if TYPE_CHECKING:
    from ..telemetry import Telemetry
    from ..worker.settings import Settings
    from ..worker.supervision import Supervision
    from ..worker.worker import Worker

__all__ = ["Durable", "QueuePolicy"]

BATCH_TIMEOUT = 2.0
"""Seconds for which :meth:`Durable.close` waits for calls in flight."""

StateT = DefaultTypeVar("StateT", default=Any)


class Durable(Registry, Results, StreamReading, Reading, Bulk, Events, Queues, Schedules, Messages, Generic[StateT]):
    """Durable execution on an application's own Postgres.

    `bind` is an `AsyncEngine`, an `async_sessionmaker` or a URL, and is resolved when it is first needed: a process
    that only calls the `*_with` methods needs none. A process without workers and awaited calls may give a
    synchronous one, an `Engine` or a URL of psycopg2. Without it, `DURABLE_DATABASE_URL` is used, or if that is not
    set, the embedded Postgres. `sync_bind` is a `sessionmaker`, a `scoped_session` or an `Engine`: `def` functions
    of `ctx.transaction` then run in a thread, with a `Session` of it. With psycopg one is made of `bind`. An engine
    that is given is neither configured nor disposed of; one that is made from a URL is disposed of by
    :meth:`close`, or at the end of ``async with Durable(...)``.

    `lifespan` is an async context manager, or a function that returns one, entered by each worker; what it yields is
    `ctx.state`, otherwise `state` is. `queue_name` is the default queue of spawns and workers, and
    `default_max_attempts`, `default_retry_strategy` (5 seconds between attempts) and `default_cancellation` (never) are
    the defaults of tasks. A value may have `max_payload_bytes` as JSON, 16 MiB by default and at most 1 GiB. `schema`
    is the schema of the tables, ``durable`` by default. `hooks` surround all spawns, runs and steps of the client; see
    :class:`durable_sa.Hooks`. Spans and metrics are recorded by `telemetry`, a
    :class:`durable_sa.telemetry.Telemetry`; by default with OpenTelemetry's global providers as soon as the application
    has set these up; not at all if it is False. If a recorded step is met with other arguments it runs anew, and a
    warning is logged; with `replay="strict"` the task fails with `ReplayMismatch` before anything runs.
    Tasks fail with `LeaseLost` once `max_lost_workers` workers in a row were lost while they ran nothing but them.
    `on_failure` and `on_cancel` are tasks, or names of tasks, that are spawned with a :class:`durable_sa.TaskEnded` if
    a task that this client spawned fails or is cancelled, and has no such task of its own. Lines of
    `ctx.logger` of the level `keep_logs`, such as `logging.INFO`, or a higher one are kept as the task's stream
    ``$log``. `tasks` are registered; those of another client are `other.tasks`.

    Raises:
        InvalidConfiguration, InvalidName: a setting that cannot work.
        TaskAlreadyRegistered: two of `tasks` have the same name.
    """

    def __init__(
        self,
        bind: AsyncEngine
        | async_sessionmaker[Any]
        | Engine
        | sessionmaker[Any]
        | scoped_session[Any]
        | URL
        | str
        | None = None,
        *,
        queue_name: str = DEFAULT_QUEUE,
        state: StateT | None = None,
        lifespan: Callable[..., AbstractAsyncContextManager[StateT]]
        | AbstractAsyncContextManager[StateT]
        | None = None,
        schema: str = SCHEMA,
        default_max_attempts: int = 5,
        default_retry_strategy: RetryStrategy | None = DEFAULT_RETRY_STRATEGY,
        default_cancellation: CancellationPolicy | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        hooks: Iterable[Hooks] = (),
        telemetry: Telemetry | Literal[False] | None = None,
        replay: Replay = "warn",
        sync_bind: sessionmaker[Any] | scoped_session[Any] | Engine | None = None,
        max_lost_workers: int = MAX_LOST_WORKERS,
        on_failure: FollowUp | None = None,
        on_cancel: FollowUp | None = None,
        keep_logs: int | None = None,
        tasks: Iterable[Task[Any, Any]] | Mapping[str, Task[Any, Any]] = (),
    ) -> None:
        hooks = tuple(hooks)
        super().__init__(
            bind,
            queue_name=queue_name,
            schema=schema,
            default_max_attempts=default_max_attempts,
            default_retry_strategy=default_retry_strategy,
            default_cancellation=default_cancellation,
            max_payload_bytes=max_payload_bytes,
            hooks=chain(hooks),
            telemetry=telemetry,
            replay=replay,
            sync_bind=sync_bind,
            scopes=scopes(hooks),
            max_lost_workers=max_lost_workers,
            on_failure=on_failure,
            on_cancel=on_cancel,
            keep_logs=keep_logs,
        )
        self.state = state
        """The value of `ctx.state` without a lifespan."""
        self.lifespan = lifespan
        given = cast("Mapping[str, Task[Any, Any]]", tasks).values() if isinstance(tasks, Mapping) else tasks
        for task in given:
            self.register(task)

    def __repr__(self) -> str:
        return f"<Durable queue={self.queue_name!r} tasks={len(self.tasks)}>"

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

        Waits, but not for long, for calls and wake-up hints in flight, also over engines of the application: dispose of
        those afterwards. Of the engines that were made from a URL, it is the one of the running event loop.
        """
        ended = await asyncio.gather(*(_shut_down(worker) for worker in list(self._workers)), return_exceptions=True)
        await asyncio.gather(*(batch.flush(BATCH_TIMEOUT) for batch in vars(self).values() if isinstance(batch, Batch)))
        await flush(channel_name(self.schema))
        for close in self.closers:
            await close()
        if (database := self._databases.pop() or self._database) is not None:
            await database.close()
            if database.owned:
                self._database = None
        self._close_sync()
        for error in ended:
            if error is not None:
                raise error

    async def migrate(self) -> None:
        """Bring the durable tables to the newest version, creating their schema if need be; safe to call at any time.

        For applications without Alembic, for tests and demos. Several processes may call it at once.
        """
        from .. import migrations

        engine = self.database.engine.execution_options(isolation_level="READ COMMITTED")
        async with engine.begin() as connection:
            await connection.run_sync(functools.partial(migrations.migrate, schema=self.schema, deferred=True))
        autocommit = self.database.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with autocommit.connect() as connection:
            await connection.run_sync(migrations.finish, self.schema)

    async def check_schema(self) -> None:
        """Compare the tables in the database with what this version of the package needs.

        Raises:
            SchemaMismatch: they are missing, older or newer; the message says what to do.
            InvalidConfiguration: a connection pooler does not let transactions through.
        """
        await self.database.check_schema()

    async def start_worker(self, **options: Unpack[WorkerOptions]) -> Worker:
        """Start a worker in the background of the running event loop; end it with `await worker.shutdown()`.

        On a database that is read-only it waits, in the background, until that takes writes.

        Raises:
            InvalidConfiguration: an option that cannot work, such as a `claim_timeout` below 1 second.
            QueueNotFound: one of its queues does not exist.
            SchemaMismatch: the tables are not those that this version needs.
        """
        from ..worker.settings import Settings

        return await self._start_worker(Settings.resolve(options, self.queue_name))

    async def _start_worker(self, settings: Settings, supervision: Supervision | None = None) -> Worker:
        from ..worker.worker import Worker

        self.check_scopes()
        worker = Worker(
            self,
            settings,
            state=self.state,
            lifespan=None if self.lifespan is None else self._make_lifespan,
            on_task_ended=self.task_changed,
            on_ended=self._workers.discard,
            supervision=supervision,
        )
        await worker.start()
        self._workers.add(worker)
        return worker

    def _make_lifespan(self) -> AbstractAsyncContextManager[StateT]:
        lifespan = self.lifespan
        if isinstance(lifespan, AbstractAsyncContextManager):
            return cast("AbstractAsyncContextManager[StateT]", lifespan)
        if lifespan is None:
            raise AssertionError("a worker without lifespan enters none")
        return lifespan(self) if inspect.signature(lifespan).parameters else lifespan()

    @asynccontextmanager
    async def worker(self, **options: Unpack[WorkerOptions]) -> AsyncGenerator[Worker]:
        """Start a worker as :meth:`start_worker` does, and shut it down at the end of an ``async with`` block."""
        worker = await self.start_worker(**options)
        try:
            yield worker
        finally:
            await worker.shutdown()

    async def run_worker(self, *, signals: bool | None = None, **options: Unpack[WorkerOptions]) -> None:
        """Run a worker until SIGTERM, SIGINT or SIGHUP. A second signal, or SIGQUIT, gives its runs back at once.

        A signal during its start aborts the start. Signals are taken on the main thread, if no other code, such as a
        web server, has a handler for them; with `signals=True` in any case, and that handler is called as well; with
        `signals=False` never. Where they are not taken, cancel the call to shut the worker down.

        After a signal the process ends in `shutdown_timeout` and 30 seconds, by force if the code of a task does not
        let it: the log says which task.

        The process is taken to exist for the worker: all objects in memory once it has started, code above all, are
        excluded from garbage collections (`gc.freeze`), which would cost a quarter of the throughput.

        Raises:
            DurableError: the same errors as :meth:`start_worker`.
            InvalidConfiguration: signals are to be taken outside of the main thread.
            InvalidState: the worker has given its runs back and ended, because `def` runs that have ended, by a
                cancellation for example, have left more threads behind than it has slots.
        """
        from ..worker.settings import Settings

        await self._run_worker(Settings.resolve(options, self.queue_name), signals)

    async def _run_worker(
        self, settings: Settings, signals: bool | None, supervision: Supervision | None = None
    ) -> None:
        from ..worker.interrupts import signals_handled

        async with signals_handled(signals, settings.shutdown_timeout, supervision) as interrupts:
            worker = await interrupts.started(self._start_worker(settings, supervision))
            if worker is None:
                return
            try:
                gc.collect()
                gc.freeze()
                await worker.wait()
            finally:
                await worker.shutdown()
            if worker.error is not None:
                raise worker.error


async def _shut_down(worker: Worker) -> None:
    """Shut down a worker, which may be one of another event loop; on one that does not run, it has ended already."""
    if worker.loop is asyncio.get_running_loop():
        await worker.shutdown()
    elif worker.loop.is_running():
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(worker.shutdown(), worker.loop))
