"""Calls that hold the event loop: which task makes them, and at which line of its code.

The thread of the heartbeat asks the event loop for a sign several times a second. Where none comes for a second, it
reads the stack of the loop's thread, which still stands at the call. While C code holds Python's global lock, no thread
can look: such a call is seen when it ends, if at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from types import FrameType

from ..concurrency.blocking import AnyTask
from ..concurrency.branches import branch_of
from ..statements.claiming import ClaimedRun

logger = logging.getLogger("durable_sa")

BLOCKED_AFTER = 1.0
"""Seconds without a turn of the event loop that are logged."""
SIGN_INTERVAL = 0.2
"""Seconds between a sign of the event loop and the next: so much longer may a call be and yet pass unseen."""
REMINDER_INTERVAL = 60.0
"""Seconds for which a line that was logged is not logged once more."""

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_WAITING = frozenset({"selectors", "asyncio.windows_events"})
"""Modules whose code is innermost while an event loop has nothing to do."""

_silent_until: dict[str, float] = {}
"""By place, the time until which it is not logged once more, for all workers of the process."""


class BlockedLoop:
    """Watches the event loop in which it was made. `run_of` returns the run of a worker that an asyncio task is of."""

    def __init__(self, run_of: Callable[[AnyTask], ClaimedRun | None]) -> None:
        self._run_of = run_of
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    async def watch(self) -> None:
        """Watch until cancelled, in another thread's event loop."""
        own = asyncio.get_running_loop()
        while not self._loop.is_closed():
            sign = asyncio.Event()
            asked_at = time.monotonic()
            try:
                self._loop.call_soon_threadsafe(_pass_on, own, sign)
            except RuntimeError:  # the loop has just been closed
                return
            try:
                async with asyncio.timeout(BLOCKED_AFTER):
                    await sign.wait()
            except TimeoutError:
                with contextlib.suppress(RuntimeError):  # a run changes under its eyes, so the event loop turns again
                    self._report()
                await sign.wait()
                held = time.monotonic() - asked_at
                logger.debug("the event loop was held for %.1f seconds", held)
            await asyncio.sleep(SIGN_INTERVAL)

    def _report(self) -> None:
        frame = sys._current_frames().get(self._thread)  # pyright: ignore[reportPrivateUsage]
        task = asyncio.current_task(self._loop)
        if frame is None or frame.f_globals.get("__name__") in _WAITING:
            return  # the process was stopped, not its event loop
        run = None if task is None else self._run_of(task)
        if run is None and task in branch_of:
            return  # a run of another worker, which reports it
        place = location(frame)
        now = time.monotonic()
        if now < _silent_until.get(place, 0.0):
            return
        if len(_silent_until) > 1000:
            _silent_until.clear()
        _silent_until[place] = now + REMINDER_INTERVAL
        what = f"task {run.task_id} ({run.task_name})" if run is not None else "code outside of tasks"
        logger.warning(
            "%s has held the event loop for more than %g s, at %s. Meanwhile nothing else runs here: await an "
            "asynchronous client instead, or call it from a `def` step or a `def` task, which run in threads.",
            what,
            BLOCKED_AFTER,
            place,
            extra=None if run is None else run.log_fields,
        )


def _pass_on(loop: asyncio.AbstractEventLoop, sign: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(sign.set)
    except RuntimeError:  # the watching thread has ended
        return


def location(innermost: FrameType) -> str:
    """Return the line of the application that is executed, and the innermost one if that is a library's."""
    frame: FrameType | None = innermost
    while frame is not None and _is_of_library(frame):
        frame = frame.f_back
    place = _place(frame or innermost)
    return place if frame is innermost or frame is None else f"{place}, in {_place(innermost)}"


def _is_of_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    filename = frame.f_code.co_filename
    return name.partition(".")[0] == _PACKAGE or filename.startswith((*_LIBRARIES, "<frozen"))


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}()"
