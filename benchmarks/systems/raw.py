"""The ceiling: the least that a job costs, as statements over asyncpg on one plain table, without guarantees.

A worker claims a batch and completes the previous one at the same time, with one statement each, on two connections. It
skips ids below the last claimed one, as ids only rise. It has no retries, leases or typed results.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import asyncpg

from .base import Params, Settings, System

TABLE = """
CREATE TABLE jobs (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    params json NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    output json,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,
    finished_at timestamptz
) WITH (fillfactor = 50);
CREATE INDEX jobs_unfinished ON jobs (id) WHERE finished_at IS NULL;
"""
INSERT = "INSERT INTO jobs (name, params) SELECT $1, p::json FROM unnest($2::text[]) AS p RETURNING id"
CLAIM = """
WITH ready AS MATERIALIZED (
    SELECT id FROM jobs WHERE finished_at IS NULL AND state = 'pending' AND id > $1
    ORDER BY id LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs SET state = 'running', started_at = clock_timestamp() FROM ready WHERE jobs.id = ready.id
RETURNING jobs.id, jobs.name, jobs.params
"""
COMPLETE = """
UPDATE jobs SET state = 'completed', output = done.output::json, finished_at = clock_timestamp()
FROM unnest($1::bigint[], $2::text[]) AS done (id, output) WHERE jobs.id = done.id
"""


class RawSystem(System):
    """Two statements in a loop."""

    distribution = "asyncpg"

    async def install(self, url: str) -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(TABLE)
        await connection.close()

    async def open(self, url: str, connections: int, settings: Settings) -> None:
        self._pool = await asyncpg.create_pool(url, min_size=1, max_size=connections)

    async def close(self) -> None:
        await self._pool.close()

    async def work(self, url: str, settings: Settings) -> None:
        self._connections = [await asyncpg.connect(url) for _ in range(2)]
        self._running = asyncio.create_task(self._work(*self._connections, settings.get("concurrency", 1)))

    async def _work(self, claims: Any, writes: Any, batch: int) -> None:
        loop = asyncio.get_running_loop()
        floor = 0
        completing: asyncio.Task[Any] | None = None
        while True:
            jobs = await claims.fetch(CLAIM, floor, batch)
            if completing is not None:
                await completing
                completing = None
            if not jobs:
                await asyncio.sleep(0.01)
                continue
            floor = max(job["id"] for job in jobs)
            outputs = await asyncio.gather(*(loop.create_task(self._run(job["params"])) for job in jobs))
            completing = asyncio.create_task(writes.execute(COMPLETE, [job["id"] for job in jobs], outputs))

    async def _run(self, params: str) -> str:
        self.probe.begin()
        json.loads(params)
        self.probe.end()
        return json.dumps(None)

    async def rest(self) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
        for connection in self._connections:
            await connection.close()

    async def spawn_one(self, slot: int, task: str, params: Params) -> Any:
        return await self._pool.fetchval(INSERT, task, [json.dumps(params)])

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO orders (note) VALUES ('x')")
            await connection.fetchval(INSERT, task, [json.dumps(params)])

    async def spawn_many(self, task: str, params: Sequence[Params]) -> None:
        await self._pool.execute(INSERT, task, [json.dumps(item) for item in params])


SYSTEM = RawSystem
