"""Networks that are slow, uneven and torn: everything is as it would be, and later."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from durable_sa import Durable, TaskContext, TaskTimeout
from durable_sa.embedded import EmbeddedServer, temporary_server

from .proxy import Proxy


@dataclass(frozen=True)
class Network:
    latency: float = 0.0
    jitter: float = 0.0
    slice: int = 0


NETWORKS = {
    "fifty milliseconds away": Network(latency=0.05, jitter=0.02),
    "three bytes at a time": Network(slice=3),
    "ten kilobytes a second": Network(latency=0.02, slice=200),
}


@pytest.fixture(scope="module")
def server() -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off"}, listen="127.0.0.1") as embedded:
        yield embedded


@pytest.fixture
async def proxy(server: EmbeddedServer) -> AsyncGenerator[Proxy]:
    url = server.url()
    assert url.host is not None
    assert url.port is not None
    async with Proxy(url.host, url.port) as proxy:
        yield proxy


@pytest.fixture
async def durable(server: EmbeddedServer, proxy: Proxy) -> AsyncGenerator[Durable]:
    engine = create_async_engine(server.url().set(host="127.0.0.1", port=proxy.port))
    async with Durable(engine) as durable:
        await durable.migrate()
        await durable.drop_queue()
        await durable.create_queue()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE IF NOT EXISTS bookings (number int)"))
            await connection.execute(text("TRUNCATE bookings"))
        yield durable
    await engine.dispose()


@pytest.mark.parametrize("name", NETWORKS)
async def test_a_workflow_over_a_network_that_is(durable: Durable, proxy: Proxy, name: str) -> None:
    called: list[int] = []

    async def book(session: AsyncSession, number: int) -> int:
        await session.execute(text("INSERT INTO bookings VALUES (:number)"), {"number": number})
        return number

    def note(number: int) -> int:
        called.append(number)
        return number

    @durable.task
    async def child(ctx: TaskContext, number: int) -> int:
        return await ctx.step("note", note, number)

    @durable.task(max_attempts=1)
    async def workflow(ctx: TaskContext) -> list[Any]:
        handle = await ctx.spawn("child", child, 1)
        results: list[Any] = [await ctx.step("note", note, 2), await ctx.transaction("book", book, 3)]
        await ctx.sleep_for("nap", 0.1)
        results.append(await ctx.join(handle))
        results.append(await ctx.await_event("go"))
        try:
            await ctx.await_event("nothing", timeout=0.1)
        except TaskTimeout:
            results.append("late")
        return results

    network = NETWORKS[name]
    async with durable.worker(claim_timeout=10, concurrency=4):
        proxy.latency, proxy.jitter, proxy.slice = network.latency, network.jitter, network.slice
        spawned = await durable.spawn(workflow)
        assert await durable.emit_event("go", "went") is True
        result = await durable.wait_for_result(spawned, timeout=90)
        proxy.heal()
    assert result.output == [2, 3, 1, "went", "late"]
    assert sorted(called) == [1, 2]
    async with durable.engine.connect() as connection:
        assert list(await connection.scalars(text("SELECT number FROM bookings"))) == [3]
        rows = await connection.execute(text("SELECT attempt, failures, lease_losses FROM durable.tasks"))
        assert {tuple(row) for row in rows} == {(1, 0, 0)}


async def test_a_lease_outlives_the_time_that_a_new_connection_takes(durable: Durable, proxy: Proxy) -> None:
    """As 500 milliseconds each way and a lease of 10 seconds, three times as fast."""

    @durable.task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        await asyncio.sleep(3.2)
        return ctx.attempt

    async with durable.worker(claim_timeout=3) as worker:
        registered = worker.worker_id
        spawned = await durable.spawn(work)
        proxy.latency = 0.15
        result = await durable.wait_for_result(spawned, timeout=30)
        proxy.heal()
        assert worker.worker_id == registered
    assert result.output == 1
