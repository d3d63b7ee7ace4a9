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
from ..database_errors import RetryPauses
from ..execution.writer import Writer
from ..statements import claiming
from ..statements.claiming import ClaimedRun
from .agenda import FULL_SCAN_DELAY, Agenda
from .executor import Executor
from .lifetime import Lifetime
from .limited import LimitedClaims
from .registration import Registration
from .settings import Settings
from .slots import Slots
from .suspects import Suspects

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
        suspects: Suspects,
        lifetime: Lifetime,
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
        self._suspects = suspects
        self._lifetime = lifetime
        self._stopping = stopping
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._capped = False
        """The last claim was bounded by `queue_concurrency`, so more tasks may be ready."""
        self._unreported_until = 0.0
        self._next_adoption = 0.0

    def _count_wanted(self) -> int:
        """Return how many tasks the next claim asks for.

        Results that wait to be written hold no slot, so they would pile up without a limit. While there are too many,
        the next claim asks for none, and the writer wakes it when they are written.
        """
        self._agenda.claim_when_written = self._writer.backlog > 2 * self._settings.concurrency + 100
        if self._agenda.claim_when_written:
            return 0
        wanted = self._slots.free
        if self._settings.concurrency >= HALF_CLAIMS_CONCURRENCY:
            wanted = min(wanted, self._settings.concurrency // 2)
        return self._lifetime.most(wanted)

    async def run(self) -> None:
        """Claim until the worker is being shut down."""
        agenda = self._agenda
        retry = RetryPauses("claim", self._stopping, self._registration.outage)
        while not self._stopping.is_set():
            try:
                if self._count_wanted() <= 0 or not self._registration.lease.valid:
                    agenda.claim_when_freed = True
                    await self._wait(1.0)
                    continue
                agenda.claim.clear()
                if self._may_be_unreported and time.monotonic() >= self._next_adoption:
                    await self._adopt_unreported()
                if (wanted := self._count_wanted()) <= 0:
                    continue
                more = await self._claim(wanted) >= wanted
                retry.reset()
                agenda.claim_when_freed = more or self._capped or not self._listening()
                if not more and not agenda.claim.is_set():
                    await self._wait(self._pause)
            except Exception as error:  # noqa: BLE001 - the retry logs it
                self.expect_unreported()
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
        worker_id = self._registration.worker_id
        offered = self._agenda.offered
        makes_room = self._slots.makes_room
        claimed: list[ClaimedRun] = []
        if not makes_room:
            claimed += await self._claim_ready(wanted, full_scan=full_scan)
        self._agenda.offered -= offered
        if len(claimed) < min(offered, wanted):
            # Some are due later, or claimed by others, or were locked when the claim passed.
            self._agenda.scan_soon()
        if worker_id != self._registration.worker_id or not self._registration.lease.valid:
            return 0
        alone = makes_room or (not claimed and self._slots.empty)
        # Beside its own runs' unwritten outcomes, a worker asks for none yet; after a suspect, it asks for another.
        self._slots.claim_when_empty = not claimed and not self._slots.taken
        if alone:
            # Nothing else runs here, nor is ready: the worker is free for a suspect.
            if makes_room and self._limited.queues:
                await self._limited_claims.look()
            claimed += await self._claim_suspect(full_scan=full_scan or makes_room)
            self._suspects.asked(found=bool(claimed))
        if full_scan:
            self._cursors.full_scan_made(time.monotonic() - now)
        if self._telemetry is not None:
            self._telemetry.claimed(self._settings.queue_names, claimed, time.monotonic() - now)
        return len(claimed)

    async def _claim_ready(self, wanted: int, *, full_scan: bool) -> list[ClaimedRun]:
        """Claim up to so many tasks that are no suspects."""
        if not self._limited.queues and not self._settings.queue_concurrency:
            return await self._claim_lanes(wanted, None, full_scan=full_scan)
        if self._limited.queues and self._limited.idle and (full_scan or not self._listening()):
            await self._limited_claims.look()
        claimed: list[ClaimedRun] = []
        for queue_names in self._portions():
            most = min(wanted - len(claimed), self._room(queue_names[0]))
            if most > 0:
                claimed += await self._claim_portion(queue_names, most, full_scan=full_scan)
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

    def _room(self, queue_name: str) -> int:
        """Return how many runs of a queue may begin in this worker, beside those that it has."""
        most = self._settings.queue_concurrency.get(queue_name)
        if most is None:
            return self._settings.concurrency
        room = most - self._slots.running_in(queue_name)
        self._capped |= room < self._slots.free
        return room

    async def _claim_portion(self, queue_names: list[str], wanted: int, *, full_scan: bool) -> list[ClaimedRun]:
        name = queue_names[0]
        if name not in self._limited:
            return await self._claim_lanes(wanted, queue_names, full_scan=full_scan)
        if not self._limited.due(name):
            return []
        claimed = await self._claim_keys(name, wanted)
        if len(claimed) >= wanted:
            # Workers that were not faster than this one with the arrivals may have looked in vain.
            self._on_more(name)
        return claimed

    async def _claim_suspect(self, *, full_scan: bool) -> list[ClaimedRun]:
        """Claim a suspect, of a queue with limits only where the last look has found one."""
        for queue_names in self._portions():
            name = queue_names[0]
            if name not in self._limited:
                claimed = await self._claim_lanes(1, queue_names, full_scan=full_scan, suspect=True)
            elif self._limited.queues[name].suspects:
                claimed = await self._claim_keys(name, 1, suspect=True)
            else:
                continue
            if claimed:
                return claimed
        return []

    async def _claim_keys(self, queue_name: str, wanted: int, *, suspect: bool = False) -> list[ClaimedRun]:
        worker_id = self._registration.worker_id
        priorities = self._cursors.priorities(queue_name)
        task_names = list(self._app.tasks)
        claim = self._limited_claims.claim_suspect if suspect else self._limited_claims.claim
        return self._take_up(await claim(queue_name, wanted, worker_id, task_names, priorities), worker_id, suspect)

    async def _claim_lanes(
        self, wanted: int, queue_names: list[str] | None, *, full_scan: bool, suspect: bool = False
    ) -> list[ClaimedRun]:
        worker_id = self._registration.worker_id
        rows = await self._connection.execute(
            claiming.CLAIM_SUSPECT if suspect else claiming.CLAIM,
            {
                "worker_id": worker_id,
                "wanted": wanted,
                "task_names": list(self._app.tasks),
                **self._cursors.parameters(queue_names, full_scan=full_scan),
            },
        )
        claimed = [ClaimedRun._make(row) for row in rows]
        claimed.sort(key=_LANE_ORDER)
        if not suspect:
            self._cursors.claimed(claimed, full_scan=full_scan, full=len(rows) >= wanted)
        for name in {run.queue_name for run in claimed if run.limit_key is not None}:
            self._enable_limits(name)
        return self._take_up(claimed, worker_id, suspect)

    def _take_up(self, claimed: list[ClaimedRun], worker_id: uuid.UUID, alone: bool) -> list[ClaimedRun]:
        """Take slots for claimed runs, and return those that start."""
        if claimed:
            self._clock.set(claimed[0].now)
        if worker_id != self._registration.worker_id or not self._registration.lease.valid:
            # The lease ended while the claim was in flight: the workers that take over find these runs, too.
            self.expect_unreported()
            return []
        for item in claimed:
            if item.cancel_at is not None:
                self._agenda.look_within((item.cancel_at - item.now).total_seconds() + 0.005)
        if claimed:
            # They start in the next turn of the event loop, so that the next claim may be in flight meanwhile.
            self._slots.reserve(claimed)
            self._slots.alone = alone
            self._loop.call_soon(self._start)
            self._lifetime.claimed(len(claimed))
        return claimed

    def _start(self) -> None:
        try:
            self._executor.start_reserved()
        except Exception:
            logger.exception("starting runs failed")
            self.expect_unreported()

    @property
    def _may_be_unreported(self) -> bool:
        return time.monotonic() < self._unreported_until

    def expect_unreported(self) -> None:
        """Look for runs of a claim whose reply was lost: it may have been committed, or may still be."""
        self._unreported_until = time.monotonic() + UNKNOWN_COMMIT_TIMEOUT
        self._next_adoption = 0.0

    async def _adopt_unreported(self) -> None:
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
        if worker_id != self._registration.worker_id or not self._registration.lease.valid:
            return
        suspects = [ClaimedRun._make(row[:-1]) for row in rows if row.suspect]
        others = [ClaimedRun._make(row[:-1]) for row in rows if not row.suspect]
        if suspects and (others or suspects[1:] or not self._slots.empty):
            # Other tasks have been claimed since that claim, and nothing runs beside a suspect.
            self._executor.give_back(suspects)
        elif suspects:
            self._slots.alone = True
            self._executor.start(suspects)
        self._executor.start(others)
