"""What a worker takes: statements while idle, and nothing that grows, or is left behind, whatever ends it."""

import asyncio
import concurrent.futures
import contextlib
import gc
import random
import threading
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import URL, event, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, SyncTaskContext, TaskContext
from durable_sa.execution.run import Run

from ..support import eventually
from .conftest import Rows
from .stories import named

VICTIMS = "SELECT pid, query FROM pg_stat_activity WHERE application_name = 'victim'"


@pytest.fixture
def statements(database_url: URL) -> Generator[list[str]]:
    """Every statement that any engine in this process sends to the test's database."""
    seen: list[str] = []

    def executed(connection: Any, _: Any, statement: str, *__: Any) -> None:
        if connection.engine.url.database == database_url.database:
            seen.append(statement)

    event.listen(Engine, "before_cursor_execute", executed)
    yield seen
    event.remove(Engine, "before_cursor_execute", executed)


@pytest.mark.slow
async def test_an_idle_worker_sends_at_most_a_statement_a_second(durable: Durable, statements: list[str]) -> None:
    async with durable.worker() as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        await asyncio.sleep(1.0)
        statements.clear()
        await asyncio.sleep(10.0)
        assert len(statements) <= 10, "\n\n".join(statements)


@pytest.mark.slow
async def test_a_task_on_an_idle_worker_costs_a_claim_and_a_completion(durable: Durable, statements: list[str]) -> None:
    """A claim that has taken all that there was is not repeated when a slot becomes free."""

    @durable.task
    async def quick(ctx: TaskContext) -> None: ...

    async with durable.worker(concurrency=5) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        claims = 0
        began_at = time.monotonic()
        for _ in range(20):
            await asyncio.sleep(0.02)
            statements.clear()
            await durable.wait_for_result(await durable.spawn(quick))
            claims += sum("open_lanes" in statement for statement in statements)
        # A worker searches once per second for tasks that no hint has announced, and once more for a hint that comes
        # during a claim, as some do on a busy machine. With two claims a task there are 40.
        assert claims <= 30 + (time.monotonic() - began_at)


@pytest.mark.slow
async def test_a_worker_that_only_waits_for_sleepers_is_as_quiet(
    durable: Durable, sql: Rows, statements: list[str]
) -> None:
    @durable.task
    async def nap(ctx: TaskContext, name: str) -> None:
        await asyncio.gather(ctx.sleep_for("nap", 3600), ctx.await_event(name))

    async with durable.worker() as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        await durable.spawn_many([(nap, f"event-{number}") for number in range(200)])

        async def asleep() -> bool:
            return await sql("SELECT count(*) FROM durable.tasks WHERE state = 'sleeping'") == [(200,)]

        await eventually(asleep)
        await asyncio.sleep(1.5)
        statements.clear()
        await asyncio.sleep(5.0)
        assert len(statements) <= 8, "\n\n".join(statements)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _runs() -> int:
    gc.collect()
    return sum(isinstance(thing, Run) for thing in gc.get_objects())


