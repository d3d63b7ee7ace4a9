"""A database that takes no writes for a while: clients are told, and workers wait."""

import asyncio
import logging

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, InvalidState, TaskContext

from ..support import eventually
from .conftest import Rows
from .stories import named


@pytest.fixture
async def admin(engine: AsyncEngine, database_url: URL) -> Rows:
    """Statements that go through whatever the database has been told."""

    async def run(statement: str) -> list[object]:
        async with create_async_engine(database_url, poolclass=NullPool).connect() as connection:
            await connection.exec_driver_sql("SET TRANSACTION READ WRITE")
            result = await connection.execute(text(statement))
            rows = list(result.all()) if result.returns_rows else []
            await connection.commit()
            return rows

    return run


async def set_read_only(admin: Rows, url: URL, value: str) -> None:
    """From now on, for whoever is connected as well."""
    await admin(f'ALTER DATABASE "{url.database}" SET default_transaction_read_only = {value}')
    await admin(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


@pytest.mark.slow
async def test_a_worker_that_starts_on_a_read_only_database_waits(
    database_url: URL, durable: Durable, admin: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await set_read_only(admin, database_url, "on")
    async with named(database_url, "victim") as victim:

        @victim.task
        async def work(ctx: TaskContext) -> int:
            return await ctx.step("one", int)

        # As a process that would be ended if others had taken its runs over.
        async with victim.worker(fatal_on_lease_timeout=True) as worker:
            await eventually(lambda: "waits: the database is read-only" in caplog.text)
            with pytest.raises(InvalidState, match="read-only.*Connect to the primary"):
                await victim.spawn(work)
            assert await admin("SELECT count(*) FROM durable.workers") == [(0,)]
            await set_read_only(admin, database_url, "off")
            await eventually(lambda: "goes on: the database takes writes" in caplog.text)
            result = await victim.wait_for_result(await victim.spawn(work), timeout=10)
            assert result.output == 0
            assert await admin("SELECT worker_id FROM durable.workers") == [(worker.worker_id,)]
    assert caplog.text.count("waits: the database is read-only") == 1


@pytest.mark.slow
async def test_a_worker_on_a_database_that_becomes_read_only_goes_on_afterwards(
    database_url: URL, durable: Durable, admin: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    async with named(database_url, "victim") as victim:
        go_on = asyncio.Event()

        @victim.task(max_attempts=1)
        async def work(ctx: TaskContext) -> int:
            await ctx.step("wait", go_on.wait)
            return ctx.attempt

        async with victim.worker(claim_timeout=1):
            spawned = await victim.spawn(work)
            await eventually(lambda: admin("SELECT 1 FROM durable.tasks WHERE state = 'running'"))
            await set_read_only(admin, database_url, "on")
            await eventually(lambda: "waits: the database is read-only" in caplog.text)
            go_on.set()
            await set_read_only(admin, database_url, "off")
            result = await victim.wait_for_result(spawned, timeout=30)
            assert result.output == 2
    assert await admin("SELECT attempt, failures FROM durable.tasks") == [(2, 0)]
    assert "heartbeat failed (the database is read-only)" in caplog.text
    assert "Traceback" not in caplog.text
