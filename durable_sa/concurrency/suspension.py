"""Quiescence: the moment from which a run does nothing but wait, so that it can be suspended.

A *durable wait* (a sleep, an event, a child) is a future that something outside of the run resolves; the database keeps
it, so the run can wait for it without being in memory. A run is *quiescent* when nothing in it is busy, at least one
durable wait is pending, and each of its tasks is blocked on one, or on other tasks of the run. asyncio reports none of
this. So whenever something changes, the tasks are examined (see `blocking`), over several turns of the event loop.
"""

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ..errors import InvalidState
from . import blocking
from .blocking import AnyFuture, AnyTask, Blocked

T = TypeVar("T")

TURNS: Final = 12
"""Turns of the event loop over which tasks must be seen blocked on each other. A result takes a few turns to pass
through the callbacks of futures, and while it does, no task looks as if it was about to run."""

SHORTEST_DELAY: Final = 0.001
LONGEST_DELAY: Final = 0.5
"""Seconds between examinations while some task is not blocked; doubled each time. A task that blocks on a queue, for
example, or goes on, changes nothing that is watched."""

_log = logging.getLogger(__name__)


class Quiescence:
    """Watches the tasks of one run, and calls `on_quiescent` once, from the event loop.

    A lock, event or queue of asyncio counts as part of the run. A task that is blocked on anything else delays the call
    by `grace` seconds. Without a pending wait, and while the run is busy, no timer is set.
    """

    __slots__ = (
        "_busy",
        "_context",
        "_delay",
        "_grace",
        "_handle",
        "_loop",
        "_on_quiescent",
        "_outside_since",
        "_parked",
        "_tasks",
        "_turns",
    )

    def __init__(
        self,
        tasks: dict[AnyTask, Any],
        on_quiescent: Callable[[], object],
        *,
        grace: float,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
    ) -> None:
        self._tasks = tasks
        self._on_quiescent: Callable[[], object] | None = on_quiescent
        self._grace = grace
        self._loop = loop
        self._context = context
        self._parked: set[AnyFuture] = set()
        self._busy = 0
        self._turns = 0
        self._delay = 0.0
        self._outside_since: float | None = None
        self._handle: asyncio.Handle | None = None

    def __enter__(self) -> None:
        """Keep the run busy until the block ends. Blocks may overlap."""
        self._busy += 1

    def __exit__(self, *_: object) -> None:
        self._busy -= 1
        self._progress()

    async def wait(self, future: asyncio.Future[T]) -> T:
        """Await the future of a durable wait."""
        if blocking.is_under_wait_for(self._tasks):
            raise InvalidState(
                "A durable wait",
                "inside asyncio.wait_for(), whose timeout cannot fire while the run is suspended",
                "Use the timeout= of await_event() and join() instead.",
            )
        self._parked.add(future)
        self._progress()
        try:
            return await future
        finally:
            self._parked.discard(future)
            self._progress()

    def look(self) -> None:
        """Examine the tasks in the next turn of the event loop, because one of them has ended."""
        if self._busy or not self._parked or self._on_quiescent is None:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._turns = 0
        self._delay = 0.0
        self._handle = self._loop.call_soon(self._check, context=self._context)

    def stop(self) -> None:
        """Stop watching."""
        self._on_quiescent = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _progress(self) -> None:
        self._outside_since = None
        self.look()

    def _check(self) -> None:
        self._handle = None
        if self._busy or not self._parked or not self._tasks or (on_quiescent := self._on_quiescent) is None:
            return
        blocked, outside = self._examine()
        if blocked is Blocked.INSIDE and self._turns < TURNS:
            self._turns += 1
            self._handle = self._loop.call_soon(self._check, context=self._context)
            return
        if blocked is Blocked.NOT:
            self._check_later(LONGEST_DELAY)
            return
        if blocked is Blocked.OUTSIDE:
            now = self._loop.time()
            if self._outside_since is None:
                self._outside_since = now
            if (remaining := self._outside_since + self._grace - now) > 0:
                self._check_later(remaining)
                return
            _log.warning(
                "Suspending a run that still awaits something which is not durable, at %s. When the run goes on, this "
                "is started anew: do it in a step, or end it before a durable wait.",
                "; ".join(sorted({blocking.location(task) for task in outside})),
            )
        self.stop()
        on_quiescent()

    def _check_later(self, limit: float) -> None:
        self._turns = 0
        if self._delay:
            self._handle = self._loop.call_later(min(self._delay, limit), self._check, context=self._context)
        else:
            self._handle = self._loop.call_soon(self._check, context=self._context)
        self._delay = min(max(2 * self._delay, SHORTEST_DELAY), LONGEST_DELAY)

    def _examine(self) -> tuple[Blocked, list[AnyTask]]:
        """Return what the run as a whole is blocked on, and the tasks that are blocked on something outside."""
        whole = Blocked.PARKED
        outside: list[AnyTask] = []
        tasks = list(self._tasks)
        for position, task in enumerate(tasks):
            blocked = blocking.examine(task, self._tasks, self._parked)
            if blocked is Blocked.NOT:
                # The next examination begins with this task: a thousand tasks that block one after the other would
                # otherwise be examined half a million times.
                for seen in tasks[:position]:
                    self._tasks[seen] = self._tasks.pop(seen)
                return blocked, []
            if blocked is Blocked.OUTSIDE:
                outside.append(task)
            elif blocked is Blocked.INSIDE:
                whole = blocked
        return (Blocked.OUTSIDE if outside else whole), outside
