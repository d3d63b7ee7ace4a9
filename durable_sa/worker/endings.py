"""The ends of a worker that it brings about itself: planned ones, and those for the sake of code that does not end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import DurableError, InvalidState
from ..execution.run import Run
from ..statements.claiming import ClaimedRun
from ..tasks import Task
from .abandoned import AbandonedThreads
from .background import BackgroundTasks
from .deadlines import HardTimeouts
from .lifetime import Lifetime
from .settings import Settings
from .supervision import Supervision

logger = logging.getLogger("durable_sa")


class Endings:
    """Counts runs and abandoned threads, watches memory and hard timeouts, and ends the worker at their limits.

    `drained` waits, after `stop_claiming`, until no run is in progress; `give_back` gives all runs back at once.
    """

    def __init__(
        self,
        settings: Settings,
        supervision: Supervision | None,
        background: BackgroundTasks,
        *,
        stopping: Callable[[], bool],
        stop_claiming: Callable[[], None],
        drained: Callable[[], Awaitable[None]],
        give_back: Callable[[], None],
        shutdown: Callable[[], Awaitable[None]],
    ) -> None:
        self.error: DurableError | None = None
        """The reason for which the worker has ended."""
        self._settings = settings
        self._supervision = supervision
        self._background = background
        self._stopping = stopping
        self._stop_claiming = stop_claiming
        self._drained = drained
        self._give_back = give_back
        self._shutdown = shutdown
        max_runs = None if supervision is None else supervision.max_runs
        max_memory = None if supervision is None else supervision.max_memory
        self.lifetime = Lifetime(max_runs, max_memory, self._end_when_idle)
        self.threads = AbandonedThreads(settings.concurrency, self._end_with_threads)
        self._hard_timeouts = None if supervision is None else HardTimeouts(supervision, self._end_with_overdue)
        self._warned = False

    def attempt_timeout(self, task: Task[Any, Any]) -> float | None:
        """Return the `timeout` of a task, or a `hard_timeout` that is shorter and that no watcher enforces."""
        hard, timeout = task.hard_timeout, task.timeout
        if hard is None or self._hard_timeouts is not None:
            return timeout
        if not self._warned:
            self._warned = True
            logger.warning(
                "task %s has a hard_timeout, which is taken as its timeout here: only `durable worker --processes` "
                "ends code that ignores a timeout",
                task.name,
            )
        return hard if timeout is None else min(hard, timeout)

    def run_begins(self, run: Run) -> None:
        """Watch a run, if its task has a `hard_timeout`."""
        if run.task.hard_timeout is not None and self._hard_timeouts is not None:
            self._hard_timeouts.began(run, run.task.hard_timeout)

    def run_ended(self, claimed: ClaimedRun) -> None:
        """Take note of the end of a run."""
        if self._hard_timeouts is not None:
            self._hard_timeouts.ended(claimed)
        self.lifetime.run_ended()

    def thread_abandoned(self, claimed: ClaimedRun, thread: threading.Thread) -> None:
        """Count the thread of a `def` run that executes code after the end of the run."""
        self.threads.add(claimed, thread)

    def _end_when_idle(self, reason: str) -> None:
        """Shut down when all runs in progress have ended, because the process is to be replaced."""
        if self._stopping():
            return
        self._stop_claiming()
        self._report()
        logger.info("worker %s %s: it ends, and is replaced, when its runs have ended", self._settings.name, reason)

        async def end() -> None:
            await self._drained()
            await self._shutdown()

        self._background.start_task(end(), "durable:end")

    def _end_with_threads(self) -> None:
        """End the worker, because ended runs occupy more threads than it has slots."""
        if self._stopping():
            return
        self.error = InvalidState(
            f"Worker {self._settings.name}",
            f"ended: {len(self.threads.alive())} threads execute code of `def` runs that have ended, more than its "
            f"{self._settings.concurrency} slots",
            "The log has the tasks and where their code is. Give what they call a timeout, or the task a "
            "`hard_timeout`, and run `durable worker --processes`.",
        )
        logger.critical("%s", self.error)
        self._report()
        self._end_now()

    def _end_with_overdue(self, run: Run) -> None:
        """End the worker, because the code of a run may not end after its `hard_timeout`."""
        claimed = run.claimed
        self._report()
        logger.error(
            "task %s (%s) has exceeded its hard_timeout: its process ends",
            claimed.task_id,
            claimed.task_name,
            extra=claimed.log_fields,
        )
        self._end_now()

    def _end_now(self) -> None:
        async def end() -> None:
            await self._shutdown()

        self._give_back()
        self._background.start_task(end(), "durable:end")

    def _report(self) -> None:
        """Have the watcher take the end as planned."""
        if self._supervision is not None:
            self._supervision.report("ending")
