"""The claims of a worker: when it asks for tasks, for how many, and what becomes of a claim whose reply is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import operator
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database.hint import Hint
from ..database_errors import (
    backoff,
    is_transient,
    reason,
    without_values,
)
from ..execution.writer import Writer
from ..statements import claiming
from ..statements.claiming import ClaimedRun
from .cursors import ClaimCursors
from .executor import Executor
from .maintenance import Maintenance
from .registration import Registration
from .settings import Settings

if TYPE_CHECKING:
    from ..client import Durable

logger = logging.getLogger("durable_sa")

LISTENING_POLL = 5.0
"""Seconds between polls while hints arrive."""
PIPELINED = 32
"""With so many slots, a claim takes half of them at most: the next is on its way while the code of the last begins."""
DOUBT = 60.0
"""Seconds after a claim without a reply in which the server may still commit it."""

ASIDE = 0.01
"""Seconds that a look for what hints do not tell of is put off, where there is something to do."""

_BY_LANE = operator.attrgetter("priority", "available_at", "task_id")


class Claimer:
    """Claims tasks for free slots: when `wake` is set, when something known is due, and every poll interval."""

    def __init__(
        self,
        durable: Durable[Any],
        settings: Settings,
        channel: DedicatedConnection,
        registration: Registration,
        runs: Executor,
        writer: Writer,
        maintenance: Maintenance,
        clock: LocalClock,
        *,
        wake: asyncio.Event,
        stopping: asyncio.Event,
        listening: Callable[[], bool],
    ) -> None:
        self._durable = durable
        self._settings = settings
        self._channel = channel
        self._registration = registration
        self._runs = runs
        self._writer = writer
        self._maintenance = maintenance
        self._clock = clock
        self._wake = wake
        self._stopping = stopping
        self._listening = listening
        self._telemetry = durable.telemetry
        self._cursors = ClaimCursors(settings.queue_names)
        self._loop = asyncio.get_running_loop()
        self._offered = 0
        """Tasks that this process has told the worker of since the last claim."""
        self._held_back = False
        self._more = True
        """Whether there may be tasks that the last claim has left for want of slots."""
        self._hinted = False
        self._look: asyncio.TimerHandle | None = None
        self._doubt_until = 0.0
        self._next_adoption = 0.0

    def note(self, hint: Hint) -> None:
        """Tasks may be claimable, now or at a known time."""
        if self._cursors.lower(hint, self._clock.now()) or hint.lanes:
            self._hinted = True
            self._wake.set()

    def offer(self, hint: Hint) -> bool:
        """Whether there are slots for all tasks of a hint that comes from this process, and nobody else need hear."""
        self._offered += hint.tasks
        return (
            not hint.cancelled
            and not self._stopping.is_set()
            and self._registration.lease.valid
            and all(queue_name in self._settings.queue_names for queue_name, _ in hint.lanes)
            and self._free >= self._offered
            and self._free * 2 > self._settings.concurrency
        )

    def look_everywhere(self) -> None:
        """Anything may be claimable."""
        self._cursors.search_soon()
        self._wake.set()

    def freed(self) -> None:
        """A slot has become free, which is of no use where the last claim took all that there was.

        What hints do not tell of is looked for soon, but not before the result of the run is on its way.
        """
        if self._more or not self._listening():
            self._wake.set()
        elif self._look is None:
            self._look = self._loop.call_later(max(ASIDE, self._cursors.search_in), self._look_now)

    def _look_now(self) -> None:
        self._look = None
        self._wake.set()

    def written(self) -> None:
        """Results have been written, which claims may have waited for."""
        if self._held_back:
            self._wake.set()

    @property
    def _free(self) -> int:
        """How many tasks may be claimed now."""
        free = self._settings.concurrency - self._runs.slots_taken
        # Results that wait to be written hold no slot, but there must be an end to them.
        self._held_back = self._writer.backlog > 2 * self._settings.concurrency + 100
        if self._held_back:
            return 0
        return min(free, self._settings.batch_size or free)

    @property
    def _poll_interval(self) -> float:
        return LISTENING_POLL if self._listening() else self._settings.poll_interval

    async def run(self) -> None:
        """Claim until the worker is to stop."""
        failures = 0
        while not self._stopping.is_set():
            try:
                if self._free <= 0 or not self._registration.lease.valid:
                    self._more = True
                    await self._wait(1.0)
                    continue
                self._wake.clear()
                if self._in_doubt and time.monotonic() >= self._next_adoption:
                    await self._adopt()
                wanted = self._free
                if self._settings.concurrency >= PIPELINED:
                    wanted = min(wanted, self._settings.concurrency // 2)
                claimed = await self._claim(wanted)
                failures = 0
                self._more = claimed >= wanted
                if self._more or self._wake.is_set():
                    continue
                due = self._poll_interval
                if self._cursors.search_due:
                    due = ASIDE
                elif self._cursors.next_due is not None:
                    due = min(due, max(0.001, self._cursors.next_due - time.monotonic()))
                await self._wait(due)
            except Exception as error:
                if not is_transient(error):
                    logger.error("claiming failed", exc_info=without_values(error))
                elif failures == 3:
                    logger.warning("claiming fails (%s); trying on", reason(error))
                self.doubt()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff(failures)):
                        await self._stopping.wait()
                failures += 1

    async def _wait(self, most: float) -> None:
        timer = self._loop.call_later(most, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
        self._wake.clear()

    async def _claim(self, wanted: int) -> int:
        now = time.monotonic()
        hinted, self._hinted = self._hinted, False
        search = self._cursors.search_overdue if hinted else self._cursors.search_due
        if search or self._cursors.due:
            queue_names = list(self._settings.queue_names)
            survey = await self._channel.execute(claiming.SURVEY_LANES, {"queue_names": queue_names})
            self._cursors.surveyed(survey)
            if not survey:
                # There is not a task that has not ended.
                self._cursors.searched(time.monotonic() - now)
                return 0
        worker_id = self._registration.worker_id
        offered = self._offered
        rows = await self._channel.execute(
            claiming.CLAIM,
            {
                "worker_id": worker_id,
                "wanted": wanted,
                "task_names": list(self._durable.tasks),
                **self._cursors.parameters(search=search),
            },
        )
        self._offered -= offered
        if rows:
            self._clock.set(rows[0].now)
        if search:
            self._cursors.searched(time.monotonic() - now)
        claimed = [ClaimedRun._make(row) for row in rows]
        if self._telemetry is not None:
            self._telemetry.claimed(self._settings.queue_names, claimed, time.monotonic() - now)
        claimed.sort(key=_BY_LANE)
        self._cursors.claimed(claimed, search=search, full=len(rows) >= wanted)
        if worker_id != self._registration.worker_id or not self._registration.lease.valid:
            # The lease ended while the claim was on its way: those that take over find these runs, too.
            self.doubt()
            return 0
        for item in claimed:
            if item.cancel_at is not None:
                self._maintenance.look_within((item.cancel_at - item.now).total_seconds() + 0.005)
        if claimed:
            # In the next turn, so that the next claim may be on its way while they start.
            self._runs.expect(claimed)
            self._loop.call_soon(self._start)
        return len(rows)

    def _start(self) -> None:
        try:
            self._runs.start_expected()
        except Exception:
            logger.exception("starting runs failed")
            self.doubt()

    @property
    def _in_doubt(self) -> bool:
        return time.monotonic() < self._doubt_until

    def doubt(self) -> None:
        """A claim may have been committed, or may still be, without our having heard of it."""
        self._doubt_until = time.monotonic() + DOUBT
        self._next_adoption = 0.0

    async def _adopt(self) -> None:
        """Start runs that are this worker's although the reply to their claim was lost: nobody else ever would."""
        held = self._runs.held()
        self._next_adoption = time.monotonic() + 1.0
        worker_id = self._registration.worker_id
        rows = await self._channel.execute(
            claiming.UNHEARD_CLAIMS,
            {
                "worker_id": worker_id,
                "queue_names": list(self._settings.queue_names),
                "task_ids": [task_id for task_id, _ in held],
                "fences": [fence for _, fence in held],
            },
        )
        if worker_id == self._registration.worker_id and self._registration.lease.valid:
            self._runs.start([ClaimedRun._make(row) for row in rows])
