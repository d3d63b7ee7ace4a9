"""The registration of a worker in the database: its id and its lease. After a lost lease it registers anew."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database.connections import Database
from ..database_errors import Outage, RetryPauses, is_read_only, reason
from ..ids import new_id
from ..statements import claiming
from .background import BackgroundTasks
from .health import STUCK_AFTER, VitalSigns
from .leases import TAKEN_OVER, Heartbeat, Lease, end_process
from .settings import Settings

logger = logging.getLogger("durable_sa")


class Registration:
    """Holds a lease for a worker, for as long as the database and the event loop let it.

    It calls `on_lost` when other workers may have taken over the runs of this one, and `on_returned` when it has
    registered anew after that, or has given up because the worker is being shut down. The thread of the heartbeat
    executes `watch` as well.
    """

    def __init__(
        self,
        database: Database,
        connection: DedicatedConnection,
        settings: Settings,
        clock: LocalClock,
        background: BackgroundTasks,
        *,
        stopping: asyncio.Event,
        stopped: asyncio.Event,
        on_lost: Callable[[], None],
        on_returned: Callable[[], None],
        watch: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.worker_id = new_id()
        """The worker's id in the database, another one after each lost lease."""
        self.lease = Lease(settings.claim_timeout)
        self.outage = Outage()
        """The failures of the database that the loops of the worker have logged."""
        self._database = database
        self._connection = connection
        self._settings = settings
        self._clock = clock
        self._background = background
        self._stopping = stopping
        self._stopped = stopped
        self._on_lost = on_lost
        self._on_returned = on_returned
        self._watch = watch
        self._registering = False
        self._beating = False
        self._heartbeat: Heartbeat | None = None
        self._loop = asyncio.get_running_loop()
        self._turn_timer: asyncio.TimerHandle | None = None

    @property
    def active(self) -> bool:
        """True while the worker takes tasks: its lease holds and it is not being shut down."""
        return self.lease.valid and not self._stopping.is_set()

    async def start(self) -> None:
        """Get the first lease; if the database is read-only, in the background, once it takes writes."""
        try:
            await self.register()
        except SQLAlchemyError as error:
            if not is_read_only(error):
                raise
            self._registering = True
            self._background.start_task(self._register_anew(), "durable:register-anew")

    async def register(self) -> None:
        """Get a lease, and start the heartbeat that renews it."""
        sent_at = time.monotonic()
        parameters = {
            "worker_id": self.worker_id,
            "name": self._settings.name,
            "queue_names": list(self._settings.queue_names),
            "claim_timeout": self._settings.claim_timeout,
        }
        rows = await self._connection.execute(claiming.REGISTER_WORKER, parameters)
        self._clock.set(rows[0].now)
        self.lease.renewed(sent_at)
        self.lease.turned_at = time.monotonic()
        self._heartbeat = Heartbeat(
            self._database,
            self.worker_id,
            self.lease,
            fatal=self._settings.fatal_on_lease_timeout,
            on_lost=self.lose,
            outage=self.outage,
            watch=self._watch,
        )
        self._heartbeat.start()

    def turn(self) -> None:
        """Show the heartbeat that the event loop turns, check the lease, and schedule the next turn."""
        self.lease.turned_at = time.monotonic()
        if not self.lease.valid and not self._registering:
            self.lose()
        elif self.lease.heartbeat_overdue and not self._registering and not self._beating:
            self._beating = True
            self._background.start_task(self._beat(), "durable:beat")
        interval = min(1.0, self._settings.claim_timeout / 8)
        if self.lease.valid:
            interval = min(interval, self.lease.valid_until - time.monotonic())
        self._turn_timer = self._loop.call_later(interval, self.turn)

    async def _beat(self) -> None:
        """Send a heartbeat in place of the thread that is late: this connection is open, and the event loop turns."""
        lease, sent_at = self.lease, time.monotonic()
        try:
            rows = await self._connection.execute(claiming.HEARTBEAT, {"beating_id": self.worker_id})
        except Exception as error:  # noqa: BLE001 - a driver may raise errors of any class
            logger.debug("heartbeat of the event loop failed (%s)", reason(error))
        else:
            if rows:
                lease.renewed(sent_at)
            elif lease is self.lease:
                self.lose()
        finally:
            self._beating = False

    def lose(self) -> None:
        """Register anew, because other workers may have taken over the runs of this one."""
        if self._registering or self._stopped.is_set():
            return
        self._registering = True
        # The lease is a new object, because a heartbeat in flight may be committed and would extend the old one.
        self.lease = Lease(self._settings.claim_timeout)
        self._on_lost()
        self._background.start_task(self._register_anew(), "durable:register-anew")

    async def _register_anew(self) -> None:
        await self.stop_heartbeat()
        retry = RetryPauses("registration of the worker", self._stopping, self.outage)
        former_id, waiting = self.worker_id, False
        while not self._stopping.is_set():
            try:
                registered_before = self._heartbeat is not None
                if (
                    registered_before
                    and self._settings.fatal_on_lease_timeout
                    and await self._was_taken_over(former_id)
                ):
                    end_process(TAKEN_OVER)
                self.worker_id = new_id()
                await self.register()
                retry.reset()
                if waiting:
                    logger.info("worker %s goes on: the database takes writes", self._settings.name)
                break
            except Exception as error:  # noqa: BLE001 - the retry logs it
                read_only = is_read_only(error)
                if read_only and not waiting:
                    waiting = True
                    logger.warning("worker %s waits: the database is read-only", self._settings.name)
                await retry.pause(error, logged=read_only)
        self._registering = False
        self._on_returned()

    def left_running(self) -> None:
        """End the process, if the worker is set to: code of a lost run ignores its cancellation."""
        if self._settings.fatal_on_lease_timeout:
            end_process("code of a run that this worker has lost does not end")

    async def _was_taken_over(self, worker_id: uuid.UUID) -> bool:
        """Return whether other workers have declared this one lost: its own clock may have been earlier."""
        return not await self._connection.execute(claiming.LEASE_STATUS, {"beating_id": worker_id})

    def vital_signs(self) -> VitalSigns:
        """Return the state of the worker. Safe to call from any thread."""
        lease = self.lease
        return VitalSigns(
            time.monotonic() - lease.turned_at,
            min(STUCK_AFTER, self._settings.claim_timeout),
            lease.age,
            self._stopping.is_set(),
        )

    def expire(self) -> None:
        """End the lease on this side, at the end of the worker."""
        if self._turn_timer is not None:
            self._turn_timer.cancel()
        self.lease.valid_until = 0.0

    async def stop_heartbeat(self) -> None:
        """Stop the heartbeat, and wait up to 5 seconds for its end."""
        if self._heartbeat is not None:
            await self._heartbeat.stop()
