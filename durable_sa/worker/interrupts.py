"""SIGTERM and SIGINT, which shut a worker down."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from .worker import Worker


class Interrupts:
    """Handles signals for a worker: the first cancels its start or shuts it down, the second gives its runs back."""

    def __init__(self) -> None:
        self._starting: asyncio.Task[Worker] | None = None
        self._worker: Worker | None = None
        self._received = 0

    async def started(self, start: Coroutine[Any, Any, Worker]) -> Worker | None:
        """Return the worker that `start` returns, or None if a signal has cancelled the start."""
        self._starting = asyncio.ensure_future(start)
        try:
            self._worker = await self._starting
        except asyncio.CancelledError:
            if self._received and self._starting.cancelled():
                return None
            if self._starting.done() and not self._starting.cancelled() and self._starting.exception() is None:
                # The caller was cancelled just when the worker had started, so no other code has a reference to it.
                await self._starting.result().shutdown()
            raise
        if self._received:
            self._shut_down(self._worker)
        return self._worker

    def signalled(self) -> None:
        """Act on a signal."""
        self._received += 1
        if self._worker is None:
            if self._starting is not None:
                self._starting.cancel()
        elif self._received == 1:
            self._shut_down(self._worker)
        else:
            self._worker.release_now()

    def _shut_down(self, worker: Worker) -> None:
        worker.start_task(worker.shutdown(), "durable:signal")


@contextlib.asynccontextmanager
async def signals_handled() -> AsyncGenerator[Interrupts]:
    """Handle signals until the end of the block. Outside of the main thread there are none to handle."""
    loop = asyncio.get_running_loop()
    interrupts = Interrupts()

    def from_thread(_: int, __: object) -> None:
        loop.call_soon_threadsafe(interrupts.signalled)

    restore: list[Callable[[], object]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, interrupts.signalled)
            restore.append(functools.partial(loop.remove_signal_handler, number))
        except (NotImplementedError, RuntimeError, ValueError):
            if threading.current_thread() is not threading.main_thread():
                break
            previous = signal.signal(number, from_thread)
            restore.append(functools.partial(signal.signal, number, previous))
    try:
        yield interrupts
    finally:
        for undo in restore:
            undo()
