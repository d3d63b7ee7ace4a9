"""One run: user code under a fence, from its claim until it completes, fails, suspends or is taken away."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from ..concurrency.branches import Branch, Branches, current_branch
from ..concurrency.task_factory import BranchExit
from ..current import in_event_loop
from ..errors import InvalidState
from ..signals import ControlFlow, LeaseLost, Suspended
from ..statements.claiming import ClaimedRun
from . import outcomes
from .host import RunHost
from .journal import Entry, Journal
from .waits import PendingWait
from .writes import Kind, Stored, Write

if TYPE_CHECKING:
    from ..tasks import Task

logger = logging.getLogger("durable_sa")

REGISTER_AFTER = 0.02
"""Seconds that a wait is held back from the database: most runs suspend before, and store it with that."""

RAISED_BEFORE_PARKING = 5
"""How often a call raises the signal of a run that has ended, for code that swallows it, before it waits for ever."""


class Run:
    """The execution of one claimed run."""

    def __init__(
        self, claimed: ClaimedRun, task: Task[Any, Any], host: RunHost, journal: Journal, wakers: str | None = None
    ) -> None:
        self.claimed = claimed
        self.wakers = wakers
        """The trace contexts of what it was woken by."""
        self.task = task
        self.host = host
        self.journal = journal
        self.parked: dict[asyncio.Future[Any], PendingWait] = {}
        self.branches = Branches(on_quiescent=self._quiescent)
        self.children: dict[uuid.UUID, Any] = {}
        self.signal: ControlFlow | None = None
        self.over = False
        self._waited = journal.waiting
        """Whether waits of the task may be stored."""
        self._ignored = 0
        self._loop = asyncio.get_running_loop()
        self._register_timer: asyncio.TimerHandle | None = None
        self._poll_timer: asyncio.TimerHandle | None = None

    def start(self, body: Coroutine[Any, Any, Any], context: contextvars.Context) -> None:
        """Start user code; what becomes of it is written when it ends."""
        root = self.branches.start(body, context=context, name=f"durable:{self.claimed.task_name}")
        root.add_done_callback(self._root_done)

    def refuse(self, error: BaseException) -> None:
        """Fail the run without starting it."""
        self.over = True
        self.host.run_ended(self.claimed)
        self._fail(error)

    def _going_on(self) -> bool:
        """Whether nothing has put an end to it yet."""
        return self.signal is None and not self.over

    def take_away(self, signal: ControlFlow) -> None:
        """Cancel user code, steps included, because the run is no longer this worker's: it writes nothing more."""
        if self._going_on():
            self.signal = signal
            self.host.start_task(self._unwind("lost"), "durable:unwind")

    def release(self) -> None:
        """Cancel user code and give the run back, for another worker to go on from its checkpoints."""
        if self._going_on():
            self.signal = Suspended()
            self.host.start_task(self._unwind("released"), "durable:release")

    def _root_done(self, root: asyncio.Task[Any]) -> None:
        self._stop_timers()
        if self.signal is not None:
            if not root.cancelled():
                root.exception()
            return
        if any(task is not root for task in self.branches.tasks):
            self.signal = Suspended()
            self.host.start_task(self._unwind("ended", root), "durable:unwind")
        else:
            self._end(root)

    async def _unwind(self, reason: str, root: asyncio.Task[Any] | None = None) -> None:
        self._stop_timers()
        waits = [parked.spec() for parked in self.parked.values()] if reason == "suspended" else []
        abandoned = await self.branches.unwind()
        if abandoned:
            logger.warning(
                "task %s (%s) does not end when it is cancelled; %d of its coroutines are left behind",
                self.claimed.task_id,
                self.claimed.task_name,
                len(abandoned),
                extra=self.claimed.log_fields,
            )
            if isinstance(self.signal, LeaseLost):
                self.host.left_running()
        if root is not None:
            self._end(root)
            return
        self._over()
        if reason == "suspended":
            outcomes.suspend(self.host, self.claimed, self.task, waits, waited=self._waited)
        elif reason == "released":
            outcomes.release(self.host, self.claimed, self.task, waited=self._waited)
        else:
            self.host.outcome_stored(self.claimed, "lost", None)

    def _over(self) -> None:
        if not self.over:
            self.over = True
            self.host.run_ended(self.claimed)

    def _end(self, root: asyncio.Task[Any]) -> None:
        """The root has returned or raised by itself: that is the outcome."""
        self._over()
        if root.cancelled():
            self._fail(asyncio.CancelledError("the task cancelled itself"))
            return
        error = root.exception()
        if error is not None:
            cause = error.__cause__ if isinstance(error, BranchExit) else error
            self._fail(cause or error)
            return
        if names := self.journal.unused_names():
            logger.warning(
                "task %s (%s) completed without using what is recorded for: %s. Was its code changed?",
                self.claimed.task_id,
                self.claimed.task_name,
                ", ".join(names[:10]),
                extra=self.claimed.log_fields,
            )
        outcomes.complete(self.host, self.claimed, self.task, root.result(), waited=self._waited)

    def _fail(self, error: BaseException) -> None:
        outcomes.fail(self.host, self.claimed, self.task, error, waited=self._waited)

    def now(self) -> datetime:
        """The database's time, or a little before."""
        return max(self.claimed.now, self.host.clock.now())

    def branch(self) -> Branch:
        """Where in the run the calling code is.

        Raises:
            InvalidState: it is not in the run: outside of tasks, in another one, or in another event loop.
        """
        try:
            branch = current_branch()
        except LookupError:
            self._refuse_stranger()
        if branch.branches is not self.branches or self.in_another_loop():
            self._refuse_stranger()
        return branch

    def in_another_loop(self) -> bool:
        """Whether the calling code is in an event loop of its own, as in a step that calls `asyncio.run`."""
        return not self.branches.is_in_thread() and in_event_loop()

    async def enter(self) -> None:
        """The gate before every durable call: nothing more happens in a run that is suspended, cancelled or lost.

        Raises:
            InvalidState: the run has ended by itself.
        """
        if self.signal is None and not self.over and self.host.leased:
            return
        await self._refuse()

    def _refuse_stranger(self) -> NoReturn:
        raise InvalidState(
            f"The context of task {self.claimed.task_id}",
            "used outside of its run" if not self.over else "used after the end of its run",
            "Each run has a context of its own: use it in the task's own code, in its steps, and nowhere else.",
        )

    async def _refuse(self) -> NoReturn:
        if self.signal is None and self.over:
            self._refuse_stranger()
        if self.signal is None:
            self.host.lease_lost()
        self._ignored += 1
        if self._ignored > RAISED_BEFORE_PARKING:
            # Code that swallows the signal and calls again would spin: it waits here until it is abandoned.
            await self._loop.create_future()
        raise self.signal if self.signal is not None else LeaseLost()

    async def write(self, kind: Kind, key: uuid.UUID, values: tuple[Any, ...], *, size: int = 0) -> Stored | None:
        """Write a checkpoint under the fence. What comes back is what another run stored under the key, or None."""
        claimed = self.claimed
        telemetry = self.host.telemetry
        began = 0.0 if telemetry is None else time.perf_counter()
        try:
            stored: Stored | None = await self._written(
                lambda told: Write(kind, claimed.task_id, claimed.fence, told, key, values, (), size)
            )
        except LeaseLost:
            self.take_away(LeaseLost())
            raise
        if telemetry is not None:
            telemetry.checkpointed(claimed, time.perf_counter() - began)
        if self.signal is not None:
            await self._refuse()
        return stored

    async def _written(self, make: Callable[[Callable[[Any, BaseException | None], None]], Write]) -> Any:
        """The outcome of a write. If the caller is cancelled, the write goes out all the same, if it has not yet."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def told(value: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        self.host.writer.submit(make(told))
        return await future

    async def fetch(self, entry: Entry, key: uuid.UUID) -> Entry:
        """The checkpoint with its value, which was too large to load with the others."""
        with self.branches.busy():
            value = await self.host.reader.checkpoint(self.claimed.task_id, key)
        return entry._replace(value=value, left_behind=False)

    def warn(self, message: str, *arguments: object) -> None:
        """Log something about this run that its author should know."""
        claimed = self.claimed
        message = f"task %s (%s): {message}"
        logger.warning(message, claimed.task_id, claimed.task_name, *arguments, extra=claimed.log_fields)

    async def park(self, parked: PendingWait) -> Stored:
        """Block on a durable wait. It is resolved here only while other branches keep the run from suspending."""
        await self.enter()
        parked.called_at = time.monotonic()
        self.parked[parked.future] = parked
        try:
            if self._register_timer is None and not self._only_root():
                self._register_timer = self._loop.call_later(REGISTER_AFTER, self._start_registering)
            return await self.branches.wait(parked.future)
        finally:
            self.parked.pop(parked.future, None)

    def _only_root(self) -> bool:
        return len(self.branches.tasks) == 1

    def _quiescent(self) -> None:
        if not self._going_on():
            return
        self.signal = Suspended()
        self.host.start_task(self._unwind("suspended"), "durable:suspend")

    def _stop_timers(self) -> None:
        for timer in (self._register_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()
        self._register_timer = self._poll_timer = None

    def _start_registering(self) -> None:
        self._register_timer = None
        if self._going_on() and self.parked:
            self.host.start_task(self._register(), "durable:register")

    async def _register(self) -> None:
        fresh = [parked for parked in self.parked.values() if not parked.registered]
        if fresh:
            self._waited = True
            for parked in fresh:
                parked.registered = True
            claimed = self.claimed
            specs = [parked.spec() for parked in fresh]
            try:
                rows = await self._written(
                    lambda told: Write(Kind.WAITS, claimed.task_id, claimed.fence, told, None, (), specs)
                )
            except LeaseLost:
                self.take_away(LeaseLost())
                return
            due = {row.key: row.due_at for row in rows}
            for parked in fresh:
                parked.due_at = due.get(parked.key, parked.due_at)
        await self.poll()

    async def poll(self) -> None:
        """Look whether waits that are registered have been resolved, and let their branches go on."""
        if not self._going_on():
            return
        now = self.now()
        registered = {parked.key: parked for parked in self.parked.values() if parked.registered}
        for parked in list(registered.values()):
            if parked.kind == "sleep" and parked.due_at is not None and parked.due_at <= now:
                registered.pop(parked.key)
                self._settle(parked, Stored("completed", None))
        others = [key for key, parked in registered.items() if parked.kind != "sleep"]
        if others:
            stored = await self.host.reader.resolved(self.claimed.task_id, others)
            for key, entry in stored.items():
                self._settle(registered[key], entry)
        if self._going_on() and self.parked:
            due = [parked.due_at for parked in self.parked.values() if parked.due_at is not None]
            delay = 1.0
            if due:
                delay = min(delay, max(0.005, (min(due) - self.now()).total_seconds()))
            if any(not parked.registered for parked in self.parked.values()):
                delay = min(delay, REGISTER_AFTER)
            if self._poll_timer is not None:
                self._poll_timer.cancel()
            self._poll_timer = self._loop.call_later(delay, self._start_registering)

    def poll_soon(self) -> None:
        """A hint that something may have been resolved."""
        if self.parked and any(parked.registered for parked in self.parked.values()):
            self._start_registering()

    def clock_moved(self, by: float) -> None:
        """The database's clock was moved by so many seconds, and the beginning of waits is that much longer ago."""
        for parked in self.parked.values():
            parked.called_at -= by
        self.poll_soon()

    def _settle(self, parked: PendingWait, entry: Stored) -> None:
        if not parked.future.done():
            parked.future.set_result(entry)
