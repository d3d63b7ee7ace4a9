"""One run: user code under a fence, from its claim until it completes, fails, suspends or is taken away."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import time
import uuid
from collections.abc import Collection, Coroutine, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..concurrency.branches import Branch, current_branch
from ..concurrency.task_factory import BranchExit
from ..concurrency.threads import in_event_loop
from ..concurrency.tree import BranchTree
from ..errors import InvalidState, ReplayMismatch, TaskTimeout
from ..options import Replay
from ..serialization.failures import with_members
from ..signals import ControlFlow, LeaseLost, Suspended
from ..tasks import Task
from . import outcomes
from .calls import Call
from .conversation import Conversation
from .host import RunHost
from .journal import Entry, Journal
from .kept_lines import KeptLines
from .lines import Lines
from .publishing import Publications
from .streaming import Block
from .timeouts import AttemptLimit
from .waits import PendingWait, Stored, WaitSpec
from .writes import BlockValues, Kind, Values, Write

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun

ErrorT = TypeVar("ErrorT", bound=BaseException)

logger = logging.getLogger("durable_sa")

REGISTER_AFTER = 0.02
"""Seconds before a wait is stored by itself. Most runs suspend earlier, and store it together with the suspension."""

RAISED_BEFORE_PARKING = 5
"""How often a call raises the signal of a run that has ended, for code that swallows it, before it blocks for ever."""

LONGEST_POLL_DELAY = 1.0
SHORTEST_POLL_DELAY = 0.005


class Run:
    """The execution of one claimed run."""

    def __init__(
        self, claimed: ClaimedRun, task: Task[Any, Any], host: RunHost, journal: Journal, wakers: str | None = None
    ) -> None:
        self.claimed = claimed
        self.wakers = wakers
        """The trace contexts of what has woken the task."""
        self.task = task
        self.host = host
        self.journal = journal
        self.pending: dict[asyncio.Future[Any], PendingWait] = {}
        self.branches = BranchTree(on_quiescent=self._suspend)
        self.children: dict[uuid.UUID, Any] = {}
        """The tasks of the children that were spawned in this run; None for one that is not registered here."""
        # Most runs have none of the next ones, and the garbage collector works by the number of objects that are made.
        self._unawaited: dict[uuid.UUID, tuple[Any, Coroutine[Any, Any, Any]]] | None = None
        self._pauses: dict[asyncio.Future[None], asyncio.TimerHandle] | None = None
        self._kept_lines = None if host.keep_logs is None else self._keep_lines(host.keep_logs)
        self._lines: Lines | None = None
        self._open_streams: dict[str, Block | None] | None = None
        self._publications: Publications | None = None
        self.steps: dict[uuid.UUID, tuple[Call, float]] = {}
        """The steps and transactions in progress by their keys, with their starts on the monotonic clock."""
        self.signal: ControlFlow | None = None
        self.over = False
        self.mismatch: ReplayMismatch | None = None
        """The error that fails the run even if the task's code catches it."""
        self._timeouts: tuple[tuple[uuid.UUID, BaseException, asyncio.Task[Any] | None], ...] = ()
        """Keys of waits that have timed out, with the error, and the asyncio task in which it was raised.

        Also those of steps that have failed while they wrote streams.
        """
        self._waited = journal.waiting
        """True if waits of the task may be stored."""
        self._signals_raised = 0
        self._loop = asyncio.get_running_loop()
        self.conversation: Conversation | None = None
        """The messages that come to the run, once it has sent or received one."""
        self._register_timer: asyncio.TimerHandle | None = None
        self._poll_timer: asyncio.TimerHandle | None = None
        self.limit: AttemptLimit | None = None
        """The time that is left to the attempt, if the task has a timeout."""

    @property
    def unawaited(self) -> dict[uuid.UUID, tuple[Any, Coroutine[Any, Any, Any]]]:
        """The calls of the context that have not been awaited yet, each with its coroutine."""
        if self._unawaited is None:
            self._unawaited = {}
        return self._unawaited

    @property
    def lines(self) -> Lines:
        """The lines that the task has logged."""
        if self._lines is None:
            kept = self._kept_lines
            self._lines = Lines() if kept is None else Lines(kept.handle, kept.level)
        return self._lines

    @property
    def open_streams(self) -> dict[str, Block | None]:
        """The blocks of the streams that this run has open; None for one that is being opened."""
        if self._open_streams is None:
            self._open_streams = {}
        return self._open_streams

    @functools.cached_property
    def streamed(self) -> set[tuple[str, uuid.UUID]]:
        """Names of streams with the tries of steps that have written them."""
        return set()

    @functools.cached_property
    def stream_positions(self) -> dict[uuid.UUID, dict[str, int]]:
        """By the key of each step or block that has written streams: their names, with the last positions."""
        return {}

    def start(self, body: Coroutine[Any, Any, Any], context: contextvars.Context) -> None:
        """Start user code, whose outcome is written when it ends."""
        limit: AttemptLimit | None = None
        if (timeout := self.host.attempt_timeout(self.task)) is not None:
            writer = self.host.writer
            self.limit = limit = AttemptLimit(timeout, self.claimed, self.journal, writer, lambda: self.signal)
            body = limit.within(body)
        name = f"durable:{self.claimed.task_name}"
        root = self.branches.start(body, context=context, name=name, on_done=self._root_done)
        if limit is not None:
            limit.start(root)

    def refuse(self, error: BaseException) -> None:
        """Fail the run without starting it."""
        self.over = True
        self.host.run_ended(self.claimed)
        self._fail(error)

    def _going_on(self) -> bool:
        return self.signal is None and not self.over

    def take_away(self, signal: ControlFlow) -> None:
        """Cancel user code, steps included, because this worker has lost the run, which writes nothing more."""
        if self._going_on():
            self.signal = signal
            self.host.start_task(self._unwind("lost"), "durable:unwind")

    def release(self) -> None:
        """Cancel user code and give the task back, for another worker to go on from its checkpoints."""
        if self._going_on():
            self.signal = Suspended()
            self.host.start_task(self._unwind("released"), "durable:release")

    def time_out(self, error: TaskTimeout) -> None:
        """Cancel user code, and fail the attempt with `error`."""
        if self._going_on():
            self.signal = Suspended()
            self.host.start_task(self._unwind("timed out", error=error), "durable:time-out")

    def _suspend(self) -> None:
        if self._going_on():
            self.signal = Suspended()
            self.host.start_task(self._unwind("suspended"), "durable:suspend")

    def _root_done(self, root: asyncio.Task[Any]) -> None:
        self._stop_timers()
        if self.signal is not None:
            if not root.cancelled():
                root.exception()
            return
        if any(task is not root for task in self.branches.tasks) or (
            self._publications is not None and self._publications.pending
        ):
            self.signal = Suspended()
            self.host.start_task(self._unwind("ended", root), "durable:unwind")
        else:
            self._end(root)

    async def _unwind(
        self, reason: str, root: asyncio.Task[Any] | None = None, *, error: BaseException | None = None
    ) -> None:
        self._stop_timers()
        waits = [wait.spec() for wait in self.pending.values()] if reason == "suspended" else []
        abandoned = await self.branches.unwind()
        if abandoned:
            self.warn("does not end when it is cancelled; %d of its coroutines are left behind", len(abandoned))
            self.host.left_behind(self.claimed, abandoned, lost=isinstance(self.signal, LeaseLost))
        if self._publications is not None:
            if reason == "lost":
                self._publications.drop()
            # The outcome comes last, because it ends the fence.
            await self._publications.flush()
        if root is not None:
            self._end(root)
            return
        self._mark_over()
        self._drop_unawaited()  # they may have been meant for later
        if error is not None:
            self._fail(error)
        elif reason == "suspended" and self.mismatch is not None:
            self._fail(self.mismatch)
        elif reason == "suspended":
            if self.limit is not None:
                self.limit.record()
            outcomes.suspend(self.host, self.claimed, self.task, waits, waited=self._waited)
        elif reason == "released":
            outcomes.release(self.host, self.claimed, self.task, waited=self._waited)
        else:
            self.host.outcome_stored(self.claimed, "lost", self.signal)

    def _mark_over(self) -> None:
        if not self.over:
            self.over = True
            if self._lines is not None:
                self._lines.release()
            if self._kept_lines is not None:
                self._kept_lines.finish(lost=isinstance(self.signal, LeaseLost))
            for block in () if self._open_streams is None else self._open_streams.values():
                if block is not None:
                    block.abandon()
            self.host.run_ended(self.claimed)

    def _end(self, root: asyncio.Task[Any]) -> None:
        """Write the outcome of a root that has returned or raised by itself."""
        self._mark_over()
        if root.cancelled():
            self._fail(asyncio.CancelledError("the task cancelled itself"))
            return
        error = root.exception()
        if self.mismatch is not None:
            self._fail(self.mismatch)
            return
        if error is not None:
            if type(error) is BranchExit and error.__cause__ is not None:
                error = error.__cause__
            self._fail(error)
            return
        if self._unawaited and (forgotten := self._drop_unawaited()):
            self._fail(
                InvalidState(
                    f"The call of {', '.join(forgotten[:10])}",
                    "made and never awaited, so it had no effect",
                    "Await the coroutine that each method of the context returns, or pass it to asyncio.gather.",
                )
            )
            return
        if names := self.journal.unused_names():
            recorded = ", ".join(names[:10])
            self.warn("completed without using its records of: %s. Was its code changed?", recorded)
        try:
            outcomes.complete(self.host, self.claimed, self.task, root.result(), waited=self._waited)
        except Exception as refusal:  # noqa: BLE001 - to encode a result is to call methods of the application's types
            self._fail(refusal)

    def _drop_unawaited(self) -> list[str]:
        """Close the coroutines of calls that were never awaited, and return what they are calls of.

        A coroutine that was cancelled or closed before it began counts as awaited, as it does for Python.
        """
        forgotten: list[str] = []
        for call, coroutine in (self._unawaited or {}).values():
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()  # otherwise Python warns as well
                forgotten.append(f"{call.kind} {call.name!r}")
        self._unawaited = None
        return forgotten

    def _fail(self, error: BaseException) -> None:
        timeouts = self._failing_timeouts(error) if self._timeouts else ()
        outcomes.fail(self.host, self.claimed, self.task, error, waited=self._waited, timeouts=timeouts)

    @property
    def replay(self) -> Replay | None:
        """The task's own rule for steps that are recorded with other arguments."""
        return self.task.replay

    def timed_out(self, key: uuid.UUID, error: ErrorT) -> ErrorT:
        """Note the error of a wait, for its record to be deleted if the error fails the run. Returns the error."""
        self._timeouts += ((key, error, asyncio.current_task()),)
        return error

    def keep_timeouts(self, keys: Collection[uuid.UUID]) -> None:
        """Keep the records of waits that have timed out, whatever fails the run: a race is decided once."""
        self._timeouts = tuple(timeout for timeout in self._timeouts if timeout[0] not in keys)

    def hold_back(self, keys: Collection[uuid.UUID], *, stored: bool) -> None:
        """Mark the waits of these keys as stored, so that no statement stores them, or as not stored.

        While a race is being recorded, no other statement may store its waits, because the race's own statement deletes
        those of the losers.
        """
        for wait in self.pending.values():
            if wait.key in keys:
                wait.registered = stored

    def is_parked(self, key: uuid.UUID) -> bool:
        """Return whether code of the run is blocked on the wait of this key."""
        return any(wait.key == key for wait in self.pending.values())

    def _failing_timeouts(self, error: BaseException) -> list[uuid.UUID]:
        """Return the keys of the waits that have failed the run, which the next attempt is to wait for anew.

        They are those whose `TaskTimeout` the root has raised; beside one of these, also those that have ended other
        branches: of several waits that time out at once in a `gather`, it raises the first.
        """
        raised = {id(member) for member in with_members(error)}
        failing = [key for key, timeout, _ in self._timeouts if id(timeout) in raised]
        if not failing or not self.task.is_async:
            return failing
        ended = [
            key
            for key, timeout, branch in self._timeouts
            if branch is not None and branch.done() and not branch.cancelled() and branch.exception() is timeout
        ]
        return list({*failing, *ended})

    def now(self) -> datetime:
        """Return the database's time, or an earlier one by no more than the delay of its last reply."""
        return max(self.claimed.now, self.host.clock.now())

    def branch(self) -> Branch:
        """Return the branch of the run that the calling code is in.

        Raises:
            InvalidState: the calling code is not in the run: outside of tasks, in another run or another event loop.
        """
        try:
            branch = current_branch()
        except LookupError:
            self._refuse_outsider()
        if branch.owner is not self.branches or self.in_another_loop():
            self._refuse_outsider()
        return branch

    def in_another_loop(self) -> bool:
        """Return whether the calling code is in an event loop of its own, as in a step that calls `asyncio.run`."""
        return not self.branches.is_in_thread() and in_event_loop()

    async def enter(self) -> None:
        """Let a durable call begin, unless the run is suspended, cancelled or lost.

        Raises:
            ControlFlow: the run has been taken away.
            InvalidState: the run has ended by itself.
        """
        if self.signal is None and not self.over and self.host.leased:
            return
        await self._refuse()

    def _refuse_outsider(self) -> NoReturn:
        raise InvalidState(
            f"The context of task {self.claimed.task_id}",
            "used outside of its run" if not self.over else "used after the end of its run",
            "Each run has a context of its own: use it in the task's own code, in its steps, and nowhere else.",
        )

    async def _refuse(self) -> NoReturn:
        if self.signal is None and self.over:
            self._refuse_outsider()
        if self.signal is None:
            self.host.lease_lost()
        self._signals_raised += 1
        if self._signals_raised > RAISED_BEFORE_PARKING:
            # Code that swallows the signal and calls again would spin, so it blocks here until it is left behind.
            await self._loop.create_future()
        raise self.signal if self.signal is not None else LeaseLost()

    async def write(self, kind: Kind, key: uuid.UUID, values: Values, *, size: int = 0) -> Stored | None:
        """Write under the fence, and return None, or else what an earlier run has stored under the key."""
        telemetry = self.host.telemetry
        began = 0.0 if telemetry is None else time.perf_counter()
        try:
            stored: Stored | None = await self._written(kind, values, key=key, size=size)
        except LeaseLost:
            self.take_away(LeaseLost())
            raise
        if telemetry is not None:
            telemetry.checkpointed(self.claimed, time.perf_counter() - began)
        if self.signal is not None:
            await self._refuse()
        return stored

    async def _written(
        self,
        kind: Kind,
        values: Values,
        *,
        key: uuid.UUID | None = None,
        waits: Sequence[WaitSpec] = (),
        size: int = 0,
    ) -> Any:
        """Return the outcome of a write. It is sent even if the caller is cancelled meanwhile."""
        future: asyncio.Future[Any] = self._loop.create_future()
        on_written = functools.partial(_settle_future, future)
        claimed = self.claimed
        self.host.writer.submit(Write(kind, claimed.task_id, claimed.fence, on_written, values, key, waits, size))
        return await future

    def publish(self, name: str, text: str) -> None:
        """Have a value of the task written, unless the calling branch repeats what an earlier run has written."""
        replays = not (self.branch().live or self.journal.used_up)
        if self._publications is None:
            self._publications = Publications(
                self.claimed,
                self.host.writer,
                on_lost=lambda: self.take_away(LeaseLost()),
                warn=self.warn,
                follows_loss=lambda: self.host.reader.follows_loss(self.claimed.task_id),
                start_task=self.host.start_task,
            )
        if replays:
            self._publications.replay(name, text)
        else:
            self._publications.publish(name, text)

    def _keep_lines(self, level: int) -> KeptLines:
        writer, on_lost = self.host.writer, lambda: self.take_away(LeaseLost())
        return KeptLines(self.claimed, writer, level, now=self.now, on_lost=on_lost, warn=self.warn)

    def stream_block(self, block_id: uuid.UUID, values: BlockValues, position: int) -> Block:
        """Return a block that was opened, with the last position of its stream."""
        writer, on_lost = self.host.writer, lambda: self.take_away(LeaseLost())
        return Block(self.claimed, writer, block_id, values, position, on_lost=on_lost)

    async def fetch(self, entry: Entry, key: uuid.UUID) -> Entry:
        """Return a checkpoint with its value, which was too large to load with the others."""
        with self.branches.busy():
            value = await self.host.reader.checkpoint(self.claimed.task_id, key)
        return entry._replace(value=value, left_behind=False)

    def warn(self, message: str, *arguments: object) -> None:
        """Log a warning about the run for the author of its task."""
        claimed = self.claimed
        message = f"task %s (%s): {message}"
        logger.warning(message, claimed.task_id, claimed.task_name, *arguments, extra=claimed.log_fields)

    def converse(self) -> None:
        """Begin a conversation, with the first message that the run sends or receives."""
        if self.conversation is None:
            self.conversation = Conversation()

    def message_came(self) -> bool:
        """Note that a message may have come. Return True if its worker has nothing more to do for it.

        That is so while the run goes on and has stored no waits: after each wait that is stored, the run or its worker
        looks for messages anyway.
        """
        if self.conversation is None or not self._going_on():
            return False
        self.conversation.arrive()
        return not self._waited

    async def park(self, wait: PendingWait) -> Stored:
        """Block on a durable wait. It is resolved here only while other branches keep the run from suspending."""
        await self.enter()
        wait.called_at = time.monotonic()
        self.pending[wait.future] = wait
        try:
            if self._register_timer is None and len(self.branches.tasks) > 1:
                self._register_timer = self._loop.call_later(REGISTER_AFTER, self._start_registering)
            return await self.branches.wait(wait.future)
        finally:
            self.pending.pop(wait.future, None)

    async def pause(self, seconds: float) -> None:
        """Wait in memory, by a clock that `clock_moved` moves."""
        over: asyncio.Future[None] = self._loop.create_future()
        pauses = self._pauses = {} if self._pauses is None else self._pauses
        pauses[over] = self._loop.call_later(seconds, _end_pause, over)
        try:
            await over
        finally:
            pauses.pop(over).cancel()

    def _stop_timers(self) -> None:
        for timer in (self._register_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()
        self._register_timer = self._poll_timer = None
        if self.limit is not None:
            self.limit.stop()

    def _start_registering(self) -> None:
        self._register_timer = None
        if self._going_on() and self.pending:
            self.host.start_task(self._register(), "durable:register")

    async def _register(self) -> None:
        """Store the waits that are not stored yet, then look at all of them."""
        new = [wait for wait in self.pending.values() if not wait.registered]
        if new:
            self._waited = True
            for wait in new:
                wait.registered = True
            try:
                rows = await self._written(Kind.WAITS, None, waits=[wait.spec() for wait in new])
            except LeaseLost:
                self.take_away(LeaseLost())
                return
            due = {row.key: row.due_at for row in rows}
            for wait in new:
                wait.due_at = due.get(wait.key, wait.due_at)
        await self.poll()

    async def poll(self) -> None:
        """Let the branches of stored waits that have been resolved go on, and poll once more when the next is due."""
        if not self._going_on():
            return
        now = self.now()
        others: dict[uuid.UUID, PendingWait] = {}
        for wait in list(self.pending.values()):
            if not wait.registered:
                continue
            if wait.kind != "sleep":
                others[wait.key] = wait
            elif wait.due_at is not None and wait.due_at <= now:
                _resolve(wait, Stored("completed", None))
        if others:
            messages = any(wait.kind == "message" for wait in others.values())
            stored = await self.host.reader.resolved(self.claimed.task_id, list(others), messages=messages)
            for key, entry in stored.items():
                _resolve(others[key], entry)
            for wait in others.values():
                if wait.kind != "race message" or wait.future.done():
                    continue
                if await self.host.reader.with_message((self.claimed.task_id, wait.name)):
                    _resolve(wait, Stored("available", None))
        if self._going_on() and self.pending:
            if self._poll_timer is not None:
                self._poll_timer.cancel()
            self._poll_timer = self._loop.call_later(self._poll_delay(), self._start_registering)

    def _poll_delay(self) -> float:
        delay = LONGEST_POLL_DELAY
        due = [wait.due_at for wait in self.pending.values() if wait.due_at is not None]
        if due:
            delay = min(delay, max(SHORTEST_POLL_DELAY, (min(due) - self.now()).total_seconds()))
        if any(not wait.registered for wait in self.pending.values()):
            delay = min(delay, REGISTER_AFTER)
        return delay

    def poll_soon(self) -> None:
        """Look at stored waits at once, because some may have been resolved."""
        if self.pending and any(wait.registered for wait in self.pending.values()):
            self._start_registering()

    def clock_moved(self, by: float) -> None:
        """Count waits from an earlier time, because the database's clock was moved forward by so many seconds."""
        for wait in self.pending.values():
            wait.called_at -= by
        pauses = self._pauses or {}
        for over, timer in pauses.items():
            timer.cancel()
            pauses[over] = self._loop.call_at(timer.when() - by, _end_pause, over)
        self.poll_soon()


def _end_pause(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _settle_future(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _resolve(wait: PendingWait, stored: Stored) -> None:
    if not wait.future.done():
        wait.future.set_result(stored)
