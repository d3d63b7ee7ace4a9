"""Threads: a pool for `def` steps, and single threads with an event loop of their own.

All of them are daemons, because Python waits for other threads at the end of the process, and a step may never end.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_event_loop() -> bool:
    """Return whether an event loop runs in the calling thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class LoopThread:
    """A thread that runs `main` in an event loop of its own.

    `main` is passed an event, and returns soon after that is set. `failed` is called, in the thread, with an exception
    that `main` raises.
    """

    def __init__(
        self,
        name: str,
        main: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
        failed: Callable[[Exception], None],
    ) -> None:
        self._main = main
        self._failed = failed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self.stopping = False
        """True once `stop` was called."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self, timeout: float) -> None:
        """Have the thread end, and wait up to `timeout` seconds for that."""
        self.stopping = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._stop.set)
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - a thread sets no asyncio.Event
            await asyncio.sleep(0.005)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001 - passed on
            self._failed(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        if not self.stopping:
            await self._main(self._stop)


class StepThreads(Executor):
    """Up to `limit` threads, started on demand, that make calls in their order.

    It differs from `concurrent.futures.ThreadPoolExecutor` in two ways: its threads are daemons, and a thread whose
    caller has stopped waiting, after a timeout or a cancellation, does not count towards the limit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._counted = 0
        """Threads, without those that were left behind."""
        self._idle = 0
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread make the call.

        Raises:
            RuntimeError: after :meth:`shutdown`.
        """
        call = _Call(self, functools.partial(fn, *args, **kwargs))
        with self._changed:
            if self._closed:
                raise RuntimeError("the worker has ended")
            self._calls.append(call)
            self._changed.notify()
            self._start_if_needed()
        return call

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Cancel all calls that have not begun. It never waits for calls in progress."""
        with self._changed:
            self._closed = True
            calls, self._calls = self._calls, deque()
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    def leave_behind(self, call: _Call) -> None:
        """Have the thread of a call in progress end with it, and start another one in its place."""
        with self._changed:
            if call.thread is not None and not call.left_behind:
                call.left_behind = True
                self._counted -= 1
                self._start_if_needed()

    def _start_if_needed(self) -> None:
        if len(self._calls) > self._idle and self._counted < self._limit:
            self._counted += 1
            name = f"durable-step_{next(self._numbers)}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _next_call(self) -> _Call | None:
        with self._changed:
            self._idle += 1
            while not self._calls and not self._closed:
                self._changed.wait()
            self._idle -= 1
            if not self._calls:
                return None
            call = self._calls.popleft()
            call.thread = threading.current_thread()
            return call

    def _serve(self) -> None:
        while (call := self._next_call()) is not None:
            call.make()
            with self._changed:
                call.thread = None
                if call.left_behind:
                    return
            del call


class _Call(Future[Any]):
    """A submitted call."""

    def __init__(self, threads: StepThreads, function: Callable[[], Any]) -> None:
        super().__init__()
        self.thread: threading.Thread | None = None
        """The thread that makes the call at the moment."""
        self.left_behind = False
        self._threads = threads
        self._function = function

    def make(self) -> None:
        """Make the call, unless it was cancelled before."""
        if self.set_running_or_notify_cancel():
            try:
                result = self._function()
            except BaseException as error:  # noqa: BLE001 - passed on
                self.set_exception(error)
            else:
                self.set_result(result)

    def cancel(self) -> bool:
        """Cancel the call if it has not begun. asyncio tries that when the caller stops waiting."""
        cancelled = super().cancel()
        if not cancelled:
            self._threads.leave_behind(self)
        return cancelled
