"""The worker: its parts, its start, and its end, which the state of the database cannot hold up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ..app import App
from ..concurrency import branches, task_factory
from ..concurrency.blocking import AnyTask
from ..database.channel import DedicatedConnection, reconnecting
from ..database.clock import LocalClock
from ..database.hint import Hint
from ..database.listener import Listener
from ..database.notifier import sender
from ..database.private import capacity
from ..database_errors import reason
from ..errors import DurableError, InvalidConfiguration, QueueNotFound
from ..execution.writer import Writer
from ..statements import claiming, queues
from ..statements.claiming import ClaimedRun
from . import limit_setup
from .agenda import Agenda
from .background import BackgroundTasks
from .blocked import BlockedLoop
from .claims import Claimer
from .dispatcher import Dispatcher
from .endings import Endings
from .executor import Executor
from .health import HealthServer
from .long_steps import LongSteps
from .maintenance import Maintenance
from .minutes import Minutes
from .registration import Registration
from .sampler import QueueSampler
from .settings import Settings
from .slots import RunKey, Slots
from .succession import Succession
from .supervision import Supervision
from .suspects import Suspects

logger = logging.getLogger("durable_sa")

CLOSING_TIMEOUT = 10.0
"""Seconds that the last writes and the removal of the registration may take at shutdown."""
HINTS_TIMEOUT = 2.0
"""Seconds that the last hints may take at shutdown."""
SHOWN_RUNS = 10
"""Runs that the line about a shutdown names."""
CLAIMS = "durable:claims"
MORE_INTERVAL = 0.05
"""Least seconds between hints that keys may be ready for which this worker has no slots."""
ENABLE_RETRY_DELAY = 30.0
"""Seconds until the next try to have a queue's tasks claimed by their limit keys."""


