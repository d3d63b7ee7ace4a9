"""procrastinate: an `App` on psycopg's pool."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import procrastinate
from procrastinate.jobs import Status

from .base import Params, Settings, System

_UNFINISHED = (Status.TODO, Status.DOING)


class ProcrastinateSystem(System):
    """procrastinate, a queue without steps. It has no call that waits for a job, so `result` polls its status."""

    distribution = "procrastinate"

    def _app(self, url: str, **pool: Any) -> procrastinate.App:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, **pool))

        @app.task(name="noop", queue="bench")
        async def noop(i: int) -> None:
            self.probe.begin()
            self.probe.end()

        @app.task(name="stamp", queue="bench")
        async def stamp(i: int) -> None:
            self.probe.note(i)
            self.probe.end()

        @app.task(name="hold", queue="bench")
        async def hold(i: int) -> None:
            self.probe.begin()
            await self.probe.hold()
            self.probe.end()

        return app

    async def install(self, url: str) -> None:
        async with self._app(url).open_async() as app:
            await app.schema_manager.apply_schema_async()

    async def open(self, url: str, connections: int, settings: Settings) -> None:
        self._client = self._app(url, min_size=connections, max_size=connections)
        await self._client.open_async()

    async def close(self) -> None:
        await self._client.close_async()

    async def work(self, url: str, settings: Settings) -> None:
        settings = dict(settings)
        pool = settings.pop("pool", None)
        sizes = {} if pool is None else {"min_size": pool, "max_size": pool}
        self._worker_app = self._app(url, **sizes)
        await self._worker_app.open_async()
        self._running = asyncio.create_task(
            self._worker_app.run_worker_async(queues=["bench"], install_signal_handlers=False, **settings)
        )

    async def rest(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        await self._worker_app.close_async()

    async def spawn_one(self, slot: int, task: str, params: Params) -> int:
        return await self._client.tasks[task].defer_async(**params)

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        pool = self._client.connector.pool  # type: ignore[attr-defined]
        async with pool.connection() as connection, connection.transaction():
            await connection.execute("INSERT INTO orders (note) VALUES ('x')")
            await self._client.tasks[task].configure(connection=connection).defer_async(**params)

    async def spawn_many(self, task: str, params: Sequence[Params]) -> None:
        await self._client.tasks[task].batch_defer_async(*params)

    async def result(self, handle: int) -> None:
        while await self._client.job_manager.get_job_status_async(handle) in _UNFINISHED:
            await asyncio.sleep(0.002)


SYSTEM = ProcrastinateSystem
