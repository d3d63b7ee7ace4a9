"""Connections that break while a statement is on its way, before it is executed or after: the task never knows."""

import random
from collections import Counter
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, RetryStrategy, TaskContext, TaskPollResult, task
from tests.context.support import Rows

from . import crashing


class Unreliable:
    """An engine whose connections break now and then, during a statement or a commit."""

    def __init__(self, url: URL, seed: int) -> None:
        unreliable = self

        class Connection(asyncpg.Connection):
            """For the statements that go to asyncpg directly, as their names tell."""

            async def prepare(self, query: str, *, name: Any = None, **options: Any) -> Any:
                prepared = await super().prepare(query, name=name, **options)
                if not str(name).startswith("durable_"):
                    return prepared
                return SimpleNamespace(fetch=partial(self.fetch_prepared, prepared))

            async def fetch_prepared(self, prepared: Any, *values: Any) -> Any:
                lost, done = unreliable._draw()
                records = await prepared.fetch(*values) if done else []
                if lost:
                    self.terminate()
                    raise asyncpg.InterfaceError("connection is closed")
                return records

        self.engine = create_async_engine(url, pool_size=20, connect_args={"connection_class": Connection})
        self.share = 0.0
        self.broken = 0
        self._chance = random.Random(seed)
        self._dialect = self.engine.sync_engine.dialect
        self._execute, self._commit = self._dialect.do_execute, self._dialect.do_commit
        self._dialect.do_execute = self.execute
        self._dialect.do_commit = self.commit

    def execute(self, cursor: Any, *arguments: Any) -> None:
        self._perhaps(lambda: self._execute(cursor, *arguments), cursor._adapt_connection)

    def commit(self, connection: Any) -> None:
        self._perhaps(lambda: self._commit(connection), connection)

    def _draw(self) -> tuple[bool, bool]:
        """Whether the connection is lost, and whether the server has done what it was told."""
        lost = self._chance.random() < self.share
        self.broken += lost
        return lost, not lost or self._chance.random() < 0.5

    def _perhaps(self, perform: Any, connection: Any) -> None:
        lost, done = self._draw()
        if done:
            perform()
        if lost:
            connection.terminate()
            raise self._dialect.loaded_dbapi.InterfaceError("connection is closed")


@pytest.fixture
async def unreliable(engine: AsyncEngine, request: pytest.FixtureRequest) -> AsyncGenerator[Unreliable]:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE ledger (id serial, task_id uuid, what text)"))
    unreliable = Unreliable(engine.url, request.param)
    yield unreliable
    await unreliable.engine.dispose()


@pytest.mark.parametrize("unreliable", range(2), indirect=True)
async def test_no_break_of_a_connection_is_seen_by_the_task(
    engine: AsyncEngine, unreliable: Unreliable, tmp_path: Path
):
    crashing.Process.ledger = tmp_path / "steps"
    client = Durable(engine, tasks=crashing.TASKS)
    async with Durable(unreliable.engine, tasks=crashing.TASKS) as durable, durable.worker(concurrency=10):
        unreliable.share = 0.1
        spawned = [(await client.spawn(crashing.work, number), number) for number in range(8)]
        spawned += [(await client.spawn(crashing.plain_work, number), number) for number in range(8)]
        results = [await client.wait_for_result(each, timeout=60) for each, _ in spawned]
        unreliable.share = 0.0
    assert unreliable.broken > 25

    async with engine.connect() as connection:
        written = (await connection.execute(text("SELECT task_id, what, id FROM ledger"))).all()
    steps = Counter(line for line in (tmp_path / "steps").read_text().splitlines())
    for (each, number), result in zip(spawned, results, strict=True):
        rows = Rows(client, each)
        assert result.error is None
        row = await rows.task()
        assert (row.failures, row.attempt, row.lease_losses) == (0, 1, 0)
        [child] = await rows.children()
        own = {what: number for task_id, what, number in written if task_id == each.task_id}
        [of_child] = [number for task_id, _, number in written if task_id == child.task_id]
        assert Counter(task_id for task_id, _, _ in written)[each.task_id] == len(own)
        output: Any = result.output
        if row.task_name == "work":
            events = [number, "timeout", number + 1, own["write 2"]]
            assert output[:-1] == [number + 1, own["write 1"], of_child, *events]
            assert steps[f"{each.task_id} plain"] == 2
        else:
            assert output[:-1] == [number + 2, own["write 1"], of_child]
            assert steps[f"{each.task_id} threaded"] == 1
        assert await rows.waits() == []


@pytest.mark.parametrize("unreliable", range(1), indirect=True)
async def test_failures_of_the_task_are_counted_once_each(engine: AsyncEngine, unreliable: Unreliable):
    """The report of a failure whose reply is lost is repeated, and is still one failure."""
    client = Durable(engine, default_retry_strategy=RetryStrategy.fixed(0.01))
    async with Durable(unreliable.engine) as durable, durable.worker(concurrency=10):

        @task(max_attempts=4)
        async def work(ctx: TaskContext) -> None:
            raise ValueError(str(ctx.attempt))

        durable.register(work)
        client.register(work)
        unreliable.share = 0.15
        results: list[TaskPollResult[Any]] = []
        # How many replies there are to lose depends on how many writes share one.
        while unreliable.broken <= 8:
            spawned = [await client.spawn(work) for _ in range(20)]
            results += [await client.wait_for_result(each, timeout=60) for each in spawned]
        unreliable.share = 0.0
    for result in results:
        assert result.error is not None
        assert result.error.message == "4"
        rows = Rows(client, result)
        assert (await rows.task()).failures == 4
        assert [run.error["message"] for run in await rows.runs()] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(("times", "failures"), [(10, 0), (20, 1)])
async def test_a_transaction_outlasts_many_lost_connections_but_not_any_number(
    durable: Durable, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, times: int, failures: int
):
    """A query that crashes the server each time must come to an end."""
    monkeypatch.setattr("durable_sa.execution.transactions.backoff", lambda _: 0.0)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE ledger (id serial)"))
    tries = 0

    async def write(session: AsyncSession) -> int:
        nonlocal tries
        tries += 1
        await session.execute(text("INSERT INTO ledger DEFAULT VALUES"))
        if tries <= times:
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return tries

    @durable.task(max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
    async def work(ctx: TaskContext) -> int:
        return await ctx.transaction("write", write)

    async with durable.worker():
        spawned = await durable.spawn(work)
        result = await durable.wait_for_result(spawned, timeout=30)
    assert result.output == times + 1
    assert (await Rows(durable, spawned).task()).failures == failures
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM ledger"))).scalar() == 1
