"""The worker: claims tasks, runs them, and lives with a database that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import operator
import os
import signal
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import URL, Row
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from . import branches, task_factory
from .channels import Channel
from .clock import LocalClock
from .connections import Database
from .context import TaskContext
from .current import enter
from .database_errors import backoff, is_transient
from .errors import InvalidConfiguration, QueueNotFound
from .health import STUCK_AFTER, HealthServer, VitalSigns
from .hints import Hint, channel_name, sender
from .hooks import around_task
from .ids import new_id
from .journal import EMPTY_JOURNAL, Journal
from .lanes import Lanes
from .leases import Heartbeat, Lease
from .listener import Listener
from .names import validate_name
from .options import WorkerOptions
from .policies import integer, seconds
from .reader import Reader, persistently
from .retention import Retention
from .run import Claimed, Run
from .schedules import fire_due
from .signals import LeaseLost, TaskCancelled
from .statements import checkpoints, claiming, queues, waits
from .sync_context import SyncTaskContext, run_in_thread
from .tender import Tender
from .urls import resolve_url
from .writer import Kind, Write, Writer

if TYPE_CHECKING:
    from .client import Durable

logger = logging.getLogger("durable_sa")

LISTENING_POLL = 5.0
"""Seconds between polls while hints arrive."""
TEND_INTERVAL = 5.0
"""Seconds between looks for maintenance while hints arrive and nothing runs."""
TEND_INTERVAL_BUSY = 1.0
SAMPLE_INTERVAL = 15.0
"""Seconds between counts of what is ready, where there are metrics."""
SAMPLE_SHARE = 50
"""And at least so many times as long as the last count took."""
PIPELINED = 32
"""With so many slots, a claim takes half of them at most: the next is on its way while the code of the last begins."""
CLOSING_DEADLINE = 10.0
"""Seconds that the last writes and the goodbye get at shutdown."""
DOUBT = 60.0
"""Seconds after a claim without a reply in which the server may still commit it."""


_BY_LANE = operator.attrgetter("priority", "available_at", "task_id")


@dataclass(frozen=True, slots=True)
class Settings:
    """A worker's options, checked and complete."""

    queue_names: tuple[str, ...]
    concurrency: int
    batch_size: int | None
    claim_timeout: float
    poll_interval: float
    name: str
    fatal_on_lease_timeout: bool
    shutdown_timeout: float
    listen: bool
    listen_url: URL | None
    health_port: int | None

    @classmethod
    def resolve(cls, options: WorkerOptions, queue_name: str) -> Settings:
        """Check `WorkerOptions`.

        Raises:
            TypeError: for an option there is not.
            InvalidConfiguration, InvalidName: for a value that cannot work.
        """
        if unknown := options.keys() - WorkerOptions.__annotations__.keys():
            raise TypeError(f"a worker got an unexpected keyword argument {min(unknown)!r}")
        names = options.get("queue_names")
        if isinstance(names, str):
            raise InvalidConfiguration("queue_names", "it is one str", f"Write queue_names=[{names!r}].")
        names = [queue_name] if names is None else list(dict.fromkeys(names))
        if not names:
            raise InvalidConfiguration("queue_names", "there is no queue in it")
        batch_size, listen_url = options.get("batch_size"), options.get("listen_url")
        health_port = options.get("health_port")
        return cls(
            tuple(validate_name("queue", name) for name in names),
            integer(options.get("concurrency", 1), "concurrency", minimum=1, maximum=100_000),
            None if batch_size is None else integer(batch_size, "batch_size", minimum=1, maximum=100_000),
            seconds(options.get("claim_timeout", 120.0), "claim_timeout", minimum=1.0),
            seconds(options.get("poll_interval", 0.25), "poll_interval", minimum=0.001),
            validate_name("worker", options.get("worker_id") or f"{socket.gethostname()}:{os.getpid()}"),
            bool(options.get("fatal_on_lease_timeout", False)),
            seconds(options.get("shutdown_timeout", 30.0), "shutdown_timeout"),
            bool(options.get("listen", True)),
            None if listen_url is None else resolve_url(listen_url, "listen_url"),
            None if health_port is None else integer(health_port, "health_port", minimum=0, maximum=65535),
        )


