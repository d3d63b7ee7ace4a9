"""SIGTERM and SIGINT, which end a worker in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import AsyncGenerator, Callable

from .worker import Worker


@contextlib.asynccontextmanager
async def signals_handled(worker: Worker) -> AsyncGenerator[None]:
    """Shut the worker down on SIGTERM or SIGINT; a second one gives runs back at once."""
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
            previous = signal.signal(number, from_thread)
            restore.append(functools.partial(signal.signal, number, previous))
    try:
        yield
    finally:
        for undo in restore:
            undo()