class Worker:
    """A running worker. `Durable.start_worker` makes it; :meth:`shutdown` ends it."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        *,
        state: Any,
        lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None,
        on_task_ended: Callable[[uuid.UUID], None],
        on_ended: Callable[[Worker], None],
        supervision: Supervision | None = None,
    ) -> None:
        """Make the parts of a worker, each from those above it.

        `ctx.state` is what the context manager returned by `lifespan` yields, or `state` without one. `on_task_ended`
        is called when a run of the worker has ended its task, `on_ended` when the worker has ended. `supervision` is
        the link to the watcher of the process, if it has one.
        """
        database = app.database
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.health_port: int | None = None
        """The port that answers probes."""
        self._app = app
        self._telemetry = app.telemetry
        self._state = state
        self._lifespan = lifespan
        self._on_ended = on_ended
        self._supervision = supervision
        self._exit = contextlib.AsyncExitStack()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._shutdown_task: asyncio.Task[None] | None = None
        self._health: HealthServer | None = None
        # Three, so that the claims, the writes of runs and all else do not wait for each other.
        self._claims_connection = DedicatedConnection(database)
        self._writer_connection = DedicatedConnection(database)
        self._shared_connection = DedicatedConnection(database)
        self._background = BackgroundTasks()
        self._hints = sender(database)
        self._clock = LocalClock()
        self._slots = Slots(settings)
        self._agenda = Agenda(settings.queue_names, self._clock)
        self._listener = Listener(database, settings.listen_url, self._agenda.receive) if settings.listen else None
        self._sampler = QueueSampler(self._shared_connection, settings.queue_names)
        self._registration = Registration(
            database,
            self._shared_connection,
            settings,
            self._clock,
            self._background,
            stopping=self._stopping,
            stopped=self._stopped,
            on_lost=self._lease_lost,
            on_returned=self._registered_anew,
            watch=BlockedLoop(self._run_of).watch,
        )
        self._dispatcher = Dispatcher(settings, self._agenda, self._slots, self._registration, self._hints)
        self._writer = Writer(
            self._writer_connection,
            self._claims_connection,
            on_commit=self._dispatcher.committed,
            outage=self._registration.outage,
        )
        self._endings = Endings(
            settings,
            supervision,
            self._background,
            stopping=self._stopping.is_set,
            stop_claiming=self._stop_claiming,
            drained=self._drained,
            give_back=self.release_now,
            shutdown=self.shutdown,
        )
        self._minutes = Minutes(self._shared_connection, self._registration, self._clock)
        self._executor = Executor(
            app,
            self._shared_connection,
            self._registration,
            self._clock,
            self._background,
            self._agenda,
            self._slots,
            self._writer,
            self._endings,
            self._minutes,
            on_task_ended=on_task_ended,
        )
        self._suspects = Suspects(app, self._shared_connection, self._registration, self._agenda, self._slots)
        self.maintenance = Maintenance(
            app,
            self._shared_connection,
            self._registration,
            self._clock,
            self._agenda,
            self._dispatcher,
            self._executor,
            self._suspects,
            queue_names=settings.queue_names,
            listening=self._listening,
        )
        self._long_steps = LongSteps(self._shared_connection, self._registration, self._clock, self._slots)
        self._claimer = Claimer(
            app,
            settings,
            self._claims_connection,
            self._registration,
            self._clock,
            self._agenda,
            self._slots,
            self._writer,
            self._executor,
            self._suspects,
            self._endings.lifetime,
            stopping=self._stopping,
            listening=self._listening,
            on_more=self._more_ready,
            enable_limits=self._enable_limits,
        )
        self._succession = Succession(settings, self._shared_connection, self._agenda, self._executor, self._stopping)
        self._next_more = 0.0
        self._enabling: set[str] = set()

    def __repr__(self) -> str:
        return f"<Worker {self.settings.name} on {', '.join(self.queue_names)}>"

    @property
    def queue_names(self) -> tuple[str, ...]:
        """The queues that the worker serves."""
        return self.settings.queue_names

    @property
    def worker_id(self) -> uuid.UUID:
        """The worker's id in the database, another one after each lost lease."""
        return self._registration.worker_id

    @property
    def queue_samples(self) -> dict[str, tuple[float, float]]:
        """The number of ready tasks in each queue when last counted, and the age of the oldest in seconds."""
        return self._sampler.latest

    @property
    def limit_keys(self) -> dict[tuple[str, str], int]:
        """The number of limit keys of each queue and state when last counted."""
        return self._sampler.limit_keys

    def running_in(self) -> list[str]:
        """Return the queue of each run in progress. Safe to call from any thread."""
        return self._slots.queue_names()

    def _run_of(self, task: AnyTask) -> ClaimedRun | None:
        """Return the run that an asyncio task is of, if it is one of this worker. Safe to call from any thread."""
        return next((run.claimed for run in list(self._slots.runs.values()) if task in run.branches.tasks), None)

    @property
    def abandoned_threads(self) -> int:
        """The number of threads that execute code of `def` runs that have ended."""
        return len(self._endings.threads.alive())

    @property
    def error(self) -> DurableError | None:
        """The reason for which the worker has ended by itself, if it has."""
        return self._endings.error

    @property
    def left_behind(self) -> bool:
        """True if code of its runs ignores its cancellation and goes on."""
        return bool(self._executor.unended())

    def unended(self) -> list[str]:
        """Describe the tasks whose code runs, also after its cancellation. Safe to call from any thread."""
        holding = asyncio.current_task(self.loop)
        descriptions: dict[RunKey, str] = {}
        for run in list(self._slots.runs.values()):
            blocking = holding is not None and holding in run.branches.tasks
            what = ", which blocks the event loop" if blocking else ""
            descriptions[run.claimed.key] = f"task {run.claimed.task_id} ({run.claimed.task_name}){what}"
        for claimed in self._executor.unended():
            what = ", which ignores its cancellation"
            descriptions[claimed.key] = f"task {claimed.task_id} ({claimed.task_name}){what}"
        return list(descriptions.values())

    async def start(self) -> None:
        """Register, and start to claim. If the database is read-only, do both in the background, once it takes writes.

        Raises:
            InvalidConfiguration: the pool has less than three connections, or the port for probes cannot be had.
            QueueNotFound: one of its queues does not exist.
            SchemaMismatch: the tables are not those that this version needs.
        """
        database = self._app.database
        await reconnecting(database.check_schema)
        known = await database.execute(queues.KNOWN_QUEUES, {"queue_names": list(self.queue_names)})
        for name in self.queue_names:
            if name not in {row.queue_name for row in known}:
                raise QueueNotFound(name)
        self._agenda.limited.add(row.queue_name for row in known if row.limited)
        task_factory.install(self.loop)
        try:
            await self._connect()
            if self._lifespan is not None:
                self._state = await self._exit.enter_async_context(self._lifespan())
            self._executor.state = self._state
            if self.settings.health_port is not None:
                # A watcher answers the probes of others, and asks its processes.
                host = None if self._supervision is None else "127.0.0.1"
                port = self.settings.health_port
                self._health = HealthServer(database, port, self._registration.vital_signs, host)
                self.health_port = await self._health.start()
            await reconnecting(self._writer.warm_up)
            await reconnecting(self._registration.start)
        except BaseException:
            task_factory.uninstall(self.loop)
            if self._health is not None:
                await self._health.stop()
            await self._disconnect()
            await self._exit.aclose()
            raise
        self._registration.turn()
        serve = self._background.serve
        serve(self._claimer.run, CLAIMS, self._claims_connection)
        serve(self._writer.run, "durable:writer", self._writer_connection)
        serve(self._writer.run_second, "durable:writer-second")
        serve(self.maintenance.run, "durable:maintenance", self._shared_connection)
        serve(self._long_steps.run, "durable:long-steps")
        serve(self._minutes.run, "durable:minutes")
        if self._telemetry is not None:
            self._telemetry.watch(self)
            serve(self._sampler.run, "durable:samples")
        if self._listener is not None:
            serve(self._listener.run, "durable:listener")
        logger.info(
            "worker %s has started (queues: %s; tasks: %d)",
            self.settings.name,
            ", ".join(self.queue_names),
            len(self._app.tasks),
        )
        if self._supervision is not None:
            self._supervision.on_lost = self._settle
            self._report_start()

    def _report_start(self) -> None:
        if self._supervision is not None:
            self._supervision.report("started", worker_id=str(self.worker_id), port=self.health_port)

    def _settle(self, lost: dict[str, Any]) -> None:
        """Settle the runs of another process, which has ended. Called in another thread."""

        async def settle() -> None:
            await self._succession.settle(lost)
            if self._supervision is not None:
                self._supervision.report("settled", worker_id=lost["worker_id"])

        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(lambda: self.start_task(settle(), "durable:settle"))

    @property
    def _connections(self) -> tuple[DedicatedConnection, ...]:
        return self._claims_connection, self._writer_connection, self._shared_connection

    async def _connect(self) -> None:
        try:
            for connection in self._connections:
                await connection.open()
        except PoolTimeout as error:
            raise InvalidConfiguration(
                "bind", "a worker needs three pooled connections", "Raise pool_size or max_overflow."
            ) from error
        limit = capacity(self._app.database.engine.sync_engine.pool)
        if limit is not None and limit <= len(self._connections):
            logger.warning(
                "the pool has %d connections, which the worker keeps, and no room for ctx.transaction; raise pool_size "
                "or max_overflow",
                limit,
            )

    async def _disconnect(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections))

    def _tear_down(self) -> None:
        for connection in self._connections:
            connection.tear_down()

    def _lease_lost(self) -> None:
        logger.warning("worker %s lost its lease: cancelling %d runs", self.settings.name, len(self._slots.runs))
        self._executor.give_up()
        self._writer.abandon()

    def _registered_anew(self) -> None:
        self._writer.resume()
        self._agenda.scan_all()
        if not self._stopping.is_set():
            self._report_start()

    def _listening(self) -> bool:
        return self._listener is not None and self._listener.working

    def _more_ready(self, queue_name: str) -> None:
        """Notify other workers, now and then, that keys of a queue may be ready for which this one has no slots."""
        if self.loop.time() >= self._next_more:
            self._next_more = self.loop.time() + MORE_INTERVAL
            hint = Hint()
            hint.add(queue_name, 0, self._clock.now())
            self._hints.send(hint)

    def _enable_limits(self, queue_name: str) -> None:
        """Have a queue's tasks claimed key by key: one has a key, or the client that set its limits did not finish."""
        if queue_name not in self._enabling:
            self._enabling.add(queue_name)
            self._background.start_task(self._enable(queue_name), "durable:enable-limits")

    async def _enable(self, queue_name: str) -> None:
        pause = 0.0
        try:
            await limit_setup.enable(self._app.database, queue_name)
            self._agenda.limited.add([queue_name])
            self._agenda.scan_all()
        except (DurableError, SQLAlchemyError, OSError) as error:
            pause = ENABLE_RETRY_DELAY
            logger.warning("tasks of queue %s are not claimed by their limit keys yet: %s", queue_name, reason(error))
        self.loop.call_later(pause, self._enabling.discard, queue_name)

    async def shutdown(self) -> None:
        """Stop claiming, let runs end for up to `shutdown_timeout` seconds, give the others back, and unregister.

        Returns in bounded time, also while the database is away. Further calls wait for the first one.
        """
        if self._shutdown_task is None:
            with branches.detached():
                self._shutdown_task = self.loop.create_task(self._shut_down(), name="durable:shutdown")
        await asyncio.shield(self._shutdown_task)

    async def wait(self) -> None:
        """Wait until the worker has been shut down."""
        await self._stopped.wait()

    def release_now(self) -> None:
        """Give all runs back at once, instead of after `shutdown_timeout`."""
        self._stop_claiming()
        self._executor.release()

    async def _drained(self) -> None:
        """Wait until no run is in progress, once nothing is claimed any more."""
        await self._background.ended(CLAIMS)
        await self._slots.idle.wait()

    def _stop_claiming(self) -> None:
        self._stopping.set()
        self._agenda.claim.set()

    def _log_shutdown(self) -> None:
        runs = [item.claimed for item in self._slots.runs.values()] + self._slots.starting
        if not runs:
            logger.info("worker %s is shutting down: no run is in progress", self.settings.name)
            return
        shown = ", ".join(f"{run.task_name} ({run.task_id})" for run in runs[:SHOWN_RUNS])
        logger.info(
            "worker %s is shutting down: it waits up to %g seconds for %d run%s: %s%s",
            self.settings.name,
            self.settings.shutdown_timeout,
            len(runs),
            "" if len(runs) == 1 else "s",
            shown,
            f", and {len(runs) - SHOWN_RUNS} more" if len(runs) > SHOWN_RUNS else "",
        )

    async def _shut_down(self) -> None:
        self._stop_claiming()
        self._log_shutdown()
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                # A claim may be in flight, and the tasks that it claims are run, too.
                await self._drained()
        except TimeoutError:
            self.release_now()
        handing_over = self.loop.create_task(self._hand_over(), name="durable:hand-over")
        done, _ = await asyncio.wait([handing_over], timeout=CLOSING_TIMEOUT)
        if not done:
            # The connections come first: cancelled, a driver waits for the server to cancel the statement.
            self._tear_down()
            handing_over.cancel()
            await asyncio.wait([handing_over], timeout=HINTS_TIMEOUT)
        try:
            if not done:
                raise TimeoutError
            handing_over.result()
        except Exception as error:  # noqa: BLE001 - a driver may raise errors of any class; the worker ends all the same
            logger.warning(
                "worker %s has ended with work left (%s); other workers take it over when its lease has ended",
                self.settings.name,
                reason(error),
            )
        await self._close()

    async def _hand_over(self) -> None:
        """Write what is left to write, pass on what is due, and unregister."""
        await self._drained()
        await self._writer.idle.wait()
        await reconnecting(self.maintenance.work)
        await self._minutes.try_to_write()
        parameters = {"worker_id": self.worker_id}
        await reconnecting(lambda: self._shared_connection.execute(claiming.REMOVE_WORKER, parameters))

    async def _close(self) -> None:
        if self._telemetry is not None:
            self._telemetry.forget(self)
        self._registration.expire()
        tearing = self.loop.call_later(HINTS_TIMEOUT, self._tear_down)
        await self._background.end()
        tearing.cancel()
        await asyncio.gather(
            self._registration.stop_heartbeat(),
            self._disconnect(),
            *(() if self._health is None else (self._health.stop(),)),
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HINTS_TIMEOUT):
                await self._hints.flush()
        self._executor.threads.shutdown()
        task_factory.uninstall(self.loop)
        try:
            await self._exit.aclose()
        finally:
            self._on_ended(self)
            self._stopped.set()
            logger.info("worker %s has ended", self.settings.name)

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside of every run."""
        self._background.start_task(coroutine, name)

    def offer(self, hint: Hint) -> bool:
        """Note a hint that comes from this process. Return False if other workers must be notified as well."""
        return self._dispatcher.offer(hint)

    def clock_moved(self, now: datetime, by: timedelta) -> None:
        """Adjust to a change of the database's clock, which only tests make: look at everything that may be due now."""
        # Not moved by that time, because a look or a heartbeat may have returned the later time already.
        self._clock.set(now)
        self._executor.clock_moved(by)
        self.maintenance.look_at_everything()
        self._agenda.scan_all()

    async def answered(self) -> None:
        """Wait for the statements of maintenance that are in flight, which may use the former time of the database."""
        await self._shared_connection.answered()
