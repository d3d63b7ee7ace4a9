"""A database whose encoding lacks characters: what a run writes is stored with escapes, and every run ends."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from durable_sa import Durable, RetryStrategy, TaskContext, UserError, task
from durable_sa.testing.database import TestServer
from tests.context.support import Crash, Rows, Runner

SMILE = "naïve 🙂 北"


@pytest.fixture
async def run(durable_server: TestServer) -> AsyncGenerator[Runner]:
    url: URL = durable_server.create_database()
    name = f"{url.database}_latin1"
    durable_server._execute(f"CREATE DATABASE \"{name}\" ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    engine = create_async_engine(url.set(database=name))
    try:
        async with Durable(engine, default_retry_strategy=RetryStrategy.fixed(0)) as durable:
            await durable.migrate()
            async with durable.worker(concurrency=1, shutdown_timeout=0.2):
                yield Runner(durable)
    finally:
        await engine.dispose()
        durable_server.drop_database(url.set(database=name))
        durable_server.drop_database(url)


async def test_whatever_a_run_writes_is_stored_in_a_database_of_another_encoding(run: Runner):
    async def smile(value: str) -> str:
        return value + SMILE

    async def write(session: AsyncSession, value: str) -> str:
        await session.execute(text("SELECT 1"))
        return SMILE

    @task("child")
    async def child(ctx: TaskContext, params: str) -> str:
        return params

    @task("fails", max_attempts=1)
    async def fails(ctx: TaskContext, params: str) -> None:
        raise ValueError(SMILE)

    @task("refuses", max_attempts=1)
    async def refuses(ctx: TaskContext) -> None:
        raise UserError({SMILE: [SMILE, 5]})

    @task("work")
    async def work(ctx: TaskContext) -> list[Any]:
        found = [await ctx.step("smile", smile, SMILE), await ctx.transaction("write", write, SMILE)]
        await ctx.emit_event("smiled", SMILE)
        found += [await ctx.await_event("smiled"), await ctx.join(await ctx.spawn("child", child, SMILE))]
        if ctx.attempt == 1:
            raise Crash(SMILE)
        return found

    run.durable.register(child)
    # One slot, which a run that cannot end would hold for ever.
    error = await run.failure(fails, "x")
    assert error.name == "ValueError"
    assert error.message == "na\\xefve \\U0001f642 \\u5317"
    error = await run.failure(refuses)
    assert error.raw == {"na\\xefve \\U0001f642 \\u5317": ["na\\xefve \\U0001f642 \\u5317", 5]}
    assert await run(work) == [SMILE * 2, SMILE, SMILE, SMILE]
    # The texts of failures are read by SQL, which fails at the escapes of JSON in this encoding.
    async with run.durable.engine.connect() as connection:
        stored = await connection.scalars(text("SELECT error ->> 'message' FROM durable.tasks WHERE error IS NOT NULL"))
        assert len(stored.all()) == 2


async def test_failure_that_the_database_refuses_is_stored_by_its_class_as_soon_as_it_accepts_one(run: Runner):
    @task("fails", max_attempts=1)
    async def fails(ctx: TaskContext) -> None:
        raise ValueError("unwanted " + SMILE)

    @task("healthy")
    async def healthy(ctx: TaskContext) -> str:
        return "well"

    async with run.durable.engine.begin() as connection:
        await connection.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF new.error ->> 'message' LIKE '%unwanted%' THEN RAISE 'no'; END IF; RETURN new; END $$"
            )
        )
        await connection.execute(
            text("CREATE TRIGGER refuse BEFORE UPDATE ON durable.tasks FOR EACH ROW EXECUTE FUNCTION refuse()")
        )
    spawned = await run.spawn(fails)
    error = (await run.wait(spawned)).error
    assert (error.name, error.raw) == ("ValueError", None)
    assert "not stored" in error.message
    assert (await Rows(run.durable, spawned).task()).state == "failed"
    assert await run(healthy) == "well"
