"""One run: user code under a fence, from its claim until it completes, fails, suspends or is taken away."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from .branches import Branch, Branches, current_branch
from .clock import LocalClock
from .codec import check_size
from .errors import DurableError
from .failures import encode_error, is_retryable
from .hooks import HookChain
from .ids import new_id
from .journal import Entry, Journal
from .signals import ControlFlow, LeaseLost, Suspended
from .task_factory import BranchExit
from .writer import Kind, Stored, WaitSpec, Write, Writer

if TYPE_CHECKING:
    from .reader import Reader
    from .tasks import Task
    from .telemetry import Telemetry

logger = logging.getLogger("durable_sa")

REGISTER_AFTER = 0.02
"""Seconds that a wait is held back from the database: most runs suspend before, and store it with that."""

_RAISED_BEFORE_PARKING = 5


class Host(Protocol):
    """What a run needs of its worker."""

    writer: Writer
    reader: Reader
    executor: ThreadPoolExecutor
    clock: LocalClock
    hooks: HookChain
    telemetry: Telemetry | None
    max_payload_bytes: int

    @property
    def leased(self) -> bool:
        """Whether the worker's lease still holds by the local clock."""
        ...

    def run_ended(self, run: Run) -> None:
        """User code of the run has come to its end: its slot is free."""

    def outcome_stored(self, run: Run, outcome: str, error: BaseException | None) -> None:
        """What became of the run is committed."""

    def lease_lost(self) -> None:
        """The local deadline has passed."""

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside every run."""


@dataclass(slots=True, eq=False)
class Parked:
    """A durable wait that user code is blocked on."""

    future: asyncio.Future[Stored]
    key: uuid.UUID
    kind: str
    name: str
    event_name: str | None = None
    child_task_id: uuid.UUID | None = None
    due_at: datetime | None = None
    delay: float | None = None
    called_at: float = 0.0
    registered: bool = False

    def spec(self) -> WaitSpec:
        """The wait as it is stored now; time that has passed since the call is taken off."""
        delay = None
        if self.due_at is None and self.delay is not None:
            delay = max(0.0, self.delay - (time.monotonic() - self.called_at))
        return WaitSpec(self.key, self.kind, self.name, self.event_name, self.child_task_id, self.due_at, delay)


class Claimed(NamedTuple):
    """What a claim says about a run, in the order of the statement's columns."""

    task_id: uuid.UUID
    run_id: uuid.UUID
    queue_name: str
    priority: int
    available_at: datetime
    task_name: str
    params: str | None
    headers: str | None
    attempt: int
    fence: int
    cancel_at: datetime | None
    now: datetime

    @property
    def log_fields(self) -> dict[str, Any]:
        """Which run a line in the log is about, as attributes of its record."""
        return {
            "task_id": str(self.task_id),
            "task_name": self.task_name,
            "run_id": str(self.run_id),
            "attempt": self.attempt,
            "queue_name": self.queue_name,
        }

    @property
    def fresh(self) -> bool:
        """Whether nothing can have been recorded yet: nobody had it before."""
        return self.fence == 1


