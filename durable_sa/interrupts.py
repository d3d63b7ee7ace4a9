"""SIGTERM and SIGINT, which end a worker in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import AsyncGenerator, Callable

from .worker import Worker


@contextlib.asynccontextmanager
async def signals_handled(worker: Worker) -> AsyncGenerator[None]:
    """Shut the worker down on SIGTERM or SIGINT; a second one gives runs back at once.

    In a thread, where signals do not come, it goes on until somebody else shuts it down.
    """
    loop = asyncio.get_running_loop()
    received = 0

    def stop() -> None:
        nonlocal received
        received += 1
        if received == 1:
            worker.start_task(worker.shutdown(), "durable:signal")
        else:
            worker.hurry()

    def from_thread(_: int, __: object) -> None:
        loop.call_soon_threadsafe(stop)

    restore: list[Callable[[], object]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop)
            restore.append(functools.partial(loop.remove_signal_handler, number))
        except (NotImplementedError, RuntimeError, ValueError):
            if threading.current_thread() is not threading.main_thread():
                break  # Python tells the main thread only
            previous = signal.signal(number, from_thread)
            restore.append(functools.partial(signal.signal, number, previous))
    try:
        yield
    finally:
        for undo in restore:
            undo()
