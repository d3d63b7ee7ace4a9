"""Threads for `def` steps of `async def` tasks: those that never end keep neither others nor the process waiting."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StepThreads(Executor):
    """Up to `most` threads that take calls in turn, started when they are needed.

    As `concurrent.futures.ThreadPoolExecutor`, whose threads Python waits for at the end of the process, with two
    differences: these are daemons, and one whose call nobody waits for any more, after a timeout or a cancellation,
    does not count among the `most`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._counted = 0
        """Threads but for those that were left behind."""
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
            self._start_one()
        return call

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Make no call that has not begun. What has begun goes on; nothing here waits for it."""
        with self._changed:
            self._closed = True
            calls, self._calls = self._calls, deque()
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    def leave(self, call: _Call) -> None:
        """Nobody waits for a call any more that may be in progress: its thread ends with it, and another comes."""
        with self._changed:
            if call.thread is not None and not call.left:
                call.left = True
                self._counted -= 1
                self._start_one()

    def _start_one(self) -> None:
        if len(self._calls) > self._idle and self._counted < self._most:
            self._counted += 1
            name = f"durable-step_{next(self._numbers)}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _take(self) -> _Call | None:
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
        while (call := self._take()) is not None:
            call.make()
            with self._changed:
                call.thread = None
                if call.left:
                    return
            del call


class _Call(Future[Any]):
    """A call on its way."""

    def __init__(self, threads: StepThreads, function: Callable[[], Any]) -> None:
        super().__init__()
        self.thread: threading.Thread | None = None
        """The one that makes it, at the moment."""
        self.left = False
        self._threads = threads
        self._function = function

    def make(self) -> None:
        """Make it, unless it was cancelled before."""
        if self.set_running_or_notify_cancel():
            try:
                result = self._function()
            except BaseException as error:  # noqa: BLE001 - handed over
                self.set_exception(error)
            else:
                self.set_result(result)

    def cancel(self) -> bool:
        """Cancel it if it has not begun; asyncio asks for that where nobody waits for it any more."""
        cancelled = super().cancel()
        if not cancelled:
            self._threads.leave(self)
        return cancelled
