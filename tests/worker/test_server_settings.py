"""Whatever a DBA has set for the role or the database, and however many connections the pool has."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import URL, select
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from durable_sa import Durable, InvalidConfiguration, TaskContext, TaskRow

from ..support import eventually
from .conftest import Rows
from .stories import Parts, Story, assert_stories_ended_well, create_bookings, named

SETTINGS = {
    "serializable": {"default_transaction_isolation": "serializable"},
    "repeatable read": {"default_transaction_isolation": "repeatable read"},
    "short timeouts": {"lock_timeout": "50ms", "statement_timeout": "2s"},
    "impatience": {"idle_session_timeout": "150ms", "idle_in_transaction_session_timeout": "150ms"},
    "other formats": {
        "timezone": "Asia/Kathmandu",
        "datestyle": "German, DMY",
        "intervalstyle": "sql_standard",
        "bytea_output": "escape",
        "extra_float_digits": "0",
        "standard_conforming_strings": "off",
        "search_path": "nowhere",
    },
    "a planner without plans": {"enable_indexscan": "off", "plan_cache_mode": "force_generic_plan", "jit": "on"},
    "deferred": {"default_transaction_deferrable": "on", "default_transaction_isolation": "serializable"},
}


async def alter_database(sql: Rows, url: URL, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        await sql(f"""ALTER DATABASE "{url.database}" SET {name} = '{value}'""")


@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(value, id=name, marks=[pytest.mark.slow] * (name == "impatience"))
        for name, value in SETTINGS.items()
    ],
)
async def test_the_settings_of_the_database_change_nothing(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows, settings: dict[str, str], driver: str
) -> None:
    await create_bookings(engine)
    await alter_database(sql, database_url, settings)
    url = database_url.set(drivername=f"postgresql+{driver}")
    clients = [Durable(url) for _ in range(2)]
    try:
        stories = [Story(client) for client in clients]
        async with clients[0].worker(concurrency=20), clients[1].worker(concurrency=20):
            spawned = [await clients[0].spawn(stories[0].task, Parts(steps=2)) for _ in range(20)]
            for spawn in spawned:
                result = await clients[0].wait_for_result(spawn, timeout=30)
                assert result.output == 1, result
    finally:
        for client in clients:
            await client.close()
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]


async def test_times_that_the_driver_cannot_read_are_refused(database_url: URL, durable: Durable, sql: Rows) -> None:
    await alter_database(sql, database_url, {"datestyle": "German, DMY"})
    url = database_url.set(drivername="postgresql+psycopg")
    engine = create_async_engine(url)
    with pytest.raises(InvalidConfiguration, match="'German, DMY'.*options"):
        await Durable(engine).start_worker()
    await engine.dispose()
    # As the message says.
    engine = create_async_engine(url, connect_args={"options": "-c datestyle=ISO"})
    worker = await Durable(engine).start_worker()
    await worker.shutdown()
    await engine.dispose()


LEVELS = (
    "CREATE TABLE public.levels (level text)",
    """
    CREATE FUNCTION public.note_level() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO public.levels VALUES (current_setting('transaction_isolation')); RETURN NULL; END $$
    """,
    "CREATE TRIGGER note_level AFTER INSERT OR UPDATE ON durable.tasks EXECUTE FUNCTION public.note_level()",
)


@pytest.mark.slow
async def test_an_isolation_that_is_set_while_the_worker_runs_changes_nothing(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows
) -> None:
    await create_bookings(engine)
    async with named(database_url, "victim") as victim:
        story = Story(victim)
        async with victim.worker(concurrency=20):
            await victim.wait_for_result(await durable.spawn(story.task, Parts()), timeout=10)
            for statement in LEVELS:
                await sql(statement)
            await alter_database(sql, database_url, {"default_transaction_isolation": "serializable"})
            await sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid()"
            )

            spawned = [await durable.spawn(story.task, Parts(steps=2)) for _ in range(30)]
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=30)).output == 1
    assert await sql("SELECT DISTINCT level FROM public.levels") == [("read committed",)]
    assert await sql("SELECT DISTINCT failures, attempt, lease_losses FROM durable.tasks") == [(0, 1, 0)]


@pytest.mark.slow
async def test_a_row_that_somebody_holds_is_waited_for_beyond_any_lock_timeout(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows
) -> None:
    """By steps, transactions, suspensions and completions; and the other runs of the worker do not wait with it."""
    await create_bookings(engine)
    await alter_database(sql, database_url, {"lock_timeout": "20ms"})
    started = {name: asyncio.Event() for name in ("step", "transaction", "suspension", "completion", "failure")}
    go_on = asyncio.Event()

    async def one(*_: Any) -> int:
        return 1

    async with named(database_url, "victim") as victim:

        @victim.task(max_attempts=1)
        async def held(ctx: TaskContext, what: str) -> int:
            started[what].set()
            await go_on.wait()
            match what:
                case "step":
                    return await ctx.step("one", one)
                case "transaction":
                    return await ctx.transaction("one", _book)
                case "suspension":
                    await ctx.sleep_for("nap", 0.05)
                case "failure":
                    raise ValueError("as it should")
            return 1

        @victim.task
        async def other(ctx: TaskContext) -> int:
            return await ctx.step("one", one)

        async with victim.worker(concurrency=10):
            spawned = {what: await victim.spawn(held, what) for what in started}
            for event in started.values():
                await event.wait()
            async with engine.connect() as connection, connection.begin():
                await connection.execute(select(TaskRow.task_id).with_for_update())
                go_on.set()
                for _ in range(20):
                    assert (await victim.wait_for_result(await victim.spawn(other), timeout=5)).output == 1
                await asyncio.sleep(0.5)
                ended = "SELECT count(*) FROM durable.tasks WHERE task_name = 'held' AND outcome IS NOT NULL"
                assert await sql(ended) == [(0,)]
            for what, spawn in spawned.items():
                result = await victim.wait_for_result(spawn, timeout=10)
                if what == "failure":
                    assert result.error is not None
                    assert result.error.message == "as it should"
                else:
                    assert result.output == 1, result
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]
    assert await sql("SELECT count(*) FROM public.bookings") == [(1,)]


async def _book(session: AsyncSession) -> int:
    await (await session.connection()).exec_driver_sql("INSERT INTO public.bookings VALUES ('once')")
    return 1


@pytest.mark.parametrize(("size", "overflow"), [(1, 0), (2, 0), (1, 1)])
async def test_a_pool_without_three_connections_is_refused(database_url: URL, size: int, overflow: int) -> None:
    engine = create_async_engine(database_url, pool_size=size, max_overflow=overflow, pool_timeout=0.3)
    try:
        with pytest.raises(InvalidConfiguration, match="pool_size"):
            await Durable(engine).start_worker()
        assert isinstance(engine.pool, AsyncAdaptedQueuePool)
        assert engine.pool.checkedout() == 0
    finally:
        await engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "overflow"), [(3, 0), (1, 2)])
async def test_a_pool_of_three_connections_does(
    database_url: URL, durable: Durable, sql: Rows, size: int, overflow: int
) -> None:
    async with named(database_url, "victim", pool_size=size, max_overflow=overflow, pool_timeout=1) as victim:

        @victim.task
        async def parent(ctx: TaskContext) -> int:
            handle = await ctx.spawn("child", child)
            await ctx.sleep_for("nap", 0.05)
            await ctx.emit_event(f"event-{ctx.task_id}")
            await ctx.await_event(f"event-{ctx.task_id}")
            return await ctx.join(handle)

        @victim.task
        async def child(ctx: TaskContext) -> int:
            return await ctx.step("one", _one)

        async with victim.worker(concurrency=5):
            spawned = [await durable.spawn(parent) for _ in range(10)]
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=15)).output == 1
    assert await sql("SELECT worker_id FROM durable.workers") == []


async def _one() -> int:
    return 1


@pytest.mark.parametrize(("size", "overflow"), [(3, 0), (4, 0)])
async def test_a_transaction_that_finds_no_connection_says_what_to_raise(
    database_url: URL, durable: Durable, engine: AsyncEngine, caplog: pytest.LogCaptureFixture, size: int, overflow: int
) -> None:
    await create_bookings(engine)
    async with named(database_url, "victim", pool_size=size, max_overflow=overflow, pool_timeout=0.1) as victim:

        @victim.task
        async def booking(ctx: TaskContext) -> int:
            return await ctx.transaction("book", _book)

        async with victim.worker(concurrency=5):
            narrow = (
                "the pool has 3 connections, which the worker keeps, and no room for ctx.transaction; raise pool_size "
                "or max_overflow"
            )
            assert (narrow in caplog.messages) == (size == 3)
            held = None if size == 3 else await victim.engine.connect()
            spawned = [await durable.spawn(booking) for _ in range(3)]

            async def warnings() -> list[str]:
                return [line for line in caplog.messages if line.startswith("transactions wait for a connection")]

            exhausted = (
                f"transactions wait for a connection: the pool of {size} connections has none left, and the worker "
                "keeps three of them; raise pool_size or max_overflow"
            )
            assert await eventually(warnings) == [exhausted]
            if held is None:
                for spawn in spawned:
                    await durable.cancel_task(spawn)
            else:
                await held.close()
                for spawn in spawned:
                    assert (await durable.wait_for_result(spawn, timeout=15)).output == 1


@pytest.mark.slow
async def test_an_engine_without_a_pool_does(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows
) -> None:
    await create_bookings(engine)
    async with named(database_url, "victim", poolclass=NullPool) as victim:
        story = Story(victim)
        async with victim.worker(concurrency=20):
            spawned = [await durable.spawn(story.task, Parts()) for _ in range(20)]
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=15)).output == 3
    await assert_stories_ended_well(sql, spawned)


@pytest.mark.slow
async def test_a_pool_that_the_application_has_exhausted_does_not_stop_a_worker(
    database_url: URL, durable: Durable, sql: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    async with named(database_url, "victim", pool_size=5, max_overflow=0, pool_timeout=0.3) as victim:

        @victim.task
        async def step(ctx: TaskContext) -> int:
            return await ctx.step("one", _one)

        async with victim.worker(concurrency=5, claim_timeout=2):
            taken = [await victim.engine.connect() for _ in range(2)]
            try:
                with pytest.raises(PoolTimeout):
                    taken.append(await victim.engine.connect())
                await asyncio.sleep(2.5)
                spawned = [await durable.spawn(step) for _ in range(10)]
                for spawn in spawned:
                    assert (await durable.wait_for_result(spawn, timeout=5)).output == 1
            finally:
                for connection in taken:
                    await connection.close()
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []


@pytest.mark.slow
async def test_runs_that_hold_all_connections_while_they_wait_for_the_worker_do_not_stop_it_for_good(
    database_url: URL, durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds a session of its own over its steps, and what the worker has lost was taken by the next of them."""
    monkeypatch.setattr("durable_sa.database.channel.POOL_PATIENCE", 0.5)
    async with named(database_url, "victim", pool_size=6, max_overflow=0, pool_timeout=20) as victim:

        @victim.task(max_attempts=1)
        async def holding(ctx: TaskContext) -> int:
            async with victim.engine.connect():
                for number in range(10):
                    await ctx.step(f"step-{number}", asyncio.sleep, 0.02)
            return 1

        async with victim.worker(concurrency=20):
            spawned = await durable.spawn_many([(holding, None)] * 20)
            assert isinstance(victim.engine.pool, AsyncAdaptedQueuePool)
            await eventually(lambda: sql("SELECT 1 FROM durable.checkpoints"))
            await sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'victim'")
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=15)).output == 1
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]
    assert await sql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'victim'") == []


