"""Random load on queues with limits, while a trigger counts at every commit what runs.

    python -m tests.verification.limits_load postgresql://... --seconds 600

Workers, spawners with open transactions, cancels, workers that are taken for dead while they go on, sleeps, children,
lowered and raised limits, closed keys. At the end the load stops and every task must have ended, with all counts at 0.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable, Limit, Rate, RateLimited, RetryStrategy, TaskContext, task
from durable_sa.errors import InvalidState, TaskNotFound

QUEUES = ("both", "kept", "rated")

TRIGGER = """
CREATE TABLE durable_violations (at timestamptz, queue_name text, limit_key text, running int, allowed int);
CREATE TABLE durable_allowed (queue_name text, scope text, limit_key text, concurrency int, since timestamptz);
CREATE FUNCTION durable_count() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE n int; allowed int;
BEGIN
  -- One commit after another, each with a snapshot that shows the ones before.
  PERFORM pg_advisory_xact_lock(4711);
  IF NOT EXISTS (SELECT FROM durable.queues WHERE queue_name = NEW.queue_name AND limits_ready_at IS NOT NULL) THEN
    RETURN NULL;
  END IF;
  SELECT count(*) INTO n FROM durable.tasks WHERE queue_name = NEW.queue_name AND limit_key = NEW.limit_key
    AND finished_at IS NULL AND (claimed_by IS NOT NULL OR slot = 'task');
  SELECT max(concurrency) INTO allowed FROM durable_allowed
    WHERE queue_name = NEW.queue_name AND scope = 'per_key' AND since > clock_timestamp() - interval '3 s';
  IF NEW.limit_key <> '' AND n > allowed THEN
    INSERT INTO durable_violations VALUES (clock_timestamp(), NEW.queue_name, NEW.limit_key, n, allowed);
  END IF;
  SELECT count(*) INTO n FROM durable.tasks WHERE queue_name = NEW.queue_name AND finished_at IS NULL
    AND (claimed_by IS NOT NULL OR slot = 'task');
  SELECT max(concurrency) INTO allowed FROM durable_allowed
    WHERE queue_name = NEW.queue_name AND scope = 'queue' AND since > clock_timestamp() - interval '3 s';
  IF n > allowed THEN
    INSERT INTO durable_violations VALUES (clock_timestamp(), NEW.queue_name, NULL, n, allowed);
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER durable_count AFTER UPDATE ON durable.tasks DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW WHEN (NEW.state = 'running' AND OLD.state <> 'running') EXECUTE FUNCTION durable_count();
CREATE FUNCTION durable_allow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  -- With the change itself: a claim that sees it may start tasks at once.
  INSERT INTO durable_allowed VALUES (NEW.queue_name, NEW.scope, NEW.limit_key, NEW.concurrency, clock_timestamp());
  RETURN NULL;
