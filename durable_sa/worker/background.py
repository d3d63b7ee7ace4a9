"""The asyncio tasks of a worker's engine: services, which last as long as the worker, and short jobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ..concurrency.branches import detached
from ..database.channel import DedicatedConnection
from ..database_errors import without_values
from ..signals import LeaseLost

logger = logging.getLogger("durable_sa")


class BackgroundTasks:
    """Starts the engine's tasks outside of every run, logs those that fail, and cancels the rest at the end."""

    def __init__(self) -> None:
        self.services: dict[str, asyncio.Task[None]] = {}
        self.jobs: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def serve(
        self, run: Callable[[], Coroutine[Any, Any, None]], name: str, connection: DedicatedConnection | None = None
    ) -> None:
        """Start a service. Its connection is closed when it ends, also when application code cancels it."""

        async def serve() -> None:
            try:
                await run()
            finally:
                if connection is not None:
                    await connection.close()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.critical("%s has ended", name, exc_info=without_values(error))

        task = self.services[name] = self._start(serve(), name)
        task.add_done_callback(ended)

    async def ended(self, name: str) -> None:
        """Wait until a service has ended, also by an error or a cancellation."""
        await asyncio.wait([self.services[name]])

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a job."""
        task = self._start(coroutine, name)
        self.jobs.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self.jobs.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None and not isinstance(error, LeaseLost):
                logger.error("%s failed", name, exc_info=without_values(error))

        task.add_done_callback(ended)

    def _start(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        with detached():
            return self._loop.create_task(coroutine, name=name)

    async def end(self) -> None:
        """Cancel all services and jobs, and wait up to 5 seconds for their end."""
        for task in [*self.services.values(), *self.jobs]:
            task.cancel()
        if self.services or self.jobs:
            await asyncio.wait([*self.services.values(), *self.jobs], timeout=5.0)
