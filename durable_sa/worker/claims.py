"""The claims of a worker: when it asks for tasks, for how many, and how a claim whose reply was lost is made good."""

from __future__ import annotations

import asyncio
import logging
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Row

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
    ) -> None:
        self._app = app
        self._telemetry = app.telemetry
        self._settings = settings
        self._connection = connection
        self._registration = registration
        self._clock = clock
        self._agenda = agenda
        self._cursors = agenda.cursors
        self._slots = slots
        self._writer = writer
        self._executor = executor
        self._suspects = suspects
        self._lifetime = lifetime
        self._stopping = stopping
        self._listening = listening
        self._loop = asyncio.get_running_loop()
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
        return self._lifetime.most(wanted)

    async def run(self) -> None:
        """Claim until the worker is being shut down."""
        agenda = self._agenda
        retry = RetryPauses("claim", self._stopping, self._registration.outage)
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
                agenda.claim_when_freed = more or not self._listening()
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
        if self._cursors.next_due is not None:
            pause = min(pause, max(0.001, self._cursors.next_due - time.monotonic()))
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
        hinted, self._agenda.hinted = self._agenda.hinted, False
        full_scan = self._cursors.full_scan_overdue if hinted else self._cursors.full_scan_due
        if full_scan or self._cursors.due:
            queue_names = list(self._settings.queue_names)
            lanes = await self._connection.execute(claiming.SURVEY_LANES, {"queue_names": queue_names})
            self._cursors.surveyed(lanes)
            if not lanes:
                # Every task of these queues has ended.
                self._cursors.full_scan_made(time.monotonic() - now)
                return 0
        worker_id = self._registration.worker_id
        offered = self._agenda.offered
        makes_room = self._slots.makes_room
        parameters = {
            "worker_id": worker_id,
            "wanted": wanted,
            "task_names": list(self._app.tasks),
            **self._cursors.parameters(full_scan=full_scan or makes_room),
        }
        rows: Sequence[Row[Any]] = ()
        if not makes_room:
            rows = await self._connection.execute(claiming.CLAIM, parameters)
        self._agenda.offered -= offered
        alone = makes_room or (not rows and self._slots.empty)
        # Beside its own runs' unwritten outcomes, a worker asks for none yet; after a suspect, it asks for another.
        self._slots.claim_when_empty = not rows and not self._slots.taken
        if alone:
            # Nothing else runs here, nor is ready: the worker is free for a suspect.
            rows = await self._connection.execute(claiming.CLAIM_SUSPECT, parameters)
            self._suspects.asked(found=bool(rows))
        if rows:
            self._clock.set(rows[0].now)
        if full_scan:
            self._cursors.full_scan_made(time.monotonic() - now)
        claimed = [ClaimedRun._make(row) for row in rows]
        if self._telemetry is not None:
            self._telemetry.claimed(self._settings.queue_names, claimed, time.monotonic() - now)
        claimed.sort(key=_LANE_ORDER)
        if not alone:
            self._cursors.claimed(claimed, full_scan=full_scan, full=len(rows) >= wanted)
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
            self._slots.alone = alone
            self._loop.call_soon(self._start)
            self._lifetime.claimed(len(claimed))
        return len(rows)

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
