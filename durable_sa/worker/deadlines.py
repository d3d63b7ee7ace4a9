"""The `hard_timeout` of tasks: it ends the process of the worker, because nothing else ends every kind of code.

The event loop acts on it if it turns. If it does not, the watcher, which knows the deadline as well, kills the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..errors import TaskTimeout
from ..execution.run import Run
from ..statements.claiming import ClaimedRun
from .slots import RunKey
from .supervision import Supervision


def hard_timeout_error(task_name: str, seconds: float) -> TaskTimeout:
    """Return the error of an attempt that was ended by its `hard_timeout`."""
    return TaskTimeout(f"task {task_name!r}", seconds)


class HardTimeouts:
    """The deadlines of the runs in progress. `on_overdue` is called with a run past its own, and ends the process."""

    def __init__(self, supervision: Supervision, on_overdue: Callable[[Run], None]) -> None:
        self._supervision = supervision
        self._on_overdue = on_overdue
        self._timers: dict[RunKey, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def began(self, run: Run, seconds: float) -> None:
        """Watch a run, whose code is about to begin."""
        self._report("began", run.claimed, timeout=seconds)
        self._timers[run.claimed.key] = self._loop.call_later(seconds, self._overdue, run, seconds)

    def ended(self, claimed: ClaimedRun) -> None:
        """Forget a run, if it was watched."""
        if (timer := self._timers.pop(claimed.key, None)) is not None:
            timer.cancel()
            self._report("ended", claimed)

    def _overdue(self, run: Run, seconds: float) -> None:
        self._report("overdue", run.claimed, timeout=seconds)
        run.time_out(hard_timeout_error(run.claimed.task_name, seconds))
        self._on_overdue(run)

    def _report(self, what: str, claimed: ClaimedRun, **details: float) -> None:
        self._supervision.report(what, task_id=str(claimed.task_id), fence=claimed.fence, **details)
