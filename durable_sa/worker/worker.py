"""The worker: what it consists of, how it starts, and how it ends, with a database that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import uuid
from collections.abc import Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ..concurrency import branches, task_factory
from ..database.channel import DedicatedConnection, reconnecting
from ..database.clock import LocalClock
from ..database.hint import Hint
from ..database.listener import Listener
from ..database.notifier import sender
from ..database_errors import reason
from ..errors import InvalidConfiguration, QueueNotFound
from ..execution.reader import Reader
from ..execution.writer import Writer
from ..schedules.store import fire_due
from ..statements import claiming, queues
from .background import BackgroundTasks
from .claims import Claimer
from .dispatcher import News
from .executor import Executor
from .health import HealthServer
from .maintenance import Maintenance
from .registration import Registration
from .retention import Retention
from .sampler import QueueSampler
from .settings import Settings

if TYPE_CHECKING:
    from ..client import Durable

logger = logging.getLogger("durable_sa")

TEND_INTERVAL = 5.0
"""Seconds between looks for maintenance while hints arrive and nothing runs."""
TEND_INTERVAL_BUSY = 1.0
CLOSING_DEADLINE = 10.0
"""Seconds that the last writes and the goodbye get at shutdown."""
CLAIMING = "durable:claims"


class Worker:
    """A running worker. Made by `Durable.start_worker`; ended by :meth:`shutdown`."""

    def __init__(self, durable: Durable[Any], settings: Settings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.health_port: int | None = None
        """Where probes are answered."""
        self._durable = durable
        self._telemetry = durable.telemetry
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._shutdown_task: asyncio.Task[None] | None = None
        self._exit = contextlib.AsyncExitStack()
        self._health: HealthServer | None = None
        database = durable.database
        self._channels = DedicatedConnection(database), DedicatedConnection(database), DedicatedConnection(database)
        for_claims, for_writes, self._rest = self._channels
        self._sampler = QueueSampler(self._rest, settings.queue_names)
        self._clock = LocalClock()
        self._background = BackgroundTasks()
        self._hints = sender(database)
        self._registration = Registration(
            database,
            self._rest,
            settings,
            self._clock,
            self._background,
            stopping=self._stopping,
            stopped=self._stopped,
            registered=self._registered,
            lost=self._lost,
            returned=self._returned,
        )
        self._writer = Writer(
            for_writes,
            for_claims,
            on_commit=lambda kind, writes, rows: self._news.committed(kind, writes, rows),  # noqa: PLW0108 - made last
        )
        self._runs = Executor(
            durable,
            self._rest,
            self._registration,
            self._writer,
            Reader(self._rest),
            self._clock,
            self._background,
            threads=max(settings.concurrency, 4),
            freed=lambda: self._claims.freed(),  # noqa: PLW0108 - made last
        )
        self.maintenance = Maintenance(
            self._rest,
            self.worker_id,
            self._clock,
            interval=self._tend_interval,
            announce=lambda hint: self._news.announce(hint),  # noqa: PLW0108 - made last
            check_runs=self._runs.check,
            poll_runs=self._runs.poll,
            fire_schedules=functools.partial(fire_due, durable, said=set()),
            forget=Retention(),
            gave_up=self._runs.gave_up,
        )
        self._claims = Claimer(
            durable,
            settings,
            for_claims,
            self._registration,
            self._runs,
            self._writer,
            self.maintenance,
            self._clock,
            wake=self._wake,
            stopping=self._stopping,
            listening=self._listening,
        )
        self._news = News(self._claims, self.maintenance, self._hints)
        self._listener = Listener(database, settings.listen_url, self._news.hinted) if settings.listen else None

    def __repr__(self) -> str:
        return f"<Worker {self.settings.name} on {', '.join(self.settings.queue_names)}>"

    @property
    def worker_id(self) -> uuid.UUID:
        """Its id in the database, another one each time that it has lost its lease."""
        return self._registration.worker_id

    @property
    def queue_samples(self) -> dict[str, tuple[float, float]]:
        """How many tasks were ready in each queue when they were last counted, and the age of the oldest."""
        return self._sampler.latest

    async def start(self) -> None:
        """Register, and start to claim. Where the database is read-only, that comes when it takes writes again.

        Raises:
            InvalidConfiguration: the pool does not give three connections, or the port for probes cannot be had.
            QueueNotFound: one of its queues does not exist.
            SchemaMismatch: the tables are not those that this version needs.
        """
        database = self._durable.database
        await reconnecting(self._durable.check_schema)
        known = await database.execute(queues.KNOWN_QUEUES, {"queue_names": list(self.settings.queue_names)})
        for name in self.settings.queue_names:
            if name not in {row.queue_name for row in known}:
                raise QueueNotFound(name)
        task_factory.install(self.loop)
        try:
            await self._connect()
            self._runs.state = await self._enter_lifespan()
            if self.settings.health_port is not None:
                self._health = HealthServer(database, self.settings.health_port, self._registration.vital_signs)
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
        for_claims, for_writes, rest = self._channels
        self._background.serve(self._claims.run, CLAIMING, for_claims)
        self._background.serve(self._writer.run, "durable:writer", for_writes)
        self._background.serve(self._writer.run_beside, "durable:writer-beside")
        self._background.serve(self.maintenance.run, "durable:maintenance", rest)
        if self._telemetry is not None:
            self._telemetry.watch(self)
            self._background.serve(self._sampler.run, "durable:samples")
        if self._listener is not None:
            self._background.serve(self._listener.run, "durable:listener")
        logger.info(
            "worker %s has started (queues: %s; tasks: %d)",
            self.settings.name,
            ", ".join(self.settings.queue_names),
            len(self._durable.tasks),
        )

    async def _connect(self) -> None:
        try:
            for channel in self._channels:
                await channel.open()
        except PoolTimeout as error:
            raise InvalidConfiguration(
                "bind",
                "its pool does not give a worker the three connections that it keeps",
                "Raise pool_size or max_overflow.",
            ) from error

    async def _disconnect(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def _enter_lifespan(self) -> Any:
        lifespan = self._durable.lifespan
        if lifespan is None:
            return self._durable.state
        if isinstance(lifespan, contextlib.AbstractAsyncContextManager):
            return await self._exit.enter_async_context(cast("contextlib.AbstractAsyncContextManager[Any]", lifespan))
        takes_client = bool(inspect.signature(lifespan).parameters)
        return await self._exit.enter_async_context(lifespan(self._durable) if takes_client else lifespan())

    def _registered(self, worker_id: uuid.UUID) -> None:
        self.maintenance.worker_id = worker_id

    def _lost(self) -> None:
        logger.warning("worker %s has lost its lease: giving up %d runs", self.settings.name, len(self._runs))
        self._runs.give_up()
        self._writer.abandon()

    def _returned(self) -> None:
        self._writer.resume()
        self._claims.look_everywhere()

    async def shutdown(self) -> None:
        """Stop claiming, let runs end for up to `shutdown_timeout` seconds, give the others back, and say goodbye.

        Returns in bounded time, also when the database is away. Calling it again waits for the first call.
        """
        if self._shutdown_task is None:
            with branches.detached():
                self._shutdown_task = self.loop.create_task(self._shut_down(), name="durable:shutdown")
        await asyncio.shield(self._shutdown_task)

    async def wait(self) -> None:
        """Wait until the worker has been shut down."""
        await self._stopped.wait()

    def release_now(self) -> None:
        """Give runs back at once, instead of waiting for `shutdown_timeout`."""
        self._stopping.set()
        self._wake.set()
        self._runs.release()

    async def _shut_down(self) -> None:
        self._stopping.set()
        self._wake.set()
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                # A claim may be on its way, and what it brings is run, too.
                await self._background.ended(CLAIMING)
                await self._runs.idle.wait()
        except TimeoutError:
            self.release_now()
        try:
            async with asyncio.timeout(CLOSING_DEADLINE):
                await self._background.ended(CLAIMING)
                await self._runs.idle.wait()
                await self._writer.idle.wait()
                await reconnecting(self.maintenance.work)
                parameters = {"worker_id": self.worker_id}
                await reconnecting(lambda: self._rest.execute(claiming.REMOVE_WORKER, parameters))
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            logger.warning(
                "worker %s ends without having settled everything (%s); others take over when its lease is over",
                self.settings.name,
                reason(error),
            )
        await self._close()

    async def _close(self) -> None:
        if self._telemetry is not None:
            self._telemetry.forget(self)
        self._registration.expire()
        await self._background.end()
        await self._registration.stop_heartbeat()
        if self._health is not None:
            await self._health.stop()
        await self._disconnect()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._hints.flush()
        self._runs.executor.shutdown()
        task_factory.uninstall(self.loop)
        try:
            await self._exit.aclose()
        finally:
            self._durable.forget_worker(self)
            self._stopped.set()
            logger.info("worker %s has ended", self.settings.name)

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside every run."""
        self._background.start_task(coroutine, name)

    def running_in(self) -> list[str]:
        """The queue of each run in progress. May be asked for by any thread."""
        return self._runs.queue_names()

    def offer(self, hint: Hint) -> bool:
        """Take a hint that comes from this process. False if others have to hear of it, too."""
        return self._news.offer(hint)

    def clock_moved(self, by: timedelta) -> None:
        """Somebody has set the database's clock, as tests do: look at all that may be due by now."""
        self._clock.set(self._clock.now() + by)
        self._runs.clock_moved(by)
        self.maintenance.look_now()
        self._claims.look_everywhere()

    async def answered(self) -> None:
        """Wait for what its maintenance has on its way, which may go by a time that is not the database's any more."""
        await self._rest.answered()

    def _listening(self) -> bool:
        return self._listener is not None and self._listener.working

    def _tend_interval(self) -> float:
        return TEND_INTERVAL_BUSY if self._runs or not self._listening() else TEND_INTERVAL
