"""The runs of a worker: started, resumed from what is recorded, looked after, and followed up on when they end."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import uuid
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row

from ..concurrency import task_factory
from ..concurrency.threads import StepThreads
from ..context import TaskContext
from ..context.sync import SyncTaskContext, run_in_thread
from ..current import enter
from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..execution.hooks import around_task
from ..execution.journal import EMPTY_JOURNAL, Entry, Journal
from ..execution.reader import Reader, persistently
from ..execution.run import Run
from ..execution.writer import Writer
from ..signals import LeaseLost, TaskCancelled
from ..statements import checkpoints, claiming, waits
from ..statements.claiming import ClaimedRun
from .background import BackgroundTasks
from .registration import Registration

if TYPE_CHECKING:
    from ..client import Durable

logger = logging.getLogger("durable_sa")


class Executor:
    """The runs in progress, and their host. Calls `freed` whenever a slot becomes free."""

    def __init__(
        self,
        durable: Durable[Any],
        channel: DedicatedConnection,
        registration: Registration,
        writer: Writer,
        reader: Reader,
        clock: LocalClock,
        services: BackgroundTasks,
        *,
        threads: int,
        freed: Callable[[], None],
    ) -> None:
        self.writer = writer
        self.reader = reader
        self.clock = clock
        self.threads = StepThreads(threads)
        self.telemetry = durable.telemetry
        self.hooks = durable.hooks
        self.max_payload_bytes = durable.max_payload_bytes
        self.state: Any = durable.state
        """What tasks find as `ctx.state`."""
        self.idle = asyncio.Event()
        """Set while there is no run, and none is about to start."""
        self.idle.set()
        self.ending: set[tuple[uuid.UUID, int]] = set()
        """Runs whose outcome is still to be written."""
        self._durable = durable
        self._channel = channel
        self._registration = registration
        self._background = services
        self._freed = freed
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._runs: dict[tuple[uuid.UUID, int], Run] = {}
        self._expected: list[ClaimedRun] = []
        """Claimed, to be started in the next turn of the event loop."""
        self._hurrying = False
        self._freeing = False

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def slots_taken(self) -> int:
        """By runs in progress, and by those that are about to start."""
        return len(self._runs) + len(self._expected)

    def held(self) -> list[tuple[uuid.UUID, int]]:
        """Tasks and fences of all that was claimed and is not settled."""
        return [*self._runs, *self.ending, *(item.key for item in self._expected)]

    def queue_names(self) -> list[str]:
        """The queue of each run in progress. May be asked for by any thread."""
        return [run.claimed.queue_name for run in list(self._runs.values())]

    def expect(self, claimed: list[ClaimedRun]) -> None:
        """Keep slots for runs until :meth:`start_expected`."""
        self._expected.extend(claimed)
        self.idle.clear()

    def start_expected(self) -> None:
        """Start what is expected."""
        expected, self._expected = self._expected, []
        self.start(expected)

    def start(self, claimed: list[ClaimedRun]) -> None:
        """Start runs: at once those of which nothing can be recorded, the others when it has been loaded."""
        resumed: list[ClaimedRun] = []
        for item in claimed:
            if item.fresh:
                self._start(item, EMPTY_JOURNAL)
            else:
                resumed.append(item)
                self._reserve(item)
        if resumed:
            self.start_task(self._resume(resumed), "durable:resume")
        if self._hurrying:
            self.release()

    def _reserve(self, item: ClaimedRun) -> None:
        """Count a run that is still being loaded."""
        self._runs[item.key] = Run(item, self._durable.tasks[item.task_name], self, EMPTY_JOURNAL)
        self.idle.clear()

    async def _resume(self, claimed: list[ClaimedRun]) -> None:
        """Load what was recorded, with waits that have come to their end meanwhile, and start."""
        task_ids = [item.task_id for item in claimed]
        try:
            await persistently(lambda: self._channel.execute(waits.RESOLVE, {"task_ids": sorted(task_ids)}))
            # Waits first: one that somebody resolves in between is then found twice, instead of not at all.
            waiting = await persistently(lambda: self._channel.execute(checkpoints.LOAD_WAITS, {"task_ids": task_ids}))
            recorded = await persistently(
                lambda: self._channel.execute(checkpoints.LOAD_CHECKPOINTS, {"task_ids": task_ids})
            )
            wakers: Sequence[Row[Any]] = ()
            if self.telemetry is not None:
                wakers = await persistently(lambda: self._channel.execute(waits.WAKERS, {"task_ids": task_ids}))
        except Exception as error:  # noqa: BLE001 - one of them may be at fault
            if len(claimed) > 1:
                for item in claimed:
                    self.start_task(self._resume([item]), "durable:resume")
            elif (run := self._runs.get(claimed[0].key)) is not None:
                run.refuse(error)
            return
        entries: dict[uuid.UUID, dict[uuid.UUID, Entry]] = {task_id: {} for task_id in task_ids}
        for row in recorded:
            entries[row.task_id][row.key] = Entry._make(row[2:])
        open_waits: dict[uuid.UUID, list[tuple[uuid.UUID, Any]]] = {task_id: [] for task_id in task_ids}
        for row in waiting:
            open_waits[row.task_id].append((row.key, row.due_at))
        links = {row.task_id: row.carriers for row in wakers}
        for item in claimed:
            reserved = self._runs.get(item.key)
            if reserved is None or reserved.signal is not None or reserved.over:
                continue
            self._start(item, Journal(entries[item.task_id], open_waits[item.task_id]), links.get(item.task_id))

    def _start(self, item: ClaimedRun, journal: Journal, wakers: str | None = None) -> None:
        task = self._durable.tasks[item.task_name]
        run = Run(item, task, self, journal, wakers)
        self._runs[item.key] = run
        self.idle.clear()
        context: TaskContext[Any] = TaskContext(run, self._durable, self.state)
        try:
            arguments = (task.decode_params(item.params),) if task.takes_params else ()
        except Exception as error:  # noqa: BLE001 - what a row holds must not stop the rows beside it
            run.refuse(error)
            return
        inner = self._context.copy()
        if task.is_async:
            inner.run(enter, context)
            body = functools.partial(task.function, context, *arguments)
        else:
            sync_context: SyncTaskContext[Any] = SyncTaskContext(context)
            inner.run(enter, sync_context)
            body = functools.partial(run_in_thread, sync_context, task.function, arguments)
        hooks = self.hooks.around_task
        start = functools.partial(around_task, hooks, context, item.task_name, body) if hooks else body
        task_factory.ensure(self._loop)
        run.start(
            start() if self.telemetry is None else self.telemetry.execute(item, wakers, lambda: run.signal, start),
            inner,
        )

    @property
    def leased(self) -> bool:
        """Whether the worker's lease still holds by the local clock."""
        return self._registration.lease.valid

    def lease_lost(self) -> None:
        """The local deadline has passed."""
        self._registration.lose()

    def left_running(self) -> None:
        """Code of a run that others may have taken over does not end."""
        self._registration.left_running()

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside every run."""
        self._background.start_task(coroutine, name)

    def run_ended(self, claimed: ClaimedRun) -> None:
        """User code of the run has come to its end: its slot is free."""
        self.ending.add(claimed.key)
        self._runs.pop(claimed.key, None)
        if not self._runs and not self._expected:
            self.idle.set()
        if not self._freeing:
            # In the next turn: what the run has to write is sent first.
            self._freeing = True
            self._loop.call_soon(self._tell_freed)

    def _tell_freed(self) -> None:
        self._freeing = False
        self._freed()

    def outcome_stored(self, claimed: ClaimedRun, outcome: str, error: BaseException | None) -> None:
        """What became of the run is committed."""
        self.ending.discard(claimed.key)
        if outcome in ("failed", "retried") and error is not None:
            what = "failed" if outcome == "failed" else f"failed in attempt {claimed.attempt}"
            logger.info(
                "task %s (%s) %s: %s",
                claimed.task_id,
                claimed.task_name,
                what,
                type(error).__name__,
                extra=claimed.log_fields,
            )
        elif outcome == "lost":
            logger.info("task %s (%s) is no longer ours", claimed.task_id, claimed.task_name, extra=claimed.log_fields)
        if self.telemetry is not None:
            self.telemetry.ended(claimed.queue_name, claimed.task_name, outcome)
        if outcome in ("completed", "failed", "lost"):
            self._durable.task_changed(claimed.task_id)

    def gave_up(self, rows: Sequence[Row[Any]]) -> None:
        """Tasks have failed because too many workers were lost with them."""
        if self.telemetry is not None:
            for row in rows:
                self.telemetry.ended(row.queue_name, row.task_name, "failed")

    def release(self) -> None:
        """Give all runs back, also those that are still to come."""
        self._hurrying = True
        for run in list(self._runs.values()):
            run.release()

    def give_up(self) -> None:
        """Others may have taken all of them over."""
        self._expected.clear()
        for run in list(self._runs.values()):
            run.take_away(LeaseLost())

    async def check(self) -> None:
        """Take those away that are no longer this worker's."""
        held = list(self._runs.items())
        if not held:
            return
        rows = await self._channel.execute(
            claiming.RUNS_GONE,
            {"task_ids": [key[0] for key, _ in held], "fences": [key[1] for key, _ in held]},
        )
        states = {(row.task_id, row.fence): row.state for row in rows}
        for key, run in held:
            if key in states and not run.over:
                cancelled = states[key] in ("cancelled", None)
                run.take_away(TaskCancelled() if cancelled else LeaseLost())

    def poll(self) -> None:
        """Waits may have been resolved."""
        for run in list(self._runs.values()):
            run.poll_soon()

    def clock_moved(self, by: timedelta) -> None:
        """Somebody has set the database's clock."""
        for run in list(self._runs.values()):
            run.clock_moved(by.total_seconds())
