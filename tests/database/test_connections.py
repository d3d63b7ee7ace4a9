"""Spawns in a row share a connection for the turn of the event loop in between, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, task
from durable_sa.database.batches import CALLS_IN_A_ROW
from durable_sa.database.notifier import HintSender

from ..support import eventually

NAMED = {"server_settings": {"application_name": "row"}}


@task
async def noop(ctx: Any) -> None: ...


def checkouts(engine: AsyncEngine) -> Callable[[], int]:
    """How many connections the pool has given since the last look."""
    seen: list[object] = []

    @event.listens_for(engine.sync_engine, "checkout")
    def checkout(*given: object) -> None:
        seen.append(given)

    def since() -> int:
        found = len(seen)
        seen.clear()
        return found

    return since


async def test_a_loop_keeps_its_connection_and_gives_it_back_when_it_ends(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HintSender, "send", lambda *_: None)  # hints travel on another connection
    engine = create_async_engine(database_url)
    async with Durable(engine, tasks=[noop], telemetry=False) as durable:
        await durable.spawn(noop)
        await asyncio.sleep(0.05)
        given = checkouts(engine)
        for _ in range(100):
            await durable.spawn(noop)
        assert given() <= 1 + 100 // CALLS_IN_A_ROW
        await asyncio.sleep(0.05)
        pool: Any = engine.pool
        assert pool.checkedout() == 0
    await engine.dispose()


async def test_a_spawn_gives_its_connection_back_when_it_returns(database_url: URL) -> None:
    """So the only connection of a pool can be taken right after it."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=5)
    async with Durable(engine, tasks=[noop]) as durable:
        for _ in range(10):
            await durable.spawn(noop)
            async with engine.connect() as connection:
                await connection.execute(sa.text("SELECT 1"))
    await engine.dispose()


@pytest.mark.parametrize("pooled", [True, False], ids=["pool", "no pool"])
async def test_an_engine_that_is_disposed_of_in_the_middle_of_a_loop_leaves_nothing(
    database_url: URL, engine: AsyncEngine, pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hint that is sent afterwards makes a connection of the next pool.
    monkeypatch.setattr(HintSender, "send", lambda *_: None)
    app = create_async_engine(database_url, connect_args=NAMED, **({} if pooled else {"poolclass": NullPool}))
    durable = Durable(app, tasks=[noop])
    for _ in range(2):
        for _ in range(5):
            await durable.spawn(noop)
        await app.dispose()

        async def gone() -> bool:
            async with engine.connect() as connection:
                count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'row'"
                return (await connection.execute(sa.text(count))).scalar() == 0

        await eventually(gone)
    await durable.close()


async def test_others_have_their_turn_while_a_loop_spawns(database_url: URL) -> None:
    """With a pool of one connection, for which all of them stand in line."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=20)
    stopped = False

    async def spawn() -> int:
        spawned = 0
        while not stopped:
            await durable.spawn(noop)
            spawned += 1
        return spawned

    async with Durable(engine, tasks=[noop]) as durable:
        await durable.spawn(noop)
        loops = [asyncio.create_task(spawn()) for _ in range(2)]
        for _ in range(20):
            async with engine.connect() as connection:
                await connection.execute(sa.text("SELECT 1"))
        stopped = True
        assert all([await each > 5 for each in loops])
    await engine.dispose()


async def test_a_lost_connection_in_a_loop_loses_no_spawn(database_url: URL, engine: AsyncEngine) -> None:
    app = create_async_engine(database_url, connect_args=NAMED)
    async with Durable(app, tasks=[noop]) as durable:
        spawned = []
        for number in range(60):
            if number % 20 == 10:
                async with engine.connect() as connection:
                    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'row'"
                    await connection.execute(sa.text(cut))
            spawned.append((await durable.spawn(noop)).task_id)
        async with engine.connect() as connection:
            found = (await connection.execute(sa.text("SELECT task_id FROM durable.tasks"))).scalars().all()
        assert set(found) == set(spawned)
        assert len(found) == len(spawned)
    await app.dispose()


async def test_an_error_of_the_drivers_own_class_loses_no_spawn(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg raises it where the server's goodbye crosses a statement, and SQLAlchemy lets it pass."""
    prepare = asyncpg.Connection.prepare
    failing: list[str] = []

    async def fail_first(connection: Any, text: str, **options: Any) -> Any:
        if "INSERT" in text and text not in failing:
            failing.append(text)
            raise asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")
        return await prepare(connection, text, **options)

    monkeypatch.setattr(asyncpg.Connection, "prepare", fail_first)
    async with Durable(engine, tasks=[noop]) as durable:
        await durable.create_queue()
        await durable.spawn(noop)
        assert (await durable.list_queues()) == ["default"]
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SELECT count(*) FROM durable.tasks")) == 1
    assert len(failing) == 2
