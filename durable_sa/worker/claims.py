"""The claims of a worker: when it asks for tasks, for how many, and how a claim whose reply was lost is made good."""

from __future__ import annotations

import asyncio
import logging
import operator
import time
import uuid
from collections.abc import Callable

from ..app import App
from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database_errors import Retry
from ..execution.writer import Writer
from ..statements import claiming
from ..statements.claiming import ClaimedRun
from .agenda import FULL_SCAN_DELAY, Agenda
from .executor import Executor
from .limited import LimitedClaims
from .registration import Registration
from .settings import Settings
from .slots import Slots

logger = logging.getLogger("durable_sa")

LISTENING_POLL_INTERVAL = 5.0
"""Seconds between polls while hints arrive."""
HALF_CLAIMS_CONCURRENCY = 32
"""With so many slots, a claim takes half of them at most: the next is in flight while the code of the last begins."""
UNKNOWN_COMMIT_TIMEOUT = 60.0
"""Seconds after a claim without a reply in which the server may still commit it."""
UNKNOWN_COMMIT_INTERVAL = 1.0
"""Seconds between looks for such a claim."""

_LANE_ORDER = operator.attrgetter("priority", "available_at", "task_id")


class Claimer:
    """Claims tasks for free slots: when the agenda says so, when a known task is due, and every poll interval."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        connection: DedicatedConnection,
        registration: Registration,
        clock: LocalClock,
        agenda: Agenda,
        slots: Slots,
        writer: Writer,
        executor: Executor,
        *,
        stopping: asyncio.Event,
        listening: Callable[[], bool],
        on_more: Callable[[str], None],
        enable_limits: Callable[[str], None],
    ) -> None:
        self._app = app
        self._telemetry = app.telemetry
        self._settings = settings
        self._connection = connection
        self._registration = registration
        self._clock = clock
        self._agenda = agenda
        self._cursors = agenda.cursors
        self._limited = agenda.limited
        self._limited_claims = LimitedClaims(connection, agenda.limited, on_preparing=enable_limits)
        self._on_more = on_more
        self._enable_limits = enable_limits
        self._slots = slots
        self._writer = writer
        self._executor = executor
        self._stopping = stopping
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._capped = False
        """The last claim was bounded by `queue_concurrency`, so more tasks may be ready."""
        self._commit_unknown_until = 0.0
        self._next_adoption = 0.0

    @property
    def _wanted(self) -> int:
        """How many tasks the next claim asks for."""
        # Results that wait to be written hold no slot, so claims wait for them once there are too many.
        self._agenda.claim_when_written = self._writer.backlog > 2 * self._settings.concurrency + 100
        if self._agenda.claim_when_written:
            return 0
        wanted = self._slots.free
        if self._settings.concurrency >= HALF_CLAIMS_CONCURRENCY:
            wanted = min(wanted, self._settings.concurrency // 2)
        return wanted

    async def run(self) -> None:
        """Claim until the worker is being shut down."""
        agenda = self._agenda
        retry = Retry("claim", self._stopping, self._registration.outage)
        while not self._stopping.is_set():
            try:
                if self._wanted <= 0 or not self._registration.lease.valid:
                    agenda.claim_when_freed = True
                    await self._wait(1.0)
                    continue
                agenda.claim.clear()
                if self._commit_unknown and time.monotonic() >= self._next_adoption:
                    await self._adopt()
                if (wanted := self._wanted) <= 0:
                    continue
                more = await self._claim(wanted) >= wanted
                retry.reset()
                agenda.claim_when_freed = more or self._capped or not self._listening()
                if not more and not agenda.claim.is_set():
                    await self._wait(self._pause)
            except Exception as error:  # noqa: BLE001 - the retry logs it
                self.suspect_unknown_commit()
                await retry.pause(error)

    @property
    def _pause(self) -> float:
        """Seconds until the next claim, if the agenda does not ask for it earlier."""
        if self._cursors.full_scan_due:
            return FULL_SCAN_DELAY
        pause = LISTENING_POLL_INTERVAL if self._listening() else self._settings.poll_interval
        for moment in (self._cursors.next_due, self._limited.next_at):
            if moment is not None:
                pause = min(pause, max(0.001, moment - time.monotonic()))
        return pause

    async def _wait(self, most: float) -> None:
        claim = self._agenda.claim
        timer = self._loop.call_later(most, claim.set)
        try:
            await claim.wait()
        finally:
            timer.cancel()
        claim.clear()

    async def _claim(self, wanted: int) -> int:
        """Claim up to so many tasks, and return how many there were."""
        now = time.monotonic()
        self._capped = False
        hinted, self._agenda.hinted = self._agenda.hinted, False
        full_scan = self._cursors.full_scan_overdue if hinted else self._cursors.full_scan_due
        if full_scan or self._cursors.due:
            queue_names = list(self._settings.queue_names)
            lanes = await self._connection.execute(claiming.SURVEY_LANES, {"queue_names": queue_names})
            self._cursors.surveyed(lanes)
            self._limited.add(lane.queue_name for lane in lanes if lane.limited)
            if not lanes:
                # Every task of these queues has ended.
                self._cursors.full_scan_made(time.monotonic() - now)
                return 0
        if not self._limited.queues and not self._settings.queue_concurrency:
            claimed = await self._claim_lanes(wanted, None, full_scan=full_scan)
        else:
            if self._limited.queues and self._limited.idle and (full_scan or not self._listening()):
                await self._limited_claims.look()
            claimed = 0
            for queue_names in self._portions():
                claimed += await self._claim_portion(queue_names, wanted - claimed, full_scan=full_scan)
                if claimed >= wanted:
                    break
        if full_scan:
            self._cursors.full_scan_made(time.monotonic() - now)
        return claimed

    def _portions(self) -> list[list[str]]:
        """Divide the queues, in order, by the claims that they take: those without limits of any kind share one."""
        portions: list[list[str]] = []
        shared = False
        for name in self._settings.queue_names:
            alone = name in self._limited or name in self._settings.queue_concurrency
            if shared and not alone:
                portions[-1].append(name)
            else:
                portions.append([name])
            shared = not alone
        return portions

    async def _claim_portion(self, queue_names: list[str], wanted: int, *, full_scan: bool) -> int:
        name = queue_names[0]
        if (most := self._settings.queue_concurrency.get(name)) is not None:
            wanted = min(wanted, most - self._slots.running_in(name))
            self._capped |= most - self._slots.running_in(name) <= wanted
            if wanted <= 0:
                return 0
        if name not in self._limited:
            return await self._claim_lanes(wanted, queue_names, full_scan=full_scan)
        if not self._limited.due(name):
            return 0
        now = time.monotonic()
        worker_id = self._registration.worker_id
        priorities = self._cursors.priorities(name)
        runs = await self._limited_claims.claim(name, wanted, worker_id, list(self._app.tasks), priorities)
        if len(runs) >= wanted:
            # Workers that were not faster than this one with the arrivals may have looked in vain.
            self._on_more(name)
        self._agenda.offered = 0
        return self._take_up(runs, worker_id, now)

    async def _claim_lanes(self, wanted: int, queue_names: list[str] | None, *, full_scan: bool) -> int:
        now = time.monotonic()
        worker_id = self._registration.worker_id
        offered = self._agenda.offered
        rows = await self._connection.execute(
            claiming.CLAIM,
            {
                "worker_id": worker_id,
                "wanted": wanted,
                "task_names": list(self._app.tasks),
                **self._cursors.parameters(queue_names, full_scan=full_scan),
            },
        )
        self._agenda.offered -= offered
        claimed = [ClaimedRun._make(row) for row in rows]
        claimed.sort(key=_LANE_ORDER)
        self._cursors.claimed(claimed, full_scan=full_scan, full=len(rows) >= wanted)
        if any(run.limit_key is not None for run in claimed):
            for name in {run.queue_name for run in claimed if run.limit_key is not None}:
                self._enable_limits(name)
        return self._take_up(claimed, worker_id, now)

    def _take_up(self, claimed: list[ClaimedRun], worker_id: uuid.UUID, began: float) -> int:
        """Take slots for claimed runs, and return how many there are."""
        if claimed:
            self._clock.set(claimed[0].now)
        if self._telemetry is not None:
            self._telemetry.claimed(self._settings.queue_names, claimed, time.monotonic() - began)
        if worker_id != self._registration.worker_id or not self._registration.lease.valid:
            # The lease ended while the claim was in flight: the workers that take over find these runs, too.
            self.suspect_unknown_commit()
            return 0
        for item in claimed:
            if item.cancel_at is not None:
                self._agenda.look_within((item.cancel_at - item.now).total_seconds() + 0.005)
        if claimed:
            # They start in the next turn of the event loop, so that the next claim may be in flight meanwhile.
            self._slots.reserve(claimed)
            self._loop.call_soon(self._start)
        return len(claimed)

    def _start(self) -> None:
        try:
            self._executor.start_reserved()
        except Exception:
            logger.exception("starting runs failed")
            self.suspect_unknown_commit()

    @property
    def _commit_unknown(self) -> bool:
        return time.monotonic() < self._commit_unknown_until

    def suspect_unknown_commit(self) -> None:
        """Look for runs of a claim whose reply was lost: it may have been committed, or may still be."""
        self._commit_unknown_until = time.monotonic() + UNKNOWN_COMMIT_TIMEOUT
        self._next_adoption = 0.0

    async def _adopt(self) -> None:
        """Start this worker's runs of a claim whose reply was lost: no other worker does while the lease holds."""
        held = self._slots.unsettled()
        self._next_adoption = time.monotonic() + UNKNOWN_COMMIT_INTERVAL
        worker_id = self._registration.worker_id
        rows = await self._connection.execute(
            claiming.UNREPORTED_CLAIMS,
            {
                "worker_id": worker_id,
                "queue_names": list(self._settings.queue_names),
                "task_ids": [task_id for task_id, _ in held],
                "fences": [fence for _, fence in held],
            },
        )
        if worker_id == self._registration.worker_id and self._registration.lease.valid:
            self._executor.start([ClaimedRun._make(row) for row in rows])
