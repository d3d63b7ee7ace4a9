"""The work of a worker besides running tasks: waking, delivering, cancelling, taking over, firing, deleting, repairing.

Most of it is listed in the agenda, by what was just committed. The rest is found by one small look at the database,
which is made when something is due and every few seconds. Each kind of work goes in bounded batches and skips rows
that other transactions hold locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from ..app import App
from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database.hint import Hint
from ..database_errors import RetryPauses
from ..schedules.firing import Firing
from ..statements import cancelling, limiting, messages, waits
from ..statements import maintenance as looking
from .agenda import Agenda
from .cancellations import Cancellations
from .declarations import Declarations
from .dispatcher import Dispatcher
from .executor import Executor
from .registration import Registration
from .retention import Retention
from .suspects import Suspects
from .takeover import LOST_RUNS_INTERVAL, Takeover
from .wakeups import BATCH, UNHINTED_AGE, WakeUps

logger = logging.getLogger("durable_sa")

MAINTENANCE_INTERVAL = 5.0
"""Seconds between looks at the database while hints arrive and no task runs."""
MAINTENANCE_INTERVAL_BUSY = 1.0
REPAIR_INTERVAL = 15.0
"""Seconds between searches for missed wake-ups."""
REPAIR_PAUSE_RATIO = 50
"""Least pause between these searches, as a multiple of the last one's duration."""
REPAIR_AGE = 5.0
"""Seconds after which a wait that is over counts as a missed wake-up."""
RETENTION_INTERVAL = 30.0
"""Seconds between deletions of what queues keep no longer."""
RETENTION_PAUSE_RATIO = 4
"""Pause until the next deletion where more is left to delete, as a multiple of the last one's duration."""


IDLE_KEYS = 1000
"""Keys in one deletion of those that nothing uses, as its text says."""