@pytest.mark.slow
async def test_a_worker_keeps_within_its_budget_of_connections(database_url: URL, durable: Durable, sql: Rows) -> None:
    async with named(database_url, "victim", pool_size=20) as victim:

        @victim.task
        async def step(ctx: TaskContext) -> None:
            for _ in range(3):
                await ctx.step("one", _one)

        pool = victim.engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)
        pooled, connected = [], []
        async with victim.worker(concurrency=100):
            await eventually(lambda: _listens(sql))
            spawned = await durable.spawn_many([(step, None)] * 500)
            for spawn in spawned:
                pooled.append(pool.checkedout())
                await durable.wait_for_result(spawn, timeout=30)
                if len(pooled) % 25 == 0:
                    ((count,),) = await sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'victim'")
                    connected.append(count)
        # Claims, writes and the rest; besides these, now and then a hint, and of their own the heartbeat and LISTEN.
        assert max(pooled) <= 4
        assert max(connected) <= 6


async def _listens(sql: Rows) -> bool:
    rows = await sql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'victim' AND query ILIKE 'LISTEN%'")
    return bool(rows)


@pytest.mark.slow
async def test_a_worker_starts_and_ends_although_the_server_ends_what_is_idle(
    database_url: URL, durable: Durable, sql: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """Between its statements, too: the application's own start takes its time, and so does a quiet night."""
    await alter_database(sql, database_url, {"idle_session_timeout": "80ms"})

    @asynccontextmanager
    async def slow() -> AsyncGenerator[None]:
        await asyncio.sleep(0.2)
        yield

    url = database_url.set(drivername="postgresql+psycopg")
    async with Durable(url, lifespan=slow) as client:

        @client.task
        async def work(ctx: TaskContext) -> int:
            return await ctx.step("one", int)

        async with client.worker():
            await asyncio.sleep(0.2)
            assert (await client.wait_for_result(await client.spawn(work), timeout=10)).output == 0
            await asyncio.sleep(0.2)
    assert await sql("SELECT count(*) FROM durable.workers") == [(0,)]
    assert "has ended with work left" not in caplog.text
