"""The signals that shut a worker down, and the end of a process that a task does not let end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import faulthandler
import functools
import logging
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import FrameType
from typing import Any

from ..errors import InvalidConfiguration
from .leases import end_process
from .supervision import Ending, Supervision
from .worker import Worker

logger = logging.getLogger("durable_sa")

ENDING_TIMEOUT = 30.0
"""Seconds after the first signal and the `shutdown_timeout`, after which the process is ended by force."""
LEFT_BEHIND_TIMEOUT = 5.0
"""Seconds that a process has to end after its worker has ended and left code behind that ignores its cancellation."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))
"""The signals that shut a worker down."""
RELEASING = getattr(signal, "SIGQUIT", None)
"""The signal that gives all runs back at once."""


class Watchdog:
    """A thread that ends the process by force at a deadline. `describe` says for the log what does not end."""

    def __init__(self, describe: Callable[[], list[str]]) -> None:
        self._describe = describe
        # Handlers of signals may put into this queue at any moment. They cannot start a thread or take a lock.
        self._deadlines: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="durable-watchdog", daemon=True).start()

    def expect_end_within(self, seconds: float) -> None:
        """End the process in so many seconds, unless an earlier deadline is set."""
        self._deadlines.put(time.monotonic() + seconds)

    def stop(self) -> None:
        """Leave the process alone."""
        self._deadlines.put(None)

    def _watch(self) -> None:
        deadline: float | None = None
        while True:
            try:
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                earlier = self._deadlines.get(timeout=timeout)
            except queue.Empty:
                what = "; ".join(self._describe()) or "code of the application"
                end_process(f"the process does not end because of {what}")
            if earlier is None:
                return
            deadline = earlier if deadline is None else min(deadline, earlier)


class Interrupts:
    """Handles signals for a worker: the first cancels its start or shuts it down, the second gives its runs back.

    SIGQUIT gives them back at once.
    """

    def __init__(self) -> None:
        self._starting: asyncio.Task[Worker] | None = None
        self._worker: Worker | None = None
        self.ending = False
        """True once the worker is to end."""
        self._signals = 0
        self._at_once = False

    async def started(self, start: Coroutine[Any, Any, Worker]) -> Worker | None:
        """Return the worker that `start` returns, or None if a signal has cancelled the start."""
        self._starting = asyncio.ensure_future(start)
        try:
            self._worker = await self._starting
        except asyncio.CancelledError:
            if self.ending and self._starting.cancelled():
                return None
            if self._starting.done() and not self._starting.cancelled() and self._starting.exception() is None:
                # The caller was cancelled just when the worker had started, so no other code has a reference to it.
                await self._starting.result().shutdown()
            raise
        if self.ending:
            self._shut_down(self._worker)
        return self._worker

    def signalled(self, *, at_once: bool = False) -> None:
        """Act on a signal; `at_once` if it asks for the runs to be given back."""
        self._signals += 1
        self.end(at_once=at_once or self._signals > 1)

    def end(self, *, at_once: bool) -> None:
        """Cancel the start of the worker, or shut it down; `at_once` gives its runs back without waiting for them."""
        self.ending = True
        self._at_once = self._at_once or at_once
        if self._worker is not None:
            self._shut_down(self._worker)
        elif self._starting is not None:
            self._starting.cancel()

    def unended(self) -> list[str]:
        """Describe the tasks whose code runs. Safe to call from any thread."""
        return [] if self._worker is None else self._worker.unended()

    @property
    def left_behind(self) -> bool:
        """True if code that ignores its cancellation goes on after the end of the worker."""
        return self._worker is not None and self._worker.left_behind

    def _shut_down(self, worker: Worker) -> None:
        if self._at_once:
            worker.release_now()
        worker.start_task(worker.shutdown(), "durable:signal")


@contextlib.asynccontextmanager
async def signals_handled(
    wanted: bool | None, shutdown_timeout: float, supervision: Supervision | None = None
) -> AsyncGenerator[Interrupts]:
    """Handle signals until the end of the block, and end the process by force if its tasks do not let it end after one.

    `wanted` is as for `Durable.run_worker`. Commands of a watcher are handled as signals are.

    Raises:
        InvalidConfiguration: signals are wanted, but this is not the main thread.
    """
    interrupts = Interrupts()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if wanted and not in_main_thread:
        raise InvalidConfiguration(
            "signals", "only the main thread can take signals", "Call worker.shutdown() instead."
        )
    taken = [number for number in SIGNALS if in_main_thread and _takes(number, wanted)]
    if wanted is False or not taken:
        yield interrupts
        return
    loop = asyncio.get_running_loop()
    watchdog = Watchdog(interrupts.unended)

    def handle(chained: Callable[..., object] | None, number: int, frame: FrameType | None) -> None:
        # The event loop may be blocked by the code of a task: the deadline holds all the same.
        watchdog.expect_end_within(ENDING_TIMEOUT + shutdown_timeout)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(functools.partial(interrupts.signalled, at_once=number == RELEASING))
        if chained is not None:
            chained(number, frame)

    def command(ending: Ending) -> None:
        # A service manager may send its signal to all processes, so commands do not count as further signals.
        watchdog.expect_end_within(ENDING_TIMEOUT + shutdown_timeout)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(functools.partial(interrupts.end, at_once=ending == "release"))

    if supervision is not None:
        supervision.on_ending = command
    previous = {number: signal.getsignal(number) for number in taken}
    ours = {number: functools.partial(handle, _handler_of_others(number)) for number in taken}
    for number, handler in ours.items():
        signal.signal(number, handler)
    try:
        yield interrupts
    finally:
        for number, handler in ours.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, previous[number] or signal.SIG_DFL)
        if interrupts.ending and interrupts.left_behind:
            logger.warning("code does not end with its worker: %s", "; ".join(interrupts.unended()))
            watchdog.expect_end_within(LEFT_BEHIND_TIMEOUT)
            # The thread does not get to run any more when Python closes the coroutines at its own end.
            atexit.register(_end_finalization)
        else:
            watchdog.stop()


def is_for_nohup(number: int) -> bool:
    """Return whether it is SIGHUP, in a process that was started by nohup, so that it stays ignored.

    Other signals are handled even if they were ignored: a shell without job control ignores SIGINT and SIGQUIT in what
    it starts in the background.
    """
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def _takes(number: int, wanted: bool | None) -> bool:
    if is_for_nohup(number):
        return False
    return bool(wanted) or not _handler_of_others(number)


def _handler_of_others(number: int) -> Callable[..., object] | None:
    """Return the handler of a signal that application code or a server has set, or None."""
    handler = signal.getsignal(number)
    if not callable(handler) or handler is signal.default_int_handler:
        return None
    # asyncio.run() has one for SIGINT, which cancels the main task.
    if isinstance(getattr(getattr(handler, "func", None), "__self__", None), asyncio.Runner):
        return None
    return handler


def _end_finalization() -> None:
    with contextlib.suppress(Exception):  # there is no stderr
        faulthandler.dump_traceback_later(LEFT_BEHIND_TIMEOUT, exit=True)
