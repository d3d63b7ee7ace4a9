"""Connections whose other end neither answers nor closes hold nothing up: their sockets are torn down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, TaskContext, task
from durable_sa.database import closing
from durable_sa.database.connections import Database, HeldConnection

from ..support import eventually
from ..verification.proxy import Proxy

DRIVERS = ("postgresql+asyncpg", "postgresql+psycopg")


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "CLOSING_TIMEOUT", 0.2)


@pytest.fixture
async def proxy(database_url: URL) -> AsyncGenerator[Proxy]:
    host = database_url.host or str(database_url.query["host"])
    port = database_url.port or int(str(database_url.query.get("port", 5432)))
    async with Proxy(host, port) as proxy:
        yield proxy


def through(proxy: Proxy, database_url: URL, driver: str) -> URL:
    return database_url.set(drivername=driver, host="127.0.0.1", port=proxy.port, query={})


@task
async def order(ctx: TaskContext) -> int:
    async def number(session: AsyncSession) -> int:
        return int((await session.execute(sa.text("SELECT 7"))).scalar_one())

    return await ctx.transaction("number", number)


@pytest.mark.slow
async def test_tasks_go_on_behind_a_proxy_that_never_closes(durable: Durable, proxy: Proxy, database_url: URL) -> None:
    """Without a pool, every transaction ends in a wait for a connection to close."""
    proxy.clinging = True
    engine = create_async_engine(through(proxy, database_url, DRIVERS[0]), poolclass=NullPool)
    async with Durable(engine, tasks=[order]) as client:
        spawned = await asyncio.wait_for(client.spawn_many([(order, None)] * 10), 10)
        async with client.worker(concurrency=5):
            for result in spawned:
                assert (await client.wait_for_result(result, timeout=20)).output == 7


async def fail_in_transaction(database: Database, proxy: Proxy) -> None:
    async with database.transaction(explained=False) as connection:
        await connection.execute(sa.text("SELECT 2"))
        proxy.stall()
        raise ZeroDivisionError


@pytest.mark.parametrize("state", ["idle", "in a transaction", "in a statement"])
async def test_a_connection_is_given_back_discarded_or_rolled_back_in_bounded_time(
    proxy: Proxy, database_url: URL, driver: str, state: str
) -> None:
    engine = create_async_engine(through(proxy, database_url, driver))
    database = Database(engine)
    if driver.endswith("psycopg") and state == "in a statement":
        pytest.skip("psycopg itself has the bound: 10 seconds")
    async with asyncio.timeout(8):
        if state == "in a transaction":
            with pytest.raises(ZeroDivisionError):
                await fail_in_transaction(database, proxy)
        else:
            held = HeldConnection(database)
            await held.execute(sa.text("SELECT 1"))
            proxy.stall()
            if state == "in a statement":
                statement = asyncio.create_task(held.execute(sa.text("SELECT 2")))
                await asyncio.sleep(0.05)
                statement.cancel()
                await asyncio.wait([statement])
            await held.close()
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    proxy.heal()
    await engine.dispose()


@pytest.mark.slow
async def test_a_client_closes_and_disposes_in_bounded_time(proxy: Proxy, database_url: URL, driver: str) -> None:
    """A hint in flight is waited for up to 5 seconds, and the pool is disposed of in two."""
    durable = Durable(through(proxy, database_url, driver), tasks=[order])
    await durable.create_queue()
    await asyncio.gather(*(durable.spawn(order) for _ in range(10)), *(durable.list_queues() for _ in range(5)))
    proxy.stall()
    began = time.monotonic()
    await durable.close()
    assert time.monotonic() - began < 9


async def test_the_socket_is_closed(proxy: Proxy, database_url: URL, driver: str) -> None:
    """The proxy, which closes nothing by itself, reads to the end of what the client sends."""
    engine = create_async_engine(through(proxy, database_url, driver), poolclass=NullPool)
    held = HeldConnection(Database(engine))
    await held.execute(sa.text("SELECT 1"))
    proxy.clinging = True
    await held.close()
    await eventually(lambda: proxy.left == 1, within=5)


async def test_a_connection_whose_set_up_is_cancelled_is_closed(
    database_url: URL, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker is shut down before its listener has connected."""
    monkeypatch.setattr(closing, "CLOSING_TIMEOUT", 10.0)
    engine = create_async_engine(database_url.set(drivername=driver))
    made: list[Any] = []
    cancelled = asyncio.Event()

    @sa.event.listens_for(engine.sync_engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        made.append(connection.driver_connection)
        connection.run_async(lambda _: cancelled.wait())

    connecting = asyncio.create_task(closing.connected(engine.connect()))
    await eventually(lambda: bool(made))
    connecting.cancel()
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    (connection,) = made
    assert connection.is_closed() if driver.endswith("asyncpg") else connection.closed
    await engine.dispose()


async def test_connecting_to_a_dead_end_is_cancelled_in_bounded_time(
    proxy: Proxy, database_url: URL, driver: str
) -> None:
    proxy.stall()
    engine = create_async_engine(through(proxy, database_url, driver))
    connecting = asyncio.create_task(closing.connected(engine.connect()))
    await eventually(lambda: proxy.waiting > 0)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(connecting, 5)
    await engine.dispose()
