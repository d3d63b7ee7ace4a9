"""The executor: starts the runs of a worker, resumes them from their checkpoints, and takes note of their end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
import uuid
import weakref
from collections.abc import Callable, Collection, Coroutine, Sequence
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from ..app import App
from ..concurrency import task_factory
from ..concurrency.blocking import AnyTask
from ..concurrency.threads import StepThreads
from ..context import TaskContext
from ..context.sync import SyncTaskContext, run_in_thread
from ..current import enter
from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..execution.hooks import around_task, task_failed
from ..execution.journal import EMPTY_JOURNAL, Entry, Journal
from ..execution.reader import Reader
from ..execution.run import Run
from ..execution.writer import Writer
from ..logs import FIELDS
from ..policies import SUSPECT_AFTER
from ..serialization.failures import encode_error
from ..serialization.redaction import loggable, message, payload_redactor
from ..signals import LeaseLost, TaskCancelled
from ..statements import checkpoints, claiming, waits
from ..statements.claiming import ClaimedRun
from ..tasks import Task
from .agenda import Agenda
from .background import BackgroundTasks
from .endings import Endings
from .minutes import Minutes
from .registration import Registration
from .slots import Slots

logger = logging.getLogger("durable_sa")

_OVERSIZED = 7
"""The column of `LOAD_JOURNALS` that says if a value was too large to load, and is null for waits.

