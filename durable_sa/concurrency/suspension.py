"""When a run does nothing but wait for what lies outside this process, so that it can be suspended."""

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
"""Turns of the event loop over which tasks must be seen blocked on each other: a result takes a few turns on its way
through the callbacks of futures, and no task is about to run meanwhile."""

SHORTEST_DELAY: Final = 0.001
LONGEST_DELAY: Final = 0.5
"""Seconds, doubled each time, between looks at tasks that block and go on without telling, on a queue for example."""

_log = logging.getLogger(__name__)


class Quiescence:
    """Watches the tasks of one run and calls `on_quiescent` once, from the event loop, when nothing in it can move.

    That is when nothing is busy, a durable wait is pending, and every task is blocked on such a wait, on other tasks of
    the run, or on a lock, event or queue. Tasks blocked on anything else have `grace` seconds from then on. It looks
    when something changes; while nothing is pending or something is busy there are no timers.
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
        """Until the block ends, which may be inside of others, the run is busy."""
        self._busy += 1

    def __exit__(self, *_: object) -> None:
        self._busy -= 1
        self._progress()

    async def wait(self, future: asyncio.Future[T]) -> T:
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
        """Has the tasks looked at in the next turn of the loop. To be called when one has ended."""
        if self._busy or not self._parked or self._on_quiescent is None:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._turns = 0
        self._delay = 0.0
        self._handle = self._loop.call_soon(self._check, context=self._context)

    def stop(self) -> None:
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
        """What the run as a whole is blocked on, and the tasks that await something outside."""
        whole = Blocked.PARKED
        outside: list[AnyTask] = []
        tasks = list(self._tasks)
        for position, task in enumerate(tasks):
            blocked = blocking.examine(task, self._tasks, self._parked)
            if blocked is Blocked.NOT:
                # Next time it is looked at first, so that a thousand tasks that block one by one cost no million looks.
                for seen in tasks[:position]:
                    self._tasks[seen] = self._tasks.pop(seen)
                return blocked, []
            if blocked is Blocked.OUTSIDE:
                outside.append(task)
            elif blocked is Blocked.INSIDE:
                whole = blocked
        return (Blocked.OUTSIDE if outside else whole), outside
