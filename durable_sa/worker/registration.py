"""A worker as the database knows it: its id and its lease; when that is lost, it comes back under another id."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database.connections import Database
from ..database_errors import (
    backoff,
    is_read_only,
    is_transient,
    reason,
    without_values,
)
from ..ids import new_id
from ..statements import claiming
from .background import BackgroundTasks
from .health import STUCK_AFTER, VitalSigns
from .leases import (
    TAKEN_OVER,
    Heartbeat,
    Lease,
    end_process,
)
from .settings import Settings

logger = logging.getLogger("durable_sa")


class Registration:
    """Holds a lease for a worker, for as long as the database and the event loop let it.

    `registered` is told each new id, `lost` when others may have taken over, and `returned` when that has been
    followed by another registration, or by the worker's end.
    """

    def __init__(
        self,
        database: Database,
        channel: DedicatedConnection,
        settings: Settings,
        clock: LocalClock,
        services: BackgroundTasks,
        *,
        stopping: asyncio.Event,
        stopped: asyncio.Event,
        registered: Callable[[uuid.UUID], None],
        lost: Callable[[], None],
        returned: Callable[[], None],
    ) -> None:
        self.worker_id = new_id()
        self.lease = Lease(settings.claim_timeout)
        self._database = database
        self._channel = channel
        self._settings = settings
        self._clock = clock
        self._background = services
        self._stopping = stopping
        self._stopped = stopped
        self._registered = registered
        self._lost = lost
        self._returned = returned
        self._renewing = False
        self._beating = False
        self._heartbeat: Heartbeat | None = None
        self._loop = asyncio.get_running_loop()
        self._turn_timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Get the first lease; where the database is read-only, go on and get it once that takes writes."""
        try:
            await self.register()
        except SQLAlchemyError as error:
            if not is_read_only(error):
                raise
            self._renewing = True
            self._background.start_task(self._come_back(), "durable:come-back")

    async def register(self) -> None:
        """Get a lease, and start to renew it."""
        sent_at = time.monotonic()
        parameters = {
            "worker_id": self.worker_id,
            "name": self._settings.name,
            "queue_names": list(self._settings.queue_names),
            "claim_timeout": self._settings.claim_timeout,
        }
        rows = await self._channel.execute(claiming.REGISTER_WORKER, parameters)
        self._clock.set(rows[0].now)
        self.lease.renewed(sent_at)
        self.lease.turned_at = time.monotonic()
        self._registered(self.worker_id)
        self._heartbeat = Heartbeat(
            self._database,
            self.worker_id,
            self.lease,
            fatal=self._settings.fatal_on_lease_timeout,
            on_lost=self.lose,
        )
        self._heartbeat.start()

    def turn(self) -> None:
        """Show the heartbeat that the event loop turns, and see whether the lease still holds; again and again."""
        self.lease.turned_at = time.monotonic()
        if not self.lease.valid and not self._renewing:
            self.lose()
        elif self.lease.late and not self._renewing and not self._beating:
            self._beating = True
            self._background.start_task(self._beat(), "durable:beat")
        interval = min(1.0, self._settings.claim_timeout / 8)
        if self.lease.valid:
            interval = min(interval, self.lease.valid_until - time.monotonic())
        self._turn_timer = self._loop.call_later(interval, self.turn)

    async def _beat(self) -> None:
        """Send a heartbeat beside the thread that should have: this connection is there, and the event loop turns."""
        lease, sent_at = self.lease, time.monotonic()
        try:
            rows = await self._channel.execute(claiming.HEARTBEAT, {"beating_id": self.worker_id})
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            logger.debug("a heartbeat beside the others failed: %s", reason(error))
        else:
            if rows:
                lease.renewed(sent_at)
            elif lease is self.lease:
                self.lose()
        finally:
            self._beating = False

    def lose(self) -> None:
        """Others may have taken over: come back as a new worker."""
        if self._renewing or self._stopped.is_set():
            return
        self._renewing = True
        # Another one, as a heartbeat that is still on its way may be committed and would bring the old one to life.
        self.lease = Lease(self._settings.claim_timeout)
        self._lost()
        self._background.start_task(self._come_back(), "durable:come-back")

    async def _come_back(self) -> None:
        await self.stop_heartbeat()
        failures, former_id, waiting = 0, self.worker_id, False
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
                if waiting:
                    logger.info("worker %s goes on: the database takes writes", self._settings.name)
                break
            except Exception as error:
                if is_read_only(error) and not waiting:
                    waiting = True
                    logger.warning("worker %s waits: the database is read-only", self._settings.name)
                elif not is_transient(error):
                    logger.error("registering the worker anew failed; trying on", exc_info=without_values(error))
                elif failures == 3:
                    logger.warning("registering the worker anew fails (%s); trying on", reason(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff(failures)):
                        await self._stopping.wait()
                failures += 1
        self._renewing = False
        self._returned()

    def left_running(self) -> None:
        """Code of a run that others may have taken over does not end."""
        if self._settings.fatal_on_lease_timeout:
            end_process("code of a run that this worker has lost does not end")

    async def _was_taken_over(self, worker_id: uuid.UUID) -> bool:
        """Whether others have found the worker silent; it may have noticed that first, by its own clock."""
        return not await self._channel.execute(claiming.LEASE_STATUS, {"beating_id": worker_id})

    def vital_signs(self) -> VitalSigns:
        """How the worker is. May be asked by any thread."""
        lease = self.lease
        return VitalSigns(
            time.monotonic() - lease.turned_at,
            min(STUCK_AFTER, self._settings.claim_timeout),
            lease.age,
            self._stopping.is_set(),
        )

    def expire(self) -> None:
        """The worker ends: it has no lease any more."""
        if self._turn_timer is not None:
            self._turn_timer.cancel()
        self.lease.valid_until = 0.0

    async def stop_heartbeat(self) -> None:
        """Stop the heartbeat, and wait a moment for it."""
        if self._heartbeat is not None:
            await self._heartbeat.stop()