class Run:
    """The execution of one claimed run."""

    def __init__(
        self, claimed: Claimed, task: Task[Any, Any], host: Host, journal: Journal, wakers: str | None = None
    ) -> None:
        self.claimed = claimed
        self.wakers = wakers
        """The trace contexts of what it was woken by."""
        self.task = task
        self.host = host
        self.journal = journal
        self.parked: dict[asyncio.Future[Any], Parked] = {}
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

    @property
    def key(self) -> tuple[uuid.UUID, int]:
        """What no other run has."""
        return self.claimed.task_id, self.claimed.fence

    def start(self, body: Coroutine[Any, Any, Any], context: contextvars.Context) -> None:
        """Start user code; what becomes of it is written when it ends."""
        root = self.branches.start(body, context=context, name=f"durable:{self.claimed.task_name}")
        root.add_done_callback(self._root_done)

    def refuse(self, error: BaseException) -> None:
        """Fail the run without starting it."""
        self.over = True
        self.host.run_ended(self)
        self._write_failure(error)

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
        if root is not None:
            self._end(root)
            return
        self._over()
        if reason == "suspended":
            self._submit(Kind.SUSPENSION, (self._waited,), waits=waits, outcome="suspended")
        elif reason == "released":
            error = '{"name":"Released","message":"the worker shut down and gave the run back"}'
            self._submit(Kind.RELEASE, (error, new_id()), outcome="released")
        else:
            self.host.outcome_stored(self, "lost", None)

    def _over(self) -> None:
        if not self.over:
            self.over = True
            self.host.run_ended(self)

    def _end(self, root: asyncio.Task[Any]) -> None:
        """The root has returned or raised by itself: that is the outcome."""
        self._over()
        if root.cancelled():
            self._write_failure(asyncio.CancelledError("the task cancelled itself"))
            return
        error = root.exception()
        if error is not None:
            cause = error.__cause__ if isinstance(error, BranchExit) else error
            self._write_failure(cause or error)
            return
        if names := self.journal.unused_names():
            logger.warning(
                "task %s (%s) completed without using what is recorded for: %s. Was its code changed?",
                self.claimed.task_id,
                self.claimed.task_name,
                ", ".join(names[:10]),
                extra=self.claimed.log_fields,
            )
        try:
            output = self.task.output_codec.encode(root.result(), f"the output of task {self.claimed.task_name!r}")
            check_size(output, self.host.max_payload_bytes, f"the output of task {self.claimed.task_name!r}")
        except DurableError as refusal:
            self._write_failure(refusal)
            return
        self._submit(Kind.COMPLETION, (output, self._waited), size=len(output), outcome="completed")

    def _write_failure(self, error: BaseException) -> None:
        values = (encode_error(error), is_retryable(error, self.task.no_retry_on), new_id(), self._waited)
        self._submit(Kind.FAILURE, values, size=len(values[0]), outcome="failed", error=error)

    def _submit(
        self,
        kind: Kind,
        values: tuple[Any, ...] = (),
        *,
        waits: list[WaitSpec] | None = None,
        size: int = 0,
        outcome: str,
        error: BaseException | None = None,
    ) -> None:
        claimed = self.claimed
        told = functools.partial(self._told, kind, outcome, error)
        self.host.writer.submit(Write(kind, claimed.task_id, claimed.fence, told, None, values, waits or (), size))

    def _told(
        self, kind: Kind, outcome: str, error: BaseException | None, stored: Any, refusal: BaseException | None
    ) -> None:
        """What became of the write that ends the run."""
        if refusal is None:
            again = kind is Kind.FAILURE and stored.state != "failed"
            self.host.outcome_stored(self, "retried" if again else outcome, error)
        elif isinstance(refusal, LeaseLost):
            self.host.outcome_stored(self, "lost", None)
        elif kind is Kind.FAILURE:
            logger.error(
                "the failure of task %s cannot be stored",
                self.claimed.task_id,
                exc_info=refusal,
                extra=self.claimed.log_fields,
            )
        else:
            self._write_failure(refusal)

    def now(self) -> datetime:
        """The database's time, or a little before."""
        return max(self.claimed.now, self.host.clock.now())

    def branch(self) -> Branch:
        """Where in the run the calling code is."""
        return current_branch()

    async def enter(self) -> None:
        """The gate before every durable call: nothing more happens in a run that is suspended, cancelled or lost."""
        if self.signal is None and self.host.leased:
            return
        await self._refuse()

    async def _refuse(self) -> NoReturn:
        if self.signal is None:
            self.host.lease_lost()
        self._ignored += 1
        if self._ignored > _RAISED_BEFORE_PARKING:
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

    async def park(self, parked: Parked) -> Stored:
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

    def _settle(self, parked: Parked, entry: Stored) -> None:
        if not parked.future.done():
            parked.future.set_result(entry)