@pytest.mark.slow
async def test_nothing_grows_over_twenty_thousand_tasks(
    database_url: URL, durable: Durable, sql: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    # The records that pytest keeps of failures have the frames of the runs in their tracebacks.
    caplog.set_level("CRITICAL", "durable_sa")

    async def one(number: int) -> int:
        return number

    others = _runs()
    async with named(database_url, "victim") as victim:

        @victim.task
        async def plain(ctx: TaskContext, number: int) -> int:
            return number

        @victim.task
        async def stepping(ctx: TaskContext, number: int) -> int:
            return await ctx.step("one", one, number)

        @victim.task
        async def gathering(ctx: TaskContext, number: int) -> None:
            await asyncio.gather(ctx.step("one", one, number), ctx.step("two", one, number))

        @victim.task(max_attempts=1)
        async def failing(ctx: TaskContext, number: int) -> None:
            raise ValueError("no")

        @victim.task
        async def napping(ctx: TaskContext, number: int) -> None:
            await ctx.sleep_for("nap", 0.01)

        @victim.task
        def synchronous(ctx: SyncTaskContext, number: int) -> int:
            return number

        tasks = [plain] * 14 + [stepping, stepping, gathering, failing, napping, synchronous]

        async with victim.worker(concurrency=100) as worker:

            async def run(count: int) -> dict[str, int]:
                items = [(tasks[number % len(tasks)], number) for number in range(count)]
                for start in range(0, count, 2000):
                    await victim.spawn_many(items[start : start + 2000])

                async def finished() -> bool:
                    return await sql("SELECT count(*) FROM durable.tasks WHERE outcome IS NULL") == [(0,)]

                await eventually(finished, within=90)
                await eventually(lambda: not worker._background.jobs and not worker._slots.unwritten)
                # The last replies may still be on their way.
                await eventually(lambda: _runs() <= others + 2)
                return {
                    "asyncio tasks": len(asyncio.all_tasks()),
                    "descriptors": _descriptors(),
                    "threads": threading.active_count(),
                    "connections": len(await sql(VICTIMS)),
                    "bytes": psutil.Process().memory_info().rss,
                }

            early = await run(5000)
            late = await run(15000)
    # Batches are larger here and there, but 15,000 tasks that left 1 KB each would be 15 MB.
    assert late.pop("bytes") - early.pop("bytes") < 12 * 1024 * 1024
    for what, count in late.items():
        assert count <= early[what] + 2, (what, early, late)


async def test_two_workers_in_one_process_share_the_work(durable: Durable, sql: Rows) -> None:
    started = 0
    release = asyncio.Event()

    @durable.task
    async def hold(ctx: TaskContext) -> None:
        nonlocal started
        started += 1
        await release.wait()

    await durable.create_queue("other")
    spawned = await durable.spawn_many([(hold, None)] * 10)
    async with (
        durable.worker(concurrency=3),
        durable.worker(concurrency=2) as second,
        durable.worker(concurrency=1, queue_names=["other"]),
    ):
        await eventually(lambda: started == 5)
        held = await sql("SELECT claimed_by, count(*) FROM durable.tasks WHERE state = 'running' GROUP BY 1")
        assert sorted(count for _, count in held) == [2, 3]
        # One may go while the other stays.
        release.set()
        await second.shutdown()
        for spawn in spawned:
            await durable.wait_for_result(spawn, timeout=5)
    assert await sql("SELECT DISTINCT attempt, fence FROM durable.tasks") == [(1, 2)]
    assert await sql("SELECT worker_id FROM durable.workers") == []


@pytest.mark.slow
async def test_workers_on_event_loops_of_several_threads_do_not_meet(
    database_url: URL, durable: Durable, sql: Rows
) -> None:
    counts: list[int] = []

    def serve() -> None:
        async def work() -> None:
            executed = 0
            async with named(database_url, "victim") as victim:

                @victim.task
                async def count(ctx: TaskContext) -> None:
                    nonlocal executed
                    executed += 1
                    await asyncio.sleep(0.002)

                async with victim.worker(concurrency=5):

                    async def finished() -> bool:
                        async with victim.engine.connect() as connection:
                            left = text("SELECT count(*) FROM durable.tasks WHERE outcome IS NULL")
                            return (await connection.execute(left)).scalar() == 0

                    await eventually(finished, within=30)
            counts.append(executed)

        asyncio.run(work())

    @durable.task
    async def count(ctx: TaskContext) -> None:
        raise AssertionError("there is no worker here")

    await durable.spawn_many([(count, None)] * 600)
    await asyncio.gather(*(asyncio.to_thread(serve) for _ in range(3)))
    assert sum(counts) == 600
    assert await sql("SELECT DISTINCT attempt, fence FROM durable.tasks") == [(1, 2)]


async def test_run_worker_in_a_thread_goes_on_until_it_is_shut_down(database_url: URL, durable: Durable) -> None:
    """Signals, which it runs for otherwise, come to the main thread only."""
    over = threading.Event()

    def serve() -> None:
        async def work() -> None:
            async with Durable(database_url) as served:

                @served.task
                async def thread(ctx: TaskContext) -> str:
                    return threading.current_thread().name

                serving = asyncio.create_task(served.run_worker())
                await asyncio.to_thread(over.wait, 30)
                assert not serving.done()
                for worker in served.workers:
                    await worker.shutdown()
                await serving

        asyncio.run(work())

    with concurrent.futures.ThreadPoolExecutor(1, "elsewhere") as pool:
        served = pool.submit(serve)
        result = await durable.wait_for_result(await durable.spawn_by_name("thread", unchecked=True), timeout=20)
        over.set()
        await asyncio.wrap_future(served)
    assert result.output == "elsewhere_0"


async def nothing_left(sql: Rows) -> bool:
    return await sql(VICTIMS) == [] and not [
        task for task in asyncio.all_tasks() if task.get_name().startswith("durable:")
    ]


async def test_cancelling_the_task_that_runs_a_worker_closes_all_its_connections(
    database_url: URL, durable: Durable, sql: Rows
) -> None:
    started = asyncio.Event()
    async with named(database_url, "victim", poolclass=NullPool) as victim:

        @victim.task
        async def hold(ctx: TaskContext) -> None:
            started.set()
            await asyncio.sleep(60)

        await durable.spawn_by_name("hold", unchecked=True)
        serving = asyncio.create_task(victim.run_worker(shutdown_timeout=0.2))
        await started.wait()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        await eventually(lambda: nothing_left(sql))
    assert await sql("SELECT state, failures, lease_losses FROM durable.tasks") == [("pending", 0, 0)]
    assert await sql("SELECT worker_id FROM durable.workers") == []


@pytest.mark.slow
async def test_a_worker_may_be_cancelled_at_any_moment(database_url: URL, durable: Durable, sql: Rows) -> None:
    """While it starts, claims, writes, is idle, or ends; and even several times."""
    chance = random.Random(7)
    async with named(database_url, "victim", poolclass=NullPool) as victim:

        @victim.task
        async def brief(ctx: TaskContext, seconds: float) -> None:
            await ctx.step("rest", asyncio.sleep, seconds)

        for _ in range(12):
            await durable.spawn_many([(brief, chance.uniform(0, 0.03)) for _ in range(20)])
            serving = asyncio.create_task(victim.run_worker(shutdown_timeout=0.0, concurrency=10, claim_timeout=2))
            for _ in range(chance.choice([1, 1, 2, 3])):
                await asyncio.sleep(chance.choice([0.001, 0.01, 0.03, 0.1, 0.2]) * chance.random())
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            await eventually(lambda: nothing_left(sql))
        async with victim.worker(concurrency=50, claim_timeout=2):

            async def finished() -> bool:
                return await sql("SELECT count(*) FROM durable.tasks WHERE outcome IS NULL") == [(0,)]

            await eventually(finished, within=20)
    assert await sql("SELECT DISTINCT outcome, failures FROM durable.tasks") == [("completed", 0)]


async def test_a_worker_in_a_task_group_ends_with_it(database_url: URL, durable: Durable, sql: Rows) -> None:
    async with named(database_url, "victim", poolclass=NullPool) as victim:
        with pytest.RaisesGroup(pytest.RaisesExc(LookupError)):
            async with asyncio.TaskGroup() as group:
                group.create_task(victim.run_worker())
                await eventually(lambda: _registered(sql))
                raise LookupError
        await eventually(lambda: nothing_left(sql))
    assert await sql("SELECT worker_id FROM durable.workers") == []


async def _registered(sql: Rows) -> bool:
    return await sql("SELECT count(*) FROM durable.workers") == [(1,)]


async def test_the_lifespan_surrounds_the_worker(engine: AsyncEngine, sql: Rows) -> None:
    story: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncGenerator[dict[str, int]]:
        story.append("begin")
        yield {"answer": 42}
        story.append("end")

    durable = Durable(engine, lifespan=lifespan)

    @durable.task
    async def ask(ctx: TaskContext[dict[str, int]]) -> int:
        story.append("task")
        return ctx.state["answer"]

    for _ in range(2):
        async with durable.worker():
            spawned = await durable.spawn(ask)
            assert (await durable.wait_for_result(spawned, timeout=5)).output == 42
    assert story == ["begin", "task", "end"] * 2


async def test_after_a_worker_its_process_is_as_it_was(engine: AsyncEngine, durable: Durable) -> None:
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    async with durable.worker():
        pass
    before = (_descriptors(), threading.active_count(), len(asyncio.all_tasks()))
    for _ in range(5):
        async with durable.worker() as worker:
            await eventually(lambda: worker._listener is not None and worker._listener.working)
    gc.collect()
    assert loop.get_task_factory() is factory
    assert (_descriptors(), threading.active_count(), len(asyncio.all_tasks())) == before
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_a_private_engine_of_the_application_is_used_as_it_is(
    database_url: URL, durable: Durable, sql: Rows
) -> None:
    """Its connections are made by the application's own events, also those that belong to the worker alone."""
    engine = create_async_engine(database_url, poolclass=NullPool, pool_pre_ping=True)
    connected: list[str] = []

    @event.listens_for(engine.sync_engine, "do_connect")
    def connecting(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        connected.append(threading.current_thread().name)
        parameters["server_settings"] = {"application_name": "victim"}

    async with Durable(engine) as victim, victim.worker(claim_timeout=1) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        await eventually(lambda: "durable-heartbeat" in connected)
        rows = await sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name <> 'victim' AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        # The pool of the fixture's own engine.
        assert rows[0][0] <= 1
    await engine.dispose()
    await eventually(lambda: nothing_left(sql))


async def test_a_workers_connections_know_the_types_of_its_statements_from_the_start(durable: Durable) -> None:
    async with durable.worker(listen=False) as worker:
        for connection in worker._connections:
            assert connection._connection is not None
            driver: Any = (await connection._connection.get_raw_connection()).driver_connection
            known = driver._protocol.get_settings()
            for oid in (2951, 1016, 1000, 1022, 1185):  # arrays of uuid, bigint, boolean, double precision, timestamptz
                assert known.get_data_codec(oid) is not None
