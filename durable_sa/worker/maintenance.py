"""What a worker does besides running tasks: waking, delivering, cascading, taking over, and repairing.

Most of it is asked for by what was just committed. The rest is found by one small look at the database, made when
something is due and every few seconds; each kind of work goes in bounded batches and skips rows that others have
locked.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Executable, Row
from sqlalchemy.exc import SQLAlchemyError

from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database.hint import Hint
from ..database_errors import backoff, is_transient, without_values
from ..ids import new_id
from ..statements import (
    cancelling,
    claiming,
    outcomes,
    waits,
)
from ..statements import (
    maintenance as looking,
)

logger = logging.getLogger("durable_sa")

BATCH = 500
DELIVERY_EVENTS = 50
LOCKED_PAUSE = 0.1
"""Seconds until tasks that somebody had locked are looked at again, for their waits or to cancel them."""
RECONCILE_INTERVAL = 15.0
"""Seconds between searches for waits that should have been resolved."""
REPAIR_AGE = 5.0
"""Seconds after which a wait that should have been resolved is taken to have been forgotten."""
RECONCILE_SHARE = 50
"""And at least so many times as long as the last search took."""
SWEEP_LOST_INTERVAL = 10.0
"""Seconds between repeated searches for runs of workers that are already known to be lost."""
LOCKED_SHARE = 4
"""And at least so many times as long as passing over them took."""
LOCKED_INTERVAL = 0.5
"""Seconds until another look for those of them that somebody held locked."""
FORGET_LOST_AFTER = 600.0
FORGET_SHARE = 4
"""Where there is more to delete, the pause until then is so many times as long as that took."""
FORGET_INTERVAL = 30.0
"""Seconds between deletions of what is past its retention."""


class Maintenance:
    """Keeps tasks moving that nobody is running."""

    def __init__(
        self,
        channel: DedicatedConnection,
        worker_id: uuid.UUID,
        clock: LocalClock,
        *,
        interval: Callable[[], float],
        announce: Callable[[Hint], None],
        check_runs: Callable[[], Any],
        poll_runs: Callable[[], None],
        fire_schedules: Callable[[DedicatedConnection], Awaitable[tuple[Sequence[Row[Any]], bool]]],
        forget: Callable[[DedicatedConnection], Awaitable[bool]],
        gave_up: Callable[[Sequence[Row[Any]]], None],
    ) -> None:
        self.worker_id = worker_id
        self._channel = channel
        self._clock = clock
        self._interval = interval
        self._announce = announce
        self._check_runs = check_runs
        self._poll_runs = poll_runs
        self._fire_schedules = fire_schedules
        self._forget = forget
        self._gave_up = gave_up
        self._poked = asyncio.Event()
        self._look_at = 0.0
        self._resolve: set[uuid.UUID] = set()
        self._ended: set[uuid.UUID] = set()
        self._ended_unheard: set[uuid.UUID] = set()
        self._cascade: set[uuid.UUID] = set()
        self._cascade_held: set[uuid.UUID] = set()
        self._deliver = False
        self._held_events = 0
        """Undelivered events that were passed over, and until when they are."""
        self._held_again_at = 0.0
        self._check = False
        self._next_reconcile = time.monotonic() + RECONCILE_INTERVAL
        self._next_sweep = 0.0
        self._next_forget = time.monotonic() + FORGET_INTERVAL
        self.repaired = 0
        """Waits that only the search has resolved, since the start."""

    def resolve(self, task_ids: Iterable[uuid.UUID]) -> None:
        """Look whether the waits of these suspended tasks are resolved already."""
        self._resolve.update(task_ids)
        self._poked.set()

    def ended(self, task_ids: Iterable[uuid.UUID], *, cascade: Iterable[uuid.UUID] = ()) -> None:
        """Tasks with a parent have ended, some of them unhappily."""
        self._ended.update(task_ids)
        self._cascade.update(cascade)
        self._poked.set()

    def deliver(self) -> None:
        """Events were emitted."""
        self._deliver = True
        self._poked.set()

    def check(self) -> None:
        """Tasks were cancelled: some may be running here."""
        self._check = True
        self._poked.set()

    def look_within(self, seconds: float) -> None:
        """Something is due by then."""
        self._look_at = min(self._look_at, time.monotonic() + max(0.0, seconds))
        self._poked.set()

    def look_now(self) -> None:
        """Anything may be due."""
        self._next_sweep = self._next_reconcile = self._next_forget = 0.0
        self.look_within(0.0)

    async def run(self) -> None:
        """Work until cancelled."""
        failures = 0
        while True:
            try:
                await self.work()
                failures = 0
                wait = self._look_at - time.monotonic()
                if wait > 0 and not self._poked.is_set():
                    try:
                        async with asyncio.timeout(wait):
                            await self._poked.wait()
                    except TimeoutError:
                        pass
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                if not is_transient(error):
                    logger.error("maintenance failed", exc_info=without_values(error))
                await asyncio.sleep(backoff(failures))
                failures += 1
            except Exception:
                logger.exception("maintenance failed")
                await asyncio.sleep(backoff(failures))
                failures += 1

    async def work(self) -> None:
        """Do what has been asked for, and look for more if it is time."""
        self._poked.clear()
        await self._do_asked()
        if time.monotonic() >= self._look_at:
            await self._look()
            await self._do_asked()

    async def _do_asked(self) -> None:
        while True:
            if self._check:
                self._check = False
                await self._check_runs()
            if self._resolve:
                await self._with(self._resolve, self._resolve_waits)
            elif self._ended:
                await self._with(self._ended, self._wake_parents)
            elif self._deliver:
                self._deliver = False
                await self._deliver_events()
            elif self._cascade:
                await self._with(self._cascade, self._cascade_from)
            else:
                return

    async def _with(self, asked: set[uuid.UUID], work: Callable[[list[uuid.UUID]], Any]) -> None:
        """Do a batch of what was asked for; what fails stays asked for."""
        batch = sorted(asked)[:BATCH]
        await work(batch)
        asked.difference_update(batch)

    async def _execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row[Any]]:
        return await self._channel.execute(statement, parameters)

    async def _resolve_waits(self, task_ids: list[uuid.UUID]) -> None:
        rows = await self._execute(waits.RESOLVE_FREE, {"task_ids": task_ids})
        self._announce(Hint().add_rows(rows))

    async def _wake_parents(self, task_ids: list[uuid.UUID]) -> None:
        rows = await self._execute(waits.WAITING_FOR, {"task_ids": task_ids})
        if not rows:
            return
        await self._resolve_waits(sorted({row.task_id for row in rows}))
        self._poll_runs()
        if await self._execute(waits.WAITING_FOR, {"task_ids": task_ids}):
            # Somebody had a row locked, perhaps to look at the same wait, but just before the end it is waiting for.
            self._ended_unheard.update(task_ids)
            self.look_within(LOCKED_PAUSE)

    async def _deliver_events(self) -> None:
        """Deliver page by page, past the events that somebody keeps from being delivered by a lock."""
        began = time.monotonic()
        again = began >= self._held_again_at
        passed = 0 if again else self._held_events
        previous: set[uuid.UUID] = set()
        while True:
            rows = await self._execute(
                waits.UNDELIVERED, {"wanted_events": DELIVERY_EVENTS, "wanted_waits": BATCH, "passed": passed}
            )
            if not rows:
                break
            waiting = {task_id for row in rows for task_id in row.task_ids or ()}
            if waiting:
                await self._resolve_waits(sorted(waiting))
            marked = await self._execute(
                waits.MARK_DELIVERED,
                {"queue_names": [row.queue_name for row in rows], "names": [row.name for row in rows]},
            )
            left = len(rows) - len(marked)
            if left and waiting != previous:
                # There are more than could be shown, or somebody was just looking at the same wait: once more.
                previous = waiting
                continue
            passed += left
            previous = set()
            if len(rows) < DELIVERY_EVENTS:
                break
        self._held_events = passed
        if passed:
            now = time.monotonic()
            if again:
                self._held_again_at = now + max(LOCKED_PAUSE, LOCKED_SHARE * (now - began))
            self.look_within(self._held_again_at - now)
        self._poll_runs()

    async def _cascade_from(self, task_ids: list[uuid.UUID]) -> None:
        for origin in task_ids:
            began, passed = time.monotonic(), 0
            while rows := await self._execute(
                cancelling.DESCENDANTS, {"ancestor_ids": [origin], "wanted": BATCH, "passed": passed}
            ):
                cancelled = await self._execute(
                    cancelling.CASCADE, {"task_ids": [row.task_id for row in rows], "origin": origin}
                )
                self._were_cancelled(cancelled, cascade=False)
                passed += len(rows) - len(cancelled)
            if passed:
                # Somebody holds these rows locked, for who knows how long: there is other work to do meanwhile.
                self._cascade_held.add(origin)
                self.look_within(max(LOCKED_PAUSE, LOCKED_SHARE * (time.monotonic() - began)))

    def _were_cancelled(self, rows: Sequence[Row[Any]], *, cascade: bool) -> None:
        if not rows:
            return
        self._ended.update(row.task_id for row in rows if row.parent_task_id is not None)
        if cascade:
            self._cascade.update(row.task_id for row in rows)
        if any(row.was == "running" for row in rows):
            self._check = True
            self._announce(Hint(cancelled=True))

    async def _cancel_overdue(self) -> bool:
        some = False
        while True:
            rows = await self._execute(cancelling.CANCEL_OVERDUE, {"wanted": BATCH})
            self._were_cancelled(rows, cascade=True)
            some = some or bool(rows)
            if len(rows) < BATCH:
                return some

    async def _take_over(self) -> None:
        if await self._execute(claiming.DECLARE_LOST, {}):
            # What was the earliest has hidden when the next lease ends.
            self.look_within(0.0)
        lost = await self._execute(claiming.LOST_WORKERS, {})
        if not lost:
            return
        worker_ids = [row.worker_id for row in lost]
        queue_names = sorted({name for row in lost for name in row.queue_names})
        began, passed = time.monotonic(), 0
        while True:
            found = await self._execute(
                claiming.RUNS_OF_LOST,
                {"worker_ids": worker_ids, "queue_names": queue_names, "wanted": BATCH, "passed": passed},
            )
            passed += len(found) - await self._take([row.task_id for row in found], worker_ids)
            if len(found) < BATCH:
                break
        if passed:
            # Somebody holds these locked, perhaps what the server has not yet noticed to be gone.
            self._next_sweep = 0.0
            self.look_within(max(LOCKED_INTERVAL, LOCKED_SHARE * (time.monotonic() - began)))
        await self._execute(claiming.FORGET_WORKERS, {"age": FORGET_LOST_AFTER})

    async def _take(self, task_ids: list[uuid.UUID], worker_ids: list[uuid.UUID]) -> int:
        if not task_ids:
            return 0
        rows = await self._execute(
            outcomes.TAKE_OVER,
            {"task_ids": task_ids, "next_run_ids": [new_id() for _ in task_ids], "worker_ids": worker_ids},
        )
        if rows:
            logger.warning("took %d runs over from workers that have fallen silent", len(rows))
        given_up = [row for row in rows if row.state == "failed"]
        self._gave_up(given_up)
        self._ended.update(row.task_id for row in given_up if row.parent_task_id is not None)
        self._cascade.update(row.task_id for row in given_up)
        self._announce(Hint().add_rows(row for row in rows if row.state == "pending"))
        return len(rows)

    async def _look(self) -> None:
        interval = self._interval()
        self._look_at = time.monotonic() + interval
        self._ended |= self._ended_unheard
        self._ended_unheard.clear()
        self._cascade |= self._cascade_held
        self._cascade_held.clear()
        await self._check_runs()
        rows = await self._execute(looking.LOOK, {"worker_id": self.worker_id})
        look = rows[0]
        self._clock.set(look.now)
        now = time.monotonic()
        if look.undelivered_events:
            self._deliver = True
        if _passed(look.next_cancel_at, look.now) and await self._cancel_overdue():
            # What was the earliest has hidden when the next one is due.
            self.look_within(0.0)
        if _passed(look.next_expiry_at, look.now) or (look.lost_workers and now >= self._next_sweep):
            self._next_sweep = now + SWEEP_LOST_INTERVAL
            await self._take_over()
        if look.due_ticks:
            spawned, moved = await self._fire_schedules(self._channel)
            self._announce(Hint().add_rows(spawned))
            if moved:
                self.look_within(0.0)
        if now >= self._next_forget:
            began = time.monotonic()
            more = await self._forget(self._channel)
            pause = FORGET_SHARE * (time.monotonic() - began) if more else FORGET_INTERVAL
            self._next_forget = time.monotonic() + pause
        self._look_at = min(self._look_at, self._next_forget)
        if now >= self._next_reconcile:
            await self._reconcile()
            took = time.monotonic() - now
            self._next_reconcile = now + max(RECONCILE_INTERVAL, RECONCILE_SHARE * took)
        # A tick that has come since the look began is still to be fired.
        later = [moment for moment in (look.next_cancel_at, look.next_expiry_at) if moment and moment > look.now]
        for moment in [*later, *([look.next_tick_at] if look.next_tick_at else [])]:
            self._look_at = min(self._look_at, now + (moment - look.now) / timedelta(seconds=1) + 0.005)

    async def _reconcile(self) -> None:
        rows = await self._execute(waits.UNRESOLVED, {"age": REPAIR_AGE, "wanted": BATCH})
        if rows:
            found = {row.task_id for row in rows}
            self.repaired += len(found)
            logger.info("found %d tasks whose waits were over without anybody having told them", len(found))
            self._resolve.update(found)
        await self._execute(waits.FORGET_STRAY_WAITS, {"age": REPAIR_AGE})
        orphaned = await self._execute(claiming.ORPHANED_RUNS, {"wanted": BATCH})
        await self._take([row.task_id for row in orphaned], list({row.claimed_by for row in orphaned}))
        for row in await self._execute(cancelling.LEFT_BEHIND, {"wanted": BATCH}):
            self._cascade.add(row.task_id)


def _passed(moment: datetime | None, now: datetime) -> bool:
    return moment is not None and moment <= now
