"""Suspects of queues with limits: they run alone, and within the limits."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, Limit, LimitKeyInfo, Rate, TaskContext, TaskStatus
from durable_sa.worker import suspects

from ..support import eventually
from .test_queue_limits import held
from .test_suspects import SUSPECTED, Busy

Rows = Callable[..., Awaitable[list[Any]]]


@pytest.fixture
def busy() -> Busy:
    return Busy()


@pytest.fixture
async def client(engine: AsyncEngine) -> Any:
    async with Durable(engine, queue_name="q") as durable:
        yield durable


@pytest.fixture
def named(client: Durable, busy: Busy) -> Any:
    @client.task
    async def named(ctx: TaskContext, name: str) -> None:
        await busy.run(name)

    return named


@pytest.fixture
def endless(client: Durable, busy: Busy) -> Any:
    """Return a task that spawns another one of its key before it ends, until the suspect has run."""

    @client.task
    async def endless(ctx: TaskContext, key: str) -> None:
        if "suspect" not in busy.order:
            await client.spawn(endless, key, limit_key=key)
        await busy.run("endless", 0.01)

    return endless


async def test_a_suspect_runs_alone_and_holds_its_slot(client: Durable, sql: Rows, busy: Busy, named: Any) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    seen: list[list[LimitKeyInfo]] = []

    @client.task
    async def suspect(ctx: TaskContext) -> None:
        await client.spawn(named, "later", limit_key="b")
        seen.append(await client.list_limit_keys("q", state="full"))
        await busy.run("suspect", 0.1)

    spawned = await client.spawn(suspect, limit_key="a")
    await sql(SUSPECTED, task_id=spawned.task_id)
    await client.spawn_many([(named, "first")])
    async with client.worker(concurrency=10):
        assert (await client.wait_for_result(spawned, timeout=10)).status is TaskStatus.COMPLETED
        await eventually(lambda: "later" in busy.order)
    assert busy.order == ["first", "suspect", "later"]
    assert not busy.beside
    assert [key.key for key in seen[0]] == ["a"]
    assert await held(sql) == {}


@pytest.mark.parametrize("limits", ["of_the_key", "of_the_queue", "rate"])
async def test_a_slot_is_kept_for_a_suspect_whose_limit_is_always_used_up(
    client: Durable, sql: Rows, busy: Busy, named: Any, endless: Any, limits: str
) -> None:
    one = Limit(rate=Rate(50, per=1)) if limits == "rate" else Limit(concurrency=1)
    await client.create_queue("q", limit=one if limits == "of_the_queue" else None, limit_per_key=one)
    await client.spawn(endless, "a", limit_key="a")
    async with client.worker(concurrency=3):
        await eventually(lambda: busy.order.count("endless") > 2)
        spawned = await client.spawn(named, "suspect", limit_key="b" if limits == "of_the_queue" else "a", delay=3600)
        await sql(SUSPECTED, task_id=spawned.task_id)
        await sql("INSERT INTO durable.limit_arrivals (queue_name, limit_key) VALUES ('q', 'a'), ('q', 'b')")
        assert (await client.wait_for_result(spawned, timeout=10)).status is TaskStatus.COMPLETED
    assert not any("suspect" in pair for pair in busy.beside)


async def test_a_suspect_of_a_closed_key_waits_and_holds_nothing_up(
    client: Durable, sql: Rows, busy: Busy, named: Any
) -> None:
    await client.create_queue("q", limit=Limit(concurrency=1))
    await client.close_limit_key("q", "a", datetime.now(UTC) + timedelta(hours=1))
    suspect = await client.spawn(named, "suspect", limit_key="a")
    await sql(SUSPECTED, task_id=suspect.task_id)
    others = await client.spawn_many([(named, "other"), (named, "another")])
    async with client.worker(concurrency=3):
        for other in others:
            await client.wait_for_result(other, timeout=10)
        assert "suspect" not in busy.order
        await client.close_limit_key("q", "a", None)
        await client.wait_for_result(suspect, timeout=10)


async def test_a_busy_worker_makes_room_for_a_suspect_that_its_limits_admit(
    client: Durable, sql: Rows, busy: Busy, named: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "PATIENCE", 0.01)
    monkeypatch.setattr(suspects, "SEARCH_INTERVAL", 0.0)
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    await client.close_limit_key("q", "a", datetime.now(UTC) + timedelta(hours=1))
    release = asyncio.Event()

    @client.task
    async def service(ctx: TaskContext) -> None:
        busy.running.add("service")
        await release.wait()
        busy.running.discard("service")

    await client.spawn(service, limit_key="s")
    async with client.worker(concurrency=3) as worker:
        await eventually(lambda: "service" in busy.running)
        suspect = await client.spawn(named, "suspect", limit_key="a", delay=3600)
        await sql(SUSPECTED, task_id=suspect.task_id)
        await worker._suspects.make_room()
        await worker._suspects.make_room()
        assert not worker._slots.makes_room
        await client.close_limit_key("q", "a", None)

        async def makes_room() -> bool:
            await asyncio.sleep(0.02)
            await worker._suspects.make_room()
            return worker._slots.makes_room

        await eventually(makes_room)
        later = await client.spawn(named, "later", limit_key="b")
        await asyncio.sleep(0.05)
        assert "later" not in busy.order
        release.set()
        await client.wait_for_result(suspect, timeout=10)
        await client.wait_for_result(later, timeout=10)
    assert busy.order == ["suspect", "later"]


@pytest.mark.parametrize("hold", ["run", "task"])
async def test_a_task_that_is_given_up_gives_its_slot_back(
    client: Durable, sql: Rows, named: Any, engine: AsyncEngine, hold: Any
) -> None:
    await client.create_queue("q", limit=Limit(concurrency=3), limit_per_key=Limit(concurrency=1, hold=hold))
    started = asyncio.Event()

    @client.task(max_lost_workers=1)
    async def deadly(ctx: TaskContext) -> None:
        started.set()
        await asyncio.sleep(3600)

    spawned = await client.spawn(deadly, limit_key="a")
    await sql(SUSPECTED, task_id=spawned.task_id)
    worker = await client.start_worker(claim_timeout=30, shutdown_timeout=0)
    try:
        await asyncio.wait_for(started.wait(), 10)
        assert await held(sql) == {"a": 1}
        await sql("UPDATE durable.workers SET expires_at = now() - interval '1 s'")
        async with Durable(engine, queue_name="q", tasks=client.tasks.values()).worker():
            result = await client.wait_for_result(spawned, timeout=10)
            assert result.error is not None
            assert result.error.name == "LeaseLost"
            later = await client.spawn(named, "later", limit_key="a")
            await client.wait_for_result(later, timeout=10)
    finally:
        await worker.shutdown()
    assert await held(sql) == {}