class Maintenance:
    """Keeps tasks moving that no worker is running."""

    def __init__(
        self,
        app: App,
        connection: DedicatedConnection,
        registration: Registration,
        clock: LocalClock,
        agenda: Agenda,
        dispatcher: Dispatcher,
        executor: Executor,
        suspects: Suspects,
        *,
        queue_names: tuple[str, ...],
        listening: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._registration = registration
        self._clock = clock
        self._agenda = agenda
        self._dispatcher = dispatcher
        self._executor = executor
        self._suspects = suspects
        self._listening = listening
        self._wakeups = WakeUps(connection, agenda, dispatcher, executor)
        self._cancellations = Cancellations(connection, agenda, dispatcher, executor.minutes)
        self._takeover = Takeover(connection, agenda, dispatcher, executor)
        self._firing = Firing(app, connection)
        self._retention = Retention(connection)
        self._declarations = Declarations(app, connection, queue_names)
        self._next_repair = time.monotonic() + REPAIR_INTERVAL
        self._next_retention = time.monotonic() + RETENTION_INTERVAL
        self.looked = asyncio.Event()
        """Set once the first look is over, which has stored the schedules that tasks declare."""
        self.repaired = 0
        """Missed wake-ups that were repaired since the start."""

    async def run(self) -> None:
        """Work until cancelled."""
        retry = RetryPauses("maintenance", outage=self._registration.outage)
        while True:
            try:
                await self.work()
                retry.reset()
                wait = self._agenda.look_at - time.monotonic()
                if wait > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            await self._agenda.maintain.wait()
            except Exception as error:  # noqa: BLE001 - the retry logs it
                await retry.pause(error)

    async def work(self) -> None:
        """Do what the agenda lists, and look at the database if it is time."""
        self._agenda.maintain.clear()
        await self._do_listed()
        if time.monotonic() >= self._agenda.look_at:
            await self._look()
            await self._do_listed()

    def look_at_everything(self) -> None:
        """Have the next look, made now, include the searches that are made rarely."""
        self._takeover.next_search = self._next_repair = self._next_retention = 0.0
        self._agenda.look_within(0.0)

    async def _do_listed(self) -> None:
        agenda = self._agenda
        while True:
            if agenda.check_runs:
                agenda.check_runs = False
                await self._executor.check()
            if agenda.waits:
                await do_batch(agenda.waits, self._wakeups.resolve)
            elif agenda.ended:
                await do_batch(agenda.ended, self._wakeups.wake_parents)
            elif agenda.deliver:
                agenda.deliver = False
                await self._wakeups.deliver_events()
            elif agenda.receivers:
                await do_batch(agenda.receivers, self._wakeups.deliver_messages)
            elif agenda.waiting_for_mail:
                await do_batch(agenda.waiting_for_mail, self._wakeups.look_for_mail)
            elif agenda.look_for_messages:
                agenda.look_for_messages = False
                await self._wakeups.look_for_messages(0.0)
            elif agenda.cascades:
                await do_batch(agenda.cascades, self._cancellations.cascade)
            else:
                return

    async def _look(self) -> None:
        agenda = self._agenda
        busy = self._executor.busy or not self._listening()
        agenda.look_at = time.monotonic() + (MAINTENANCE_INTERVAL_BUSY if busy else MAINTENANCE_INTERVAL)
        agenda.resume_deferred()
        await self._executor.check()
        rows = await self._connection.execute(looking.NEXT_DUE, {"worker_id": self._registration.worker_id})
        look = rows[0]
        self._clock.set(look.now)
        now = time.monotonic()
        if look.undelivered_events:
            agenda.deliver = True
        if look.undelivered_messages:
            await self._wakeups.look_for_messages(UNHINTED_AGE)
        if _passed(look.next_cancel_at, look.now) and await self._cancellations.cancel_overdue():
            # Only the earliest limit is known; look again for the next.
            agenda.look_within(0.0)
        if _passed(look.next_expiry_at, look.now) or (look.lost_workers and now >= self._takeover.next_search):
            self._takeover.next_search = now + LOST_RUNS_INTERVAL
            await self._takeover.search()
        await self._suspects.make_room()
        if await self._declarations.keep(look.now):
            agenda.look_within(0.0)
        if look.due_ticks:
            spawned, moved = await self._firing.fire_due()
            self._dispatcher.announce(Hint().add_rows(spawned))
            if moved:
                agenda.look_within(0.0)
        if now >= self._next_retention:
            began = time.monotonic()
            more = await self._retention.delete_expired()
            if self._agenda.limited.queues:
                more |= len(await self._connection.execute(limiting.DELETE_IDLE_KEYS)) >= IDLE_KEYS
            pause = RETENTION_PAUSE_RATIO * (time.monotonic() - began) if more else RETENTION_INTERVAL
            self._next_retention = time.monotonic() + pause
        if now >= self._next_repair:
            await self._repair()
            took = time.monotonic() - now
            self._next_repair = now + max(REPAIR_INTERVAL, REPAIR_PAUSE_RATIO * took)
        due = [moment for moment in (look.next_cancel_at, look.next_expiry_at) if moment and moment > look.now]
        if look.next_tick_at:
            # Also one that has come since the look began: it is still to be fired.
            due.append(look.next_tick_at)
        due_in = [(moment - look.now) / timedelta(seconds=1) + 0.005 for moment in due]
        agenda.look_at = min(agenda.look_at, self._next_retention, *(now + seconds for seconds in due_in))
        self.looked.set()

    async def _repair(self) -> None:
        """Find what should have been done when it was committed: by a worker that was lost just then."""
        rows = await self._connection.execute(waits.UNRESOLVED, {"age": REPAIR_AGE, "wanted": BATCH})
        if rows:
            missed = {row.task_id for row in rows}
            self.repaired += len(missed)
            logger.info("repaired %d missed wake-ups", len(missed))
            self._agenda.resolve_waits(missed)
        rows = await self._connection.execute(messages.UNDELIVERED_WAITS, {"age": REPAIR_AGE, "wanted": BATCH})
        if rows:
            self.repaired += len(rows)
            logger.info("repaired %d missed wake-ups by messages", len(rows))
            self._agenda.deliver_messages(row.task_id for row in rows)
        await self._connection.execute(waits.DELETE_STRAY_WAITS, {"age": REPAIR_AGE})
        await self._takeover.take_orphaned()
        for queue_name in self._agenda.limited.queues:
            await self._connection.execute(limiting.ADOPT_STRAYS, {"queue_name": queue_name})
        left_behind = await self._connection.execute(cancelling.INCOMPLETE_CASCADES, {"wanted": BATCH})
        self._agenda.cascade(row.task_id for row in left_behind)


async def do_batch(listed: set[uuid.UUID], work: Callable[[list[uuid.UUID]], Awaitable[None]]) -> None:
    """Do a batch of what is listed. If the work fails, the batch stays listed."""
    batch = sorted(listed)[:BATCH]
    # Before the work, because what is listed meanwhile is to be done once more.
    listed.difference_update(batch)
    try:
        await work(batch)
    except BaseException:
        listed.update(batch)
        raise


def _passed(moment: datetime | None, now: datetime) -> bool:
    return moment is not None and moment <= now
