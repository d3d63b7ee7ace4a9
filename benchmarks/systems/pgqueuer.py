"""pgqueuer: `Queries` over a pool of asyncpg connections, and a `PgQueuer` worker on one connection, as in its docs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, PgQueuer, Queries
from pgqueuer.core.completion import CompletionWatcher
from pgqueuer.models import Job

from .base import NEVER, Params, Settings, System


def encoded(params: Params) -> bytes:
    """Encode the payload of a job."""
    return json.dumps(params).encode()


class PgQueuerSystem(System):
    """pgqueuer, a queue without steps. It deletes completed jobs and writes a row to a log instead."""

    distribution = "pgqueuer"

    def __init__(self) -> None:
        super().__init__()
        self._kind: str | None = None

    async def limit(self, url: str | None, kind: str | None) -> None:
        self._kind = kind

    async def install(self, url: str) -> None:
        connection = await asyncpg.connect(url)
        queries = Queries(AsyncpgDriver(connection))
        await queries.install()
        await queries.optimize_autovacuum()
        await connection.close()

    async def open(self, url: str, connections: int, settings: Settings) -> None:
        self._pool = await asyncpg.create_pool(url, min_size=2, max_size=max(2, connections))
        self._queries = Queries(AsyncpgPoolDriver(self._pool))
        # The watcher listens and polls for completions on a connection of its own.
        self._listening = await asyncpg.connect(url)
        driver = AsyncpgDriver(self._listening)
        waits = {} if "debounce" not in settings else {"debounce": timedelta(seconds=settings["debounce"])}
        self._watcher = CompletionWatcher(driver, queries=Queries(driver), **waits)
        await self._watcher.__aenter__()

    async def close(self) -> None:
        await self._watcher.__aexit__(None)
        await self._listening.close()
        await self._pool.close()

    async def work(self, url: str, settings: Settings) -> None:
        settings = dict(settings)
        if (concurrency := settings.pop("concurrency", None)) is not None:
            # pgqueuer requires max_concurrent_tasks to be at least twice the batch size.
            settings["batch_size"] = max(1, concurrency // 2)
            settings["max_concurrent_tasks"] = max(2, concurrency)
        self._worker_connection = await asyncpg.connect(url)
        self._worker = PgQueuer(AsyncpgDriver(self._worker_connection))

        @self._worker.entrypoint("noop")
        async def noop(job: Job) -> None:
            self.probe.begin()
            self.probe.end()

        @self._worker.entrypoint("keyed", concurrency_limit=NEVER if self._kind == "queue" else 0)
        async def keyed(job: Job) -> None:
            self.probe.begin()
            self.probe.end()

        @self._worker.entrypoint("stamp")
        async def stamp(job: Job) -> None:
            self.probe.note(json.loads(job.payload or b"")["i"])
            self.probe.end()

        @self._worker.entrypoint("hold")
        async def hold(job: Job) -> None:
            self.probe.begin()
            await self.probe.hold()
            self.probe.end()

        self._running = asyncio.create_task(self._worker.run(**settings))

    async def rest(self) -> None:
        self._worker.shutdown.set()
        await asyncio.wait([self._running], timeout=10)
        await self._worker_connection.close()

    async def spawn_one(self, slot: int, task: str, params: Params) -> Any:
        return (await self._queries.enqueue(task, encoded(params)))[0]

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO orders (note) VALUES ('x')")
            await Queries(AsyncpgDriver(connection)).enqueue(task, encoded(params))

    async def spawn_many(self, task: str, params: Sequence[Params]) -> None:
        await self._queries.enqueue([task] * len(params), [encoded(item) for item in params], [0] * len(params))

    async def result(self, handle: Any) -> None:
        await self._watcher.wait_for(handle)


SYSTEM = PgQueuerSystem