Columns are read by number, which takes half of the time.
"""


class Executor:
    """Runs claimed tasks: `start` takes them, `_start` makes the call of each function, `Run.start` begins it.

    It is the host of its runs (`RunHost`): what they need of the worker, they find here.
    """

    def __init__(
        self,
        app: App,
        connection: DedicatedConnection,
        registration: Registration,
        clock: LocalClock,
        background: BackgroundTasks,
        agenda: Agenda,
        slots: Slots,
        writer: Writer,
        endings: Endings,
        minutes: Minutes,
        *,
        on_task_ended: Callable[[uuid.UUID], None],
    ) -> None:
        self.writer = writer
        self.reader = Reader(connection)
        self.clock = clock
        self.threads = StepThreads(max(slots.concurrency, 4))
        self.telemetry = app.telemetry
        self.minutes = minutes
        self.hooks = app.hooks
        self.max_payload_bytes = app.max_payload_bytes
        self.keep_logs = app.keep_logs
        self.state: Any = None
        """The value of `ctx.state`."""
        self._app = app
        self._connection = connection
        self._registration = registration
        self._background = background
        self._agenda = agenda
        self._slots = slots
        self._endings = endings
        self._on_task_ended = on_task_ended
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._left_behind: weakref.WeakKeyDictionary[AnyTask, ClaimedRun] = weakref.WeakKeyDictionary()
        self._releasing = False
        self._freeing = False

    @property
    def busy(self) -> bool:
        """True while runs are in progress."""
        return bool(self._slots.runs)

    def start_reserved(self) -> None:
        """Start the runs for which slots are reserved."""
        reserved, self._slots.starting = self._slots.starting, []
        self.start(reserved)

    def start(self, claimed: list[ClaimedRun]) -> None:
        """Start runs: the first ones of their tasks at once, the others when their journals have been loaded."""
        task_factory.ensure(self._loop)
        resumed: list[ClaimedRun] = []
        for item in claimed:
            if item.fresh:
                self._start(item, EMPTY_JOURNAL)
            else:
                resumed.append(item)
                # It holds its slot while the journal is being loaded.
                self._slots.take(Run(item, self._app.tasks[item.task_name], self, EMPTY_JOURNAL))
        if resumed:
            self.start_task(self._resume(resumed), "durable:resume")
        if self._releasing:
            self.release()

    def give_back(self, claimed: list[ClaimedRun]) -> None:
        """Release runs that have not been started."""
        for item in claimed:
            run = Run(item, self._app.tasks[item.task_name], self, EMPTY_JOURNAL)
            self._slots.take(run)
            run.release()

    async def _resume(self, claimed: list[ClaimedRun]) -> None:
        """Load the journals, after resolving the waits that are over, and start."""
        task_ids = [item.task_id for item in claimed]
        try:
            rows = await self._load(task_ids)
            wakers: Sequence[Row[Any]] = ()
            if self.telemetry is not None:
                wakers = await self.reader.execute(waits.WAKERS, {"task_ids": task_ids})
        except Exception as error:  # noqa: BLE001 - the row of one task may be at fault: each is tried alone
            if len(claimed) > 1:
                for item in claimed:
                    self.start_task(self._resume([item]), "durable:resume")
            elif (run := self._slots.runs.get(claimed[0].key)) is not None:
                run.refuse(error)
            return
        entries: dict[uuid.UUID, dict[uuid.UUID, Entry]] = {task_id: {} for task_id in task_ids}
        open_waits: dict[uuid.UUID, list[tuple[uuid.UUID, Any]]] = {task_id: [] for task_id in task_ids}
        racing: set[tuple[uuid.UUID, uuid.UUID]] = set()
        for row in rows:
            if row[_OVERSIZED] is not None:
                entries[row[0]][row[1]] = Entry._make(row[2:8])
                continue
            open_waits[row.task_id].append((row.key, row.due_at))
            if row.kind == "race message":
                racing.add((row.task_id, row.key))
        links = {row.task_id: row.carriers for row in wakers}
        task_factory.ensure(self._loop)
        for item in claimed:
            reserved = self._slots.runs.get(item.key)
            if reserved is None or reserved.signal is not None or reserved.over:
                continue
            racing_keys = {key for task_id, key in racing if task_id == item.task_id} if racing else ()
            journal = Journal(entries[item.task_id], open_waits[item.task_id], racing_keys)
            self._start(item, journal, links.get(item.task_id))

    async def _load(self, task_ids: list[uuid.UUID]) -> list[Any]:
        """Return the records and the waits of these tasks, once the waits that are over have been resolved."""
        rows: list[Any] = list(await self.reader.execute(checkpoints.LOAD_JOURNALS, {"task_ids": task_ids}))
        if waiting := {row[0] for row in rows if row[_OVERSIZED] is None}:
            parameters = {"task_ids": sorted(waiting)}
            await self.reader.execute(waits.RESOLVE, parameters)
            rows = [row for row in rows if row.task_id not in waiting]
            rows += await self.reader.execute(checkpoints.LOAD_JOURNALS, parameters)
        return rows

    def _start(self, item: ClaimedRun, journal: Journal, wakers: str | None = None) -> None:
        task = self._app.tasks[item.task_name]
        run = Run(item, task, self, journal, wakers)
        self._slots.take(run)
        context: TaskContext[Any] = TaskContext(run, cast("Any", self._app), self.state)
        try:
            arguments = (task.decode_params(item.params),) if task.takes_params else ()
        except Exception as error:  # noqa: BLE001 - the params of one task must not keep the others from starting
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
        run.start(
            start() if self.telemetry is None else self.telemetry.execute(item, wakers, lambda: run.signal, start),
            inner,
        )
        self._endings.run_begins(run)

    def task(self, name: str) -> Task[Any, Any] | None:
        """Return the task that is registered under a name, if there is one."""
        return self._app.tasks.get(name)

    @property
    def leased(self) -> bool:
        """True while the worker's lease holds by the local clock."""
        return self._registration.lease.valid

    @property
    def has_room(self) -> bool:
        """True while most slots are free."""
        return self._slots.mostly_free

    def lease_lost(self) -> None:
        """Register anew: the lease has ended by the local clock."""
        self._registration.lose()

    def left_behind(self, claimed: ClaimedRun, tasks: Sequence[AnyTask], *, lost: bool) -> None:
        """Remember code that ignores its cancellation. Of a lost run, it ends the process, if the worker is set to."""
        self._left_behind.update(dict.fromkeys(tasks, claimed))
        if lost:
            self._registration.left_running()

    def attempt_timeout(self, task: Task[Any, Any]) -> float | None:
        """Return the seconds in memory after which an attempt of a task fails, if there is a limit."""
        return self._endings.attempt_timeout(task)

    def thread_abandoned(self, claimed: ClaimedRun, thread: threading.Thread) -> None:
        """Count the thread of a `def` run that executes code after the end of the run."""
        self._endings.thread_abandoned(claimed, thread)

    def unended(self) -> list[ClaimedRun]:
        """Return the runs whose code ignores its cancellation. Safe to call from any thread."""
        return list({run.key: run for task, run in list(self._left_behind.items()) if not task.done()}.values())

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside of every run."""
        self._background.start_task(coroutine, name)

    def run_ended(self, claimed: ClaimedRun) -> None:
        """Free the slot of a run whose code has ended; its outcome is still to be written."""
        self._slots.free_slot(claimed)
        self._endings.run_ended(claimed)
        if not self._freeing:
            # In the next turn of the event loop, so that the outcome is sent first.
            self._freeing = True
            self._loop.call_soon(self._slot_freed)

    def _slot_freed(self) -> None:
        self._freeing = False
        self._agenda.slot_freed()

    def outcome_stored(self, claimed: ClaimedRun, outcome: str, error: BaseException | None) -> None:
        """Log and count the outcome of a run, which is committed or, if the run was lost, never will be."""
        if self._slots.written(claimed):
            self._agenda.claim.set()
        if outcome in ("completed", "failed"):
            self.minutes.ended(claimed.queue_name, claimed.task_name, outcome, claimed.now)
        if outcome in ("failed", "retried") and error is not None:
            self._log_failure(claimed, error, final=outcome == "failed")
            if outcome == "failed" and self.hooks.on_failed:
                self._call_hooks(claimed, encode_error(error, claimed.run_id))
        elif outcome == "lost":
            if isinstance(error, TaskCancelled):
                self._log_loss(claimed, "cancelled")
            else:
                self._background.start_task(self._explain_loss(claimed), "durable:lost")
        if self.telemetry is not None:
            self.telemetry.ended(claimed.queue_name, claimed.task_name, outcome)
        if outcome in ("completed", "failed", "lost"):
            self._on_task_ended(claimed.task_id)

    def _log_failure(self, claimed: ClaimedRun, error: BaseException, *, final: bool) -> None:
        level = logging.ERROR if final else logging.WARNING
        if not logger.isEnabledFor(level):
            return
        redacted = payload_redactor(claimed.params, claimed.headers)
        shown = loggable(error, redacted)
        logger.log(
            level,
            "task %s (%s) failed%s: %s: %s",
            claimed.task_id,
            claimed.task_name,
            "" if final else f" in attempt {claimed.attempt} and is retried",
            type(error).__name__,
            redacted(message(shown)).partition("\n")[0],
            exc_info=shown,
            extra=claimed.log_fields,
        )

    async def _explain_loss(self, claimed: ClaimedRun) -> None:
        """Log why a run has lost its task, which the database knows if it answers."""
        state: str | None = None
        try:
            if self.leased:
                with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
                    state = await self.reader.ownership(claimed.key)
        finally:
            self._log_loss(claimed, state)

    def _log_loss(self, claimed: ClaimedRun, state: str | None) -> None:
        if state == "cancelled":
            self.minutes.ended(claimed.queue_name, claimed.task_name, state)
        if state in ("cancelled", "deleted"):
            level, what = logging.INFO, f"was {state} while it ran"
        else:
            level, what = logging.WARNING, "was lost by this worker, and goes on with another one"
        logger.log(level, "task %s (%s) %s", claimed.task_id, claimed.task_name, what, extra=claimed.log_fields)

    def failed_by_takeover(self, rows: Sequence[Row[Any]]) -> None:
        """Log and count tasks that a takeover has failed, because too many workers were lost with them."""
        for row in rows:
            logger.error(
                "task %s (%s) failed: LeaseLost: %d workers in a row were lost while they ran it, the last %d alone",
                row.task_id,
                row.task_name,
                row.lease_losses,
                row.lease_losses - SUSPECT_AFTER,
                extra={
                    **dict.fromkeys(FIELDS),
                    "task_id": str(row.task_id),
                    "task_name": row.task_name,
                    "queue_name": row.queue_name,
                },
            )
            if self.hooks.on_failed:
                self._call_hooks(row, row.error)
        for row in rows:
            self.minutes.ended(row.queue_name, row.task_name, "failed")
        if self.telemetry is not None:
            for row in rows:
                self.telemetry.ended(row.queue_name, row.task_name, "failed")

    def _call_hooks(self, failed: ClaimedRun | Row[Any], error: str) -> None:
        task_failed(self.hooks.on_failed, failed.task_id, failed.task_name, failed.queue_name, failed.params, error)

    def release(self) -> None:
        """Give all runs back, and those that are started from now on."""
        self._releasing = True
        for run in list(self._slots.runs.values()):
            run.release()

    def give_up(self) -> None:
        """Cancel all runs without writing anything: other workers may have taken them over."""
        self._slots.drop_starting()
        for run in list(self._slots.runs.values()):
            run.take_away(LeaseLost())

    async def check(self) -> None:
        """Cancel the runs that this worker does not own any more."""
        held = list(self._slots.runs)
        if not held:
            return
        rows = await self._connection.execute(
            claiming.LOST_RUNS,
            {"task_ids": [task_id for task_id, _ in held], "fences": [fence for _, fence in held]},
        )
        for row in rows:
            # The run that holds the slot now. The one that held it before the query may have been a placeholder, which
            # the started run has replaced; if that run has ended since, its own outcome has changed the fence.
            run = self._slots.runs.get((row.task_id, row.fence))
            if run is not None:
                run.take_away(TaskCancelled() if row.state in ("cancelled", None) else LeaseLost())

    def poll(self, task_ids: Collection[uuid.UUID] | None = None) -> None:
        """Have all runs, or those of these tasks, look whether their waits have been resolved."""
        for run in list(self._slots.runs.values()):
            if task_ids is None or run.claimed.task_id in task_ids:
                run.poll_soon()

    def messages_came(self, task_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
        """Have the runs of these tasks that go on in a conversation look for messages. Return those that do."""
        return {
            run.claimed.task_id
            for run in self._slots.runs.values()
            if run.claimed.task_id in task_ids and run.message_came()
        }

    def clock_moved(self, by: timedelta) -> None:
        """Adjust all runs to a change of the database's clock, which only tests make."""
        for run in list(self._slots.runs.values()):
            run.clock_moved(by.total_seconds())