END $$;
CREATE TRIGGER durable_allow AFTER INSERT OR UPDATE ON durable.limits FOR EACH ROW EXECUTE FUNCTION durable_allow();
"""
# A limit that was in force less than 3 seconds ago counts: a claim in flight may have seen it.
ALLOW = """
INSERT INTO durable_allowed SELECT queue_name, scope, limit_key, concurrency, clock_timestamp() FROM durable.limits
"""


@task("item", limit_key=lambda params: params["key"])
async def item(ctx: TaskContext, params: dict[str, Any]) -> int:
    """Do what the params say."""
    for number in range(params["sleeps"]):
        await ctx.step(f"s{number}", asyncio.sleep, params["seconds"])
        await ctx.sleep_for(f"z{number}", params["seconds"])
    await asyncio.sleep(params["seconds"])
    if params["fails"] and ctx.attempt < 3:
        if params["key"] and params["limited"]:
            raise RateLimited(0.05)
        raise RuntimeError("planned")
    if params["child"]:
        handle = await ctx.spawn("child", leaf, params["seconds"])
        await ctx.join(handle)
    return ctx.attempt


@task("leaf")
async def leaf(ctx: TaskContext, seconds: float) -> None:
    """Take so long."""
    await asyncio.sleep(seconds)


@dataclass
class Report:
    """What a load came to."""

    spawned: int = 0
    cancelled: int = 0
    lost_workers: int = 0
    changes: int = 0
    violations: list[Any] = field(default_factory=list)
    stranded: int = 0
    miscounted: list[Any] = field(default_factory=list)
    deadlocks: int = 0
    excess: list[Any] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.violations or self.stranded or self.miscounted or self.deadlocks or self.excess)


class Load:
    """A load on one database."""

    def __init__(self, engine: AsyncEngine, *, seed: int = 1, workers: int = 3, lose_workers: bool = True) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.report = Report()
        self.workers = workers
        self.lose_workers = lose_workers
        self.ids: list[Any] = []
        self.durable = self._client()

    def _client(self) -> Durable:
        return Durable(
            self.engine,
            tasks=[item, leaf],
            queue_name="both",
            default_retry_strategy=RetryStrategy.fixed(0.02),
            default_max_attempts=4,
        )

    async def set_up(self) -> None:
        """Make the queues, and the trigger."""
        limits = {
            "both": (Limit(concurrency=6), Limit(concurrency=2)),
            "kept": (Limit(concurrency=8, hold="task"), Limit(concurrency=2, hold="task")),
            "rated": (None, Limit(concurrency=3, rate=Rate(50, per=1, burst=5))),
        }
        for name, (whole, each) in limits.items():
            await self.durable.create_queue(name, limit=whole, limit_per_key=each)
        async with self.engine.begin() as connection:
            raw = await connection.get_raw_connection()
            driver: Any = raw.driver_connection
            await driver.execute(TRIGGER)
            await connection.execute(text(ALLOW))

    async def run(self, seconds: float) -> Report:
        """Load for so long, and wait until all tasks have ended."""
        until = time.monotonic() + seconds
        clients = [self._client() for _ in range(self.workers)]
        running = [
            await client.start_worker(
                queue_names=list(QUEUES), concurrency=10, poll_interval=0.1, claim_timeout=5, shutdown_timeout=5
            )
            for client in clients
        ]
        jobs: list[Callable[[], Awaitable[None]]] = [self._spawn, self._spawn, self._cancel, self._change, self._allow]
        if self.lose_workers:
            jobs.append(self._lose)
        try:
            await asyncio.gather(*(self._repeat(job, until) for job in jobs))
            await self._settle()
        finally:
            for worker in running:
                await worker.shutdown()
            for client in clients:
                await client.close()
        await self._audit()
        return self.report

    async def _repeat(self, job: Callable[[], Awaitable[None]], until: float) -> None:
        while time.monotonic() < until:
            try:
                await job()
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) == "40P01":
                    self.report.deadlocks += 1
                self.report.errors.append(repr(error)[:300])
            except (InvalidState, TaskNotFound) as error:
                self.report.errors.append(repr(error)[:300])
            await asyncio.sleep(self.random.random() * 0.02)

    def _params(self) -> dict[str, Any]:
        draw = self.random.random
        return {
            "key": self.random.choice([None, *(f"k{n}" for n in range(8)), "k0", "k0"]),
            "seconds": draw() * 0.01,
            "sleeps": self.random.choice([0, 0, 0, 1, 2]),
            "fails": draw() < 0.1,
            "limited": draw() < 0.5,
            "child": draw() < 0.05,
        }

    async def _spawn(self) -> None:
        async with self.engine.begin() as connection:
            for _ in range(self.random.randrange(1, 5)):
                queue = self.random.choice(QUEUES)
                params = self._params()
                # A parent that waits for a child of the same full key waits for ever.
                params["child"] = params["child"] and queue == "both"
                spawned = await self.durable.spawn_with(
                    connection, item, params, queue_name=queue, priority=self.random.choice([0, 0, 0, 1])
                )
                self.ids.append(spawned.task_id)
                self.report.spawned += 1
            await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.1]))

    async def _cancel(self) -> None:
        if self.ids:
            async with self.engine.begin() as connection:
                await self.durable.cancel_task_with(connection, self.random.choice(self.ids[-200:]))
                await asyncio.sleep(self.random.choice([0, 0, 0.05]))
            self.report.cancelled += 1
        await asyncio.sleep(0.05)

    async def _change(self) -> None:
        await asyncio.sleep(self.random.random())
        both = self.random.choice([Limit(concurrency=n) for n in (3, 6, 10)])
        await self.durable.set_limit("both", both)
        await self.durable.set_limit("both", Limit(concurrency=self.random.choice([1, 2, 4])), per_key=True)
        await self.durable.close_limit_key("rated", "k1", None)
        self.report.changes += 1

    async def _allow(self) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(ALLOW))
            await connection.execute(
                text("DELETE FROM durable_allowed WHERE since < clock_timestamp() - interval '5 s'")
            )
        await asyncio.sleep(0.2)

    async def _lose(self) -> None:
        """Have a worker taken for dead that goes on."""
        await asyncio.sleep(1 + self.random.random())
        statement = text(
            "UPDATE durable.workers SET expires_at = clock_timestamp() - interval '1 s' WHERE worker_id ="
            " (SELECT worker_id FROM durable.workers WHERE lost_at IS NULL ORDER BY random() LIMIT 1)"
        )
        async with self.engine.begin() as connection:
            await connection.execute(statement)
        self.report.lost_workers += 1

    async def _settle(self, within: float = 60.0) -> None:
        until = time.monotonic() + within
        statement = text("SELECT count(*) FROM durable.tasks WHERE finished_at IS NULL")
        left = -1
        while time.monotonic() < until:
            async with self.engine.connect() as connection:
                left = await connection.scalar(statement)
            if not left:
                break
            await asyncio.sleep(0.1)
        self.report.stranded = left

    async def _audit(self) -> None:
        await asyncio.sleep(0.2)
        async with self.engine.connect() as connection:
            rows = await connection.execute(text("SELECT * FROM durable_violations ORDER BY at"))
            self.report.violations = [tuple(row) for row in rows]
            rows = await connection.execute(
                text(
                    "SELECT k.queue_name, k.limit_key, k.running + coalesce(sum(n.slots), 0) FROM durable.limit_keys k"
                    " LEFT JOIN durable.limit_arrivals n USING (queue_name, limit_key) GROUP BY 1, 2, k.running"
                    " HAVING k.running + coalesce(sum(n.slots), 0) <> (SELECT count(*) FROM durable.tasks t WHERE"
                    " t.queue_name = k.queue_name AND t.limit_key = k.limit_key AND t.slot IS NOT NULL"
                    " AND t.finished_at IS NULL)"
                )
            )
            self.report.miscounted = [tuple(row) for row in rows]
            rows = await connection.execute(text(EXCESS), {"every": timedelta(microseconds=20_000), "burst": 5})
            self.report.excess = [tuple(row) for row in rows]


# Starts k to k+j of a key lie at least (j - burst) intervals apart.
EXCESS = """
WITH starts AS (
  SELECT limit_key, started_at AS at FROM durable.tasks
  WHERE queue_name = 'rated' AND limit_key <> '' AND started_at IS NOT NULL
  UNION ALL
  SELECT t.limit_key, r.started_at FROM durable.runs r JOIN durable.tasks t USING (task_id)
  WHERE t.queue_name = 'rated' AND t.limit_key <> '' AND r.started_at IS NOT NULL AND r.started_at <> t.started_at
), numbered AS (
  SELECT limit_key, at, row_number() OVER (PARTITION BY limit_key ORDER BY at) AS n FROM starts
)
SELECT a.limit_key, a.at, b.at, b.n - a.n + 1 FROM numbered a JOIN numbered b
  ON b.limit_key = a.limit_key AND b.n > a.n AND b.n < a.n + 400
WHERE b.n - a.n + 1 > :burst + floor(extract(epoch FROM b.at - a.at) / extract(epoch FROM CAST(:every AS interval)))
LIMIT 5
"""


async def load(url: str, seconds: float, seed: int = 1) -> Report:
    """Load a database for so long."""
    engine = create_async_engine(url, pool_size=30, max_overflow=20)
    try:
        run = Load(engine, seed=seed)
        async with run.durable:
            await run.set_up()
            return await run.run(seconds)
    finally:
        await engine.dispose()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        report = asyncio.run(load(arguments.url, arguments.seconds, arguments.seed))
        print(report)  # noqa: T201
        raise SystemExit(0 if report.clean else 1)


if __name__ == "__main__":
    main()