class Worker:
    """A running worker. Made by `Durable.start_worker`; ended by :meth:`shutdown`."""

    def __init__(self, durable: Durable[Any], settings: Settings) -> None:
        self.settings = settings
        self.worker_id = new_id()
        self.max_payload_bytes = durable.max_payload_bytes
        self.telemetry = durable.telemetry
        self.hooks = durable.hooks if self.telemetry is None else durable.hooks.within(self.telemetry.step_hook)
        self.queue_samples: dict[str, tuple[float, float]] = {}
        """How many tasks were ready in each queue when they were last counted, and the age of the oldest."""
        self.executor = ThreadPoolExecutor(max(settings.concurrency, 4), thread_name_prefix="durable-step")
        self._durable = durable
        self.loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self.clock = LocalClock()
        self._lease = Lease(settings.claim_timeout)
        self._lanes = Lanes(settings.queue_names)
        self._runs: dict[tuple[uuid.UUID, int], Run] = {}
        self._offered = 0
        """Tasks that this process has told the worker of since the last claim."""
        self._claimed: list[Claimed] = []
        """Claimed, to be started in the next turn of the event loop."""
        self._ending: set[tuple[uuid.UUID, int]] = set()
        """Runs whose outcome is still to be written."""
        self._doubt_until = 0.0
        self._next_adoption = 0.0
        self._engine_tasks: set[asyncio.Task[Any]] = set()
        self._services: list[asyncio.Task[Any]] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._held_back = False
        self._stopping = asyncio.Event()
        self._hurrying = False
        self._stopped = asyncio.Event()
        self._renewing = False
        self._exit = contextlib.AsyncExitStack()
        self._state: Any = durable.state
        self._next_poll = 0.0
        self._survey_at = 0.0
        self._heartbeat: Heartbeat | None = None
        self._listener: Listener | None = None
        self._health: HealthServer | None = None
        self.health_port: int | None = None
        """Where probes are answered."""
        self._shutdown_task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Worker {self.settings.name} on {', '.join(self.settings.queue_names)}>"

    async def start(self) -> None:
        """Register, and start to claim."""
        database = self._durable.database
        self._database: Database = database
        await self._durable.check_schema()
        known = await database.execute(queues.KNOWN_QUEUES, {"queue_names": list(self.settings.queue_names)})
        for name in self.settings.queue_names:
            if name not in {row.queue_name for row in known}:
                raise QueueNotFound(name)
        self._claims = Channel(database)
        self._writes = Channel(database)
        self._rest = Channel(database)
        self.writer = Writer(self._writes, on_commit=self._committed)
        self.reader = Reader(self._rest)
        self.tender = Tender(
            self._rest,
            self.worker_id,
            self.clock,
            interval=self._tend_interval,
            announce=self._announce,
            check_runs=self._check_runs,
            poll_runs=self._poll_runs,
            fire_schedules=functools.partial(fire_due, self._durable),
            forget=Retention(),
            gave_up=self._gave_up,
        )
        self._hints = sender(database.engine, channel_name(database.schema))
        task_factory.install(self.loop)
        try:
            await self._connect()
            self._state = await self._enter_lifespan()
            if self.settings.health_port is not None:
                self._health = HealthServer(database, self.settings.health_port, self.vital_signs)
                self.health_port = await self._health.start()
            await self._register()
        except BaseException:
            task_factory.uninstall(self.loop)
            if self._health is not None:
                await self._health.stop()
            await self._disconnect()
            await self._exit.aclose()
            raise
        self._turn()
        self._claiming = self._serve(self._claim_loop, "durable:claims", self._claims)
        self._services += [
            self._claiming,
            self._serve(self.writer.run, "durable:writer", self._writes),
            self._serve(self.tender.run, "durable:tender", self._rest),
        ]
        if self.telemetry is not None:
            self.telemetry.watch(self)
            self._services.append(self._serve(self._sample_queues, "durable:samples"))
        if self.settings.listen:
            self._listener = Listener(database, self.settings.listen_url, self._hinted)
            self._services.append(self._serve(self._listener.run, "durable:listener"))

    async def _connect(self) -> None:
        try:
            for channel in (self._claims, self._writes, self._rest):
                await channel.open()
        except PoolTimeout as error:
            raise InvalidConfiguration(
                "bind",
                "its pool does not give a worker the three connections that it keeps",
                "Raise pool_size or max_overflow.",
            ) from error

    async def _disconnect(self) -> None:
        for channel in (self._claims, self._writes, self._rest):
            await channel.close()

    async def _enter_lifespan(self) -> Any:
        lifespan = self._durable.lifespan
        if lifespan is None:
            return self._durable.state
        if isinstance(lifespan, contextlib.AbstractAsyncContextManager):
            return await self._exit.enter_async_context(cast("contextlib.AbstractAsyncContextManager[Any]", lifespan))
        takes_client = bool(inspect.signature(lifespan).parameters)
        return await self._exit.enter_async_context(lifespan(self._durable) if takes_client else lifespan())

    async def _register(self) -> None:
        sent_at = time.monotonic()
        parameters = {
            "worker_id": self.worker_id,
            "name": self.settings.name,
            "queue_names": list(self.settings.queue_names),
            "claim_timeout": self.settings.claim_timeout,
        }
        rows = await self._rest.execute(claiming.REGISTER_WORKER, parameters)
        self.clock.set(rows[0].now)
        self._lease.renewed(sent_at)
        self._lease.turned_at = time.monotonic()
        self.tender.worker_id = self.worker_id
        self._heartbeat = Heartbeat(
            self._database,
            self.worker_id,
            self._lease,
            fatal=self.settings.fatal_on_lease_timeout,
            on_lost=self.lease_lost,
        )
        self._heartbeat.start()

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

    def hurry(self) -> None:
        """Give runs back at once, instead of waiting for `shutdown_timeout`."""
        self._stopping.set()
        self._wake.set()
        self._hurrying = True
        for run in list(self._runs.values()):
            run.release()

    async def _shut_down(self) -> None:
        self._stopping.set()
        self._wake.set()
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                # A claim may be on its way, and what it brings is run, too.
                await asyncio.wait([self._claiming])
                await self._idle.wait()
        except TimeoutError:
            self.hurry()
        try:
            async with asyncio.timeout(CLOSING_DEADLINE):
                await asyncio.wait([self._claiming])
                await self._idle.wait()
                await self.writer.idle.wait()
                await self.tender.work()
                await self._rest.execute(claiming.REMOVE_WORKER, {"worker_id": self.worker_id})
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            logger.warning(
                "worker %s ends without having settled everything (%s); others take over when its lease is over",
                self.settings.name,
                type(error).__name__,
            )
        await self._close()

    async def _close(self) -> None:
        self._turn_timer.cancel()
        if self.telemetry is not None:
            self.telemetry.forget(self)
        self._lease.valid_until = 0.0
        for service in [*self._services, *self._engine_tasks]:
            service.cancel()
        if self._services or self._engine_tasks:
            await asyncio.wait([*self._services, *self._engine_tasks], timeout=5.0)
        if self._heartbeat is not None:
            await self._heartbeat.stop()
        if self._health is not None:
            await self._health.stop()
        await self._disconnect()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._hints.flush()
        self.executor.shutdown(wait=False, cancel_futures=True)
        task_factory.uninstall(self.loop)
        try:
            await self._exit.aclose()
        finally:
            self._durable.forget_worker(self)
            self._stopped.set()

    def _serve(
        self, run: Callable[[], Coroutine[Any, Any, None]], name: str, channel: Channel | None = None
    ) -> asyncio.Task[None]:
        """Start a part of the worker. If it is cancelled, by whomever, its connection is closed."""

        async def serve() -> None:
            try:
                await run()
            finally:
                if channel is not None:
                    await channel.close()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.critical("%s has ended", name, exc_info=error)

        task = self._start_task(serve(), name)
        task.add_done_callback(ended)
        return task

    def _start_task(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        with branches.detached():
            return self.loop.create_task(coroutine, name=name)

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside every run."""
        task = self._start_task(coroutine, name)
        self._engine_tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._engine_tasks.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None and not isinstance(error, LeaseLost):
                logger.error("%s failed", name, exc_info=error)

        task.add_done_callback(ended)

    @property
    def leased(self) -> bool:
        """Whether the worker's lease still holds by the local clock."""
        return self._lease.valid

    def vital_signs(self) -> VitalSigns:
        """How the worker is. May be asked by any thread."""
        return VitalSigns(
            time.monotonic() - self._lease.turned_at,
            min(STUCK_AFTER, self.settings.claim_timeout),
            self._lease.age,
            self._stopping.is_set(),
        )

    def _turn(self) -> None:
        """Show the heartbeat that the event loop turns, and see whether the lease still holds."""
        self._lease.turned_at = time.monotonic()
        if not self._lease.valid and not self._renewing:
            self.lease_lost()
        interval = min(1.0, self.settings.claim_timeout / 8)
        if self._lease.valid:
            interval = min(interval, self._lease.valid_until - time.monotonic())
        self._turn_timer = self.loop.call_later(interval, self._turn)

    def lease_lost(self) -> None:
        """Others may have taken over: give up all runs, and come back as a new worker."""
        if self._renewing or self._stopped.is_set():
            return
        self._renewing = True
        # Another one, as a heartbeat that is still on its way may be committed and would bring the old one to life.
        self._lease = Lease(self.settings.claim_timeout)
        logger.warning("worker %s has lost its lease: giving up %d runs", self.settings.name, len(self._runs))
        self._claimed.clear()
        for run in list(self._runs.values()):
            run.take_away(LeaseLost())
        self.writer.abandon()
        self.start_task(self._come_back(), "durable:come-back")

    async def _come_back(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.stop()
        failures = 0
        while not self._stopping.is_set():
            try:
                self.worker_id = new_id()
                await self._register()
                break
            except Exception as error:
                if not is_transient(error):
                    logger.exception("registering the worker anew failed; trying on")
                await self._pause(backoff(failures))
                failures += 1
        self.writer.resume()
        self._renewing = False
        self._lanes.search_soon()
        self._wake.set()

    @property
    def _free(self) -> int:
        """How many tasks may be claimed now."""
        free = self.settings.concurrency - len(self._runs) - len(self._claimed)
        # Results that wait to be written hold no slot, but there must be an end to them.
        self._held_back = self.writer.backlog > 2 * self.settings.concurrency + 100
        if self._held_back:
            return 0
        return min(free, self.settings.batch_size or free)

    @property
    def _poll_interval(self) -> float:
        if self._listener is not None and self._listener.working:
            return LISTENING_POLL
        return self.settings.poll_interval

    def _tend_interval(self) -> float:
        if self._runs or not (self._listener is not None and self._listener.working):
            return TEND_INTERVAL_BUSY
        return TEND_INTERVAL

    async def _claim_loop(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                if self._free <= 0 or not self._lease.valid:
                    await self._wait(1.0)
                    continue
                self._wake.clear()
                if self._in_doubt and time.monotonic() >= self._next_adoption:
                    await self._adopt()
                wanted = self._free
                if self.settings.concurrency >= PIPELINED:
                    wanted = min(wanted, self.settings.concurrency // 2)
                claimed = await self._claim(wanted)
                failures = 0
                if claimed >= wanted or self._wake.is_set():
                    continue
                due = self._poll_interval
                if self._lanes.next_due is not None:
                    due = min(due, max(0.001, self._lanes.next_due - time.monotonic()))
                await self._wait(due)
            except Exception as error:
                if not is_transient(error):
                    logger.exception("claiming failed")
                elif failures == 3:
                    logger.warning("claiming fails (%s); trying on", type(error).__name__)
                self._doubt()
                await self._pause(backoff(failures))
                failures += 1

    async def _pause(self, seconds: float) -> None:
        """Wait before trying again, or until the worker is to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _wait(self, most: float) -> None:
        try:
            async with asyncio.timeout(most):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _claim(self, wanted: int) -> int:
        now = time.monotonic()
        search = self._lanes.search_due
        if search or self._lanes.due:
            survey = await self._claims.execute(claiming.SURVEY_LANES, {"queue_names": list(self.settings.queue_names)})
            self._lanes.surveyed(survey)
            if not survey:
                # There is not a task that has not ended.
                self._lanes.searched(time.monotonic() - now)
                return 0
        worker_id = self.worker_id
        offered = self._offered
        rows = await self._claims.execute(
            claiming.CLAIM,
            {
                "worker_id": worker_id,
                "wanted": wanted,
                "task_names": list(self._durable.tasks),
                **self._lanes.parameters(search=search),
            },
        )
        self._offered -= offered
        if rows:
            self.clock.set(rows[0].now)
        if search:
            self._lanes.searched(time.monotonic() - now)
        runs = [Claimed._make(row) for row in rows]
        if self.telemetry is not None:
            self.telemetry.claimed(self.settings.queue_names, runs, time.monotonic() - now)
        runs.sort(key=_BY_LANE)
        self._lanes.claimed(runs, search=search, full=len(rows) >= wanted)
        if worker_id != self.worker_id or not self._lease.valid:
            # The lease ended while the claim was on its way: those that take over find these runs, too.
            self._doubt()
            return 0
        for run in runs:
            if run.cancel_at is not None:
                self.tender.look_within((run.cancel_at - run.now).total_seconds() + 0.005)
        if runs:
            # In the next turn, so that the next claim may be on its way while they start.
            self._claimed.extend(runs)
            self._idle.clear()
            self.loop.call_soon(self._start_claimed)
        return len(rows)

    @property
    def _in_doubt(self) -> bool:
        return time.monotonic() < self._doubt_until

    def _doubt(self) -> None:
        """A claim may have been committed, or may still be, without our having heard of it."""
        self._doubt_until = time.monotonic() + DOUBT
        self._next_adoption = 0.0

    async def _adopt(self) -> None:
        """Start runs that are this worker's although the reply to their claim was lost: nobody else ever would."""
        held = [*self._runs, *self._ending, *((item.task_id, item.fence) for item in self._claimed)]
        self._next_adoption = time.monotonic() + 1.0
        worker_id = self.worker_id
        rows = await self._claims.execute(
            claiming.UNHEARD_CLAIMS,
            {
                "worker_id": worker_id,
                "queue_names": list(self.settings.queue_names),
                "task_ids": [task_id for task_id, _ in held],
                "fences": [fence for _, fence in held],
            },
        )
        if worker_id == self.worker_id and self._lease.valid:
            self._start_runs([Claimed._make(row) for row in rows])

    def _start_claimed(self) -> None:
        claimed, self._claimed = self._claimed, []
        try:
            self._start_runs(claimed)
        except Exception:
            logger.exception("starting runs failed")
            self._doubt()

    def _start_runs(self, claimed: list[Claimed]) -> None:
        resumed: list[Claimed] = []
        for item in claimed:
            if item.fresh:
                self._start_run(item, EMPTY_JOURNAL)
            else:
                resumed.append(item)
                self._reserve(item)
        if resumed:
            self.start_task(self._start_resumed(resumed), "durable:resume")
        if self._hurrying:
            self.hurry()

    def _reserve(self, item: Claimed) -> None:
        """Count a run that is still being loaded."""
        self._runs[item.task_id, item.fence] = Run(item, self._durable.tasks[item.task_name], self, EMPTY_JOURNAL)
        self._idle.clear()

    async def _start_resumed(self, claimed: list[Claimed]) -> None:
        """Load what was recorded, with waits that have come to their end meanwhile, and start."""
        task_ids = [item.task_id for item in claimed]
        try:
            await persistently(lambda: self._rest.execute(waits.RESOLVE, {"task_ids": sorted(task_ids)}))
            # Waits first: one that somebody resolves in between is then found twice, instead of not at all.
            waiting = await persistently(lambda: self._rest.execute(checkpoints.LOAD_WAITS, {"task_ids": task_ids}))
            recorded = await persistently(
                lambda: self._rest.execute(checkpoints.LOAD_CHECKPOINTS, {"task_ids": task_ids})
            )
            wakers: Sequence[Row[Any]] = ()
            if self.telemetry is not None:
                wakers = await persistently(lambda: self._rest.execute(waits.WAKERS, {"task_ids": task_ids}))
        except Exception as error:  # noqa: BLE001 - one of them may be at fault
            if len(claimed) > 1:
                for item in claimed:
                    self.start_task(self._start_resumed([item]), "durable:resume")
            elif (run := self._runs.get((claimed[0].task_id, claimed[0].fence))) is not None:
                run.refuse(error)
            return
        rows: dict[uuid.UUID, list[Row[Any]]] = {task_id: [] for task_id in task_ids}
        for row in recorded:
            rows[row.task_id].append(row)
        open_waits: dict[uuid.UUID, list[tuple[uuid.UUID, Any]]] = {task_id: [] for task_id in task_ids}
        for row in waiting:
            open_waits[row.task_id].append((row.key, row.due_at))
        links = {row.task_id: row.carriers for row in wakers}
        for item in claimed:
            reserved = self._runs.get((item.task_id, item.fence))
            if reserved is None or reserved.signal is not None or reserved.over:
                continue
            self._start_run(item, Journal(rows[item.task_id], open_waits[item.task_id]), links.get(item.task_id))

    def _start_run(self, item: Claimed, journal: Journal, wakers: str | None = None) -> None:
        task = self._durable.tasks[item.task_name]
        run = Run(item, task, self, journal, wakers)
        self._runs[item.task_id, item.fence] = run
        self._idle.clear()
        context: TaskContext[Any] = TaskContext(run, self._durable, self._state)
        try:
            arguments = (task.decode_params(item.params),) if task.takes_params else ()
        except Exception as error:  # noqa: BLE001 - what a row holds must not stop the rows beside it
            run.refuse(error)
            return
        inner = self._context.copy()
        if task.is_async:
            inner.run(enter, context)
            body = functools.partial(task.function, context, *arguments)
        else:
            sync_context: SyncTaskContext[Any] = SyncTaskContext(context)
            inner.run(enter, sync_context)
            body = functools.partial(run_in_thread, sync_context, task.function, arguments)
        hooks = self.hooks.around_task
        start = functools.partial(around_task, hooks, context, body) if hooks else body
        task_factory.ensure(self.loop)
        run.start(start() if self.telemetry is None else self.telemetry.execute(run, start), inner)

    def _forget(self, key: tuple[uuid.UUID, int]) -> None:
        self._runs.pop(key, None)
        if not self._runs and not self._claimed:
            self._idle.set()
        self._wake.set()

    def run_ended(self, run: Run) -> None:
        """User code of the run has come to its end: its slot is free."""
        self._ending.add(run.key)
        self._forget(run.key)

    def outcome_stored(self, run: Run, outcome: str, error: BaseException | None) -> None:
        """What became of the run is committed."""
        claimed = run.claimed
        self._ending.discard(run.key)
        if outcome in ("failed", "retried") and error is not None:
            what = "failed" if outcome == "failed" else f"failed in attempt {claimed.attempt}"
            logger.info(
                "task %s (%s) %s: %s",
                claimed.task_id,
                claimed.task_name,
                what,
                type(error).__name__,
                extra=claimed.log_fields,
            )
        elif outcome == "lost":
            logger.info("task %s (%s) is no longer ours", claimed.task_id, claimed.task_name, extra=claimed.log_fields)
        if self.telemetry is not None:
            self.telemetry.ended(claimed.queue_name, claimed.task_name, outcome)
        if outcome in ("completed", "failed", "lost"):
            self._durable.task_changed(claimed.task_id)

    def _gave_up(self, rows: Sequence[Row[Any]]) -> None:
        """Tasks have failed because too many workers were lost with them."""
        if self.telemetry is not None:
            for row in rows:
                self.telemetry.ended(row.queue_name, row.task_name, "failed")

    def running_in(self) -> list[str]:
        """The queue of each run in progress. May be asked for by any thread."""
        return [run.claimed.queue_name for run in list(self._runs.values())]

    async def _sample_queues(self) -> None:
        """Count what is ready, now and then, for the gauges."""
        while True:
            began = time.monotonic()
            try:
                parameters = {"queue_names": list(self.settings.queue_names)}
                rows = await self._rest.execute(queues.QUEUE_STATISTICS, parameters)
                self.queue_samples = {row.queue_name: (row.ready, row.oldest_ready_seconds or 0.0) for row in rows}
            except Exception as error:
                if not is_transient(error):
                    logger.exception("counting the queues failed")
            await asyncio.sleep(max(SAMPLE_INTERVAL, SAMPLE_SHARE * (time.monotonic() - began)))

    def _committed(self, kind: Kind, writes: list[Write], rows: Sequence[Row[Any]]) -> None:
        """Follow up on what the writer has just committed."""
        if self._held_back:
            self._wake.set()
        if kind is Kind.COMPLETION:
            ended = [row.task_id for row in rows if row.parent_task_id is not None]
            if ended:
                self.tender.ended(ended)
        elif kind is Kind.FAILURE:
            given_up = [row for row in rows if row.state == "failed"]
            if given_up:
                self.tender.ended(
                    (row.task_id for row in given_up if row.parent_task_id is not None),
                    cascade=(row.task_id for row in given_up),
                )
            self._announce(Hint().add_rows(row for row in rows if row.state != "failed"))
        elif kind is Kind.SUSPENSION:
            waiting = {write.task_id for write in writes if any(wait.kind != "sleep" for wait in write.waits)}
            if waiting:
                self.tender.resolve(row.task_id for row in rows if row.task_id in waiting)
            self._announce(Hint().add_rows(rows))
        elif kind is Kind.EVENT:
            self.tender.deliver()
        elif kind in (Kind.CHILD, Kind.RELEASE):
            self._announce(Hint().add_rows(rows))

    def _announce(self, hint: Hint) -> None:
        """Tell this worker, and the others if it cannot take all of it at once."""
        if hint and not self.offer(hint):
            self._hints.send(hint)

    def offer(self, hint: Hint) -> bool:
        """Take a hint that comes from this process. False if others have to hear of it, too."""
        self._take_hint(hint)
        self._offered += hint.tasks
        return (
            not hint.taken
            and not self._stopping.is_set()
            and self._lease.valid
            and all(queue_name in self.settings.queue_names for queue_name, _ in hint.lanes)
            and self._free >= self._offered
            and self._free * 2 > self.settings.concurrency
        )

    def _take_hint(self, hint: Hint) -> None:
        if self._lanes.lower(hint, self.clock.now()) or hint.lanes:
            self._wake.set()
        if hint.events:
            self.tender.deliver()
        if hint.taken:
            self.tender.check()
        if hint.limits:
            self.tender.look_within(0.0)

    def _hinted(self, payload: str) -> None:
        """A hint arrived."""
        hint = Hint.decode(payload)
        if hint is None:
            self._lanes.search_soon()
            self.tender.look_within(0.0)
            self._wake.set()
        else:
            self._take_hint(hint)

    async def _check_runs(self) -> None:
        held = list(self._runs.items())
        if not held:
            return
        rows = await self._rest.execute(
            claiming.RUNS_GONE,
            {"task_ids": [key[0] for key, _ in held], "fences": [key[1] for key, _ in held]},
        )
        states = {row.task_id: row.state for row in rows}
        for (task_id, _), run in held:
            if task_id in states and not run.over:
                cancelled = states[task_id] in ("cancelled", None)
                run.take_away(TaskCancelled() if cancelled else LeaseLost())

    def _poll_runs(self) -> None:
        for run in list(self._runs.values()):
            run.poll_soon()

    def clock_moved(self, by: timedelta) -> None:
        """Somebody has set the database's clock, as tests do: look at all that may be due by now."""
        self.clock.set(self.clock.now() + by)
        for run in list(self._runs.values()):
            run.clock_moved(by.total_seconds())
        self.tender.hurry()
        self._lanes.search_soon()
        self._wake.set()


@contextlib.asynccontextmanager
async def signals_handled(worker: Worker) -> AsyncGenerator[None]:
    """Shut the worker down on SIGTERM or SIGINT; a second one gives runs back at once."""
    loop = asyncio.get_running_loop()
    received = 0

    def stop() -> None:
        nonlocal received
        received += 1
        if received == 1:
            worker.start_task(worker.shutdown(), "durable:signal")
        else:
            worker.hurry()

    def from_thread(_: int, __: object) -> None:
        loop.call_soon_threadsafe(stop)

    restore: list[Callable[[], object]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop)
            restore.append(functools.partial(loop.remove_signal_handler, number))
        except (NotImplementedError, RuntimeError, ValueError):
            previous = signal.signal(number, from_thread)
            restore.append(functools.partial(signal.signal, number, previous))
    try:
        yield
    finally:
        for undo in restore:
            undo()
