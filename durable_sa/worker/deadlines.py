"""The `hard_timeout` of tasks: it ends the process of the worker, because nothing else ends every kind of code.

The event loop acts on it if it turns. If it does not, the watcher, which knows the deadline as well, kills the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..errors import TaskTimeout
from ..execution.run import Run
from ..statements.claiming import ClaimedRun
from .slots import RunKey
from .supervision import Supervision

logger = logging.getLogger("durable_sa")


def hard_timeout_error(task_name: str, seconds: float) -> TaskTimeout:
    """Return the error of an attempt that was ended by its `hard_timeout`."""
    return TaskTimeout(f"task {task_name!r}", seconds)


class HardTimeouts:
    """The deadlines of the runs in progress. `on_overdue` is called with a run past its own, and ends the process.

    In a process that no watcher restarts, the run alone is ended.
    """

    def __init__(self, supervision: Supervision | None, on_overdue: Callable[[Run], None]) -> None:
        self._supervision = supervision
        self._on_overdue = on_overdue
        self._timers: dict[RunKey, asyncio.TimerHandle] = {}
        self._warned = False
        self._loop = asyncio.get_running_loop()

    def began(self, run: Run, seconds: float) -> None:
        """Watch a run, whose code is about to begin."""
        claimed = run.claimed
        if self._supervision is not None:
            task_id = str(claimed.task_id)
            self._supervision.report("began", task_id=task_id, fence=claimed.fence, timeout=seconds)
        elif not self._warned:
            self._warned = True
            logger.warning(
                "task %s has a hard_timeout, which is taken as its timeout here: only `durable worker --processes` "
                "can end code that does not end when it is cancelled",
                claimed.task_name,
            )
        self._timers[claimed.key] = self._loop.call_later(seconds, self._overdue, run, seconds)

    def ended(self, claimed: ClaimedRun) -> None:
        """Forget a run, if it was watched."""
        if (timer := self._timers.pop(claimed.key, None)) is not None:
            timer.cancel()
            if self._supervision is not None:
                self._supervision.report("ended", task_id=str(claimed.task_id), fence=claimed.fence)

    def _overdue(self, run: Run, seconds: float) -> None:
        claimed = run.claimed
        if self._supervision is not None:
            task_id = str(claimed.task_id)
            self._supervision.report("overdue", task_id=task_id, fence=claimed.fence, timeout=seconds)
        run.time_out(hard_timeout_error(run.claimed.task_name, seconds))
        if self._supervision is not None:
            self._on_overdue(run)
