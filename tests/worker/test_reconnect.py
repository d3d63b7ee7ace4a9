"""The database comes and goes: connections, statements and whole servers, and no task is the worse for it."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Generator
from typing import Any, NoReturn

import pytest
from sqlalchemy import URL, Connection, event, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, SpawnResult, TaskContext
from durable_sa.embedded import EmbeddedServer, temporary_server

from ..client.support import Gate
from ..support import eventually
from .conftest import Rows
from .stories import Parts, Story, assert_stories_ended_well, create_bookings, named

SEED = 20


@pytest.mark.slow
async def test_any_connection_of_a_worker_may_be_terminated_at_any_time(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows
) -> None:
    await create_bookings(engine)
    chance = random.Random(SEED)
    async with named(database_url, "victim") as victim:
        story = Story(victim)
        async with victim.worker(concurrency=20):
            spawned = await durable.spawn_many([(story.task, Parts())] * 60)
            terminated, until = 0, time.monotonic() + 2.5
            while time.monotonic() < until or terminated <= 20:
                pids = await sql("SELECT pid FROM pg_stat_activity WHERE application_name = 'victim'")
                for (pid,) in chance.sample(pids, min(len(pids), 2)):
                    terminated += 1
                    await sql("SELECT pg_terminate_backend(:pid)", pid=pid)
                await asyncio.sleep(chance.uniform(0, 0.02))
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=30)).output == 3
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]
    # In a run that goes on, a step whose result could not be stored at first is not run again.
    assert set(story.executed.values()) == {1}


class Route(Gate):
    """A way to the database that can be lost without anybody being told: what was connected hears nothing any more."""

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self._dead: set[asyncio.StreamWriter] = set()

    def lose(self) -> None:
        self._dead = set(self._connections)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event, *, asks: bool
    ) -> None:
        while data := await reader.read(65536):
            if writer not in self._dead:
                writer.write(data)
        writer.transport.abort()


@pytest.mark.slow
async def test_connections_that_answer_nothing_are_given_up_and_no_lease_is_lost(
    database_url: URL, durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.database.channel.STATEMENT_DEADLINE", 0.5)
    route = Route(database_url)
    await route.open()
    async with Durable(create_async_engine(route.url, poolclass=NullPool)) as client:

        @client.task(max_attempts=1)
        async def work(ctx: TaskContext, number: int) -> int:
            total = 0
            for part in range(number):
                total += await ctx.step("part", asyncio.sleep, 0.02, part)
            return total

        async with client.worker(concurrency=10, claim_timeout=15, listen=False):
            running = await durable.spawn_by_name("work", 20, unchecked=True)
            await eventually(lambda: sql("SELECT 1 FROM durable.tasks WHERE state = 'running'"))
            route.lose()
            pending = await durable.spawn_by_name("work", 2, unchecked=True)
            for each in (running, pending):
                await durable.wait_for_result(each, timeout=14)
    await route.shut()
    assert await sql("SELECT DISTINCT state, attempt, failures FROM durable.tasks") == [("completed", 1, 0)]


@pytest.mark.slow
async def test_a_call_on_a_connection_that_answers_nothing_holds_up_no_other(database_url: URL) -> None:
    """As after a firewall has forgotten a connection of the pool: that call waits, as each of the application's does."""
    route = Route(database_url)
    await route.open()
    engine = create_async_engine(route.url)
    async with Durable(engine) as client:
        known = await client.spawn_by_name("work", unchecked=True)
        # The connection of the spawn is back in the pool, so the pool has only the three that are opened below.
        await eventually(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
        calls = (
            lambda: client.spawn_by_name("work", unchecked=True),
            lambda: client.spawn_by_name("work", unchecked=True, idempotency_key="key"),
            lambda: client.get_task_result(known),
        )
        async with contextlib.AsyncExitStack() as taken:
            for _ in calls:
                await taken.enter_async_context(engine.connect())
        route.lose()
        stuck = [asyncio.ensure_future(call()) for call in calls]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(8):
            await asyncio.gather(*(call() for call in calls for _ in range(20)))
        assert not any(call.done() for call in stuck)
        await route.shut()
        await asyncio.gather(*stuck, return_exceptions=True)
    await engine.dispose()


@pytest.mark.slow
async def test_statements_may_be_cancelled_at_any_time(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows
) -> None:
    await create_bookings(engine)
    async with named(database_url, "victim") as victim:
        story = Story(victim)
        async with victim.worker(concurrency=20):
            # Without transactions, whose statements, and the errors of these, are the user's.
            spawned = await durable.spawn_many([(story.task, Parts(book=False))] * 40)
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                await sql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'victim'")
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=30)).output == 3
    await assert_stories_ended_well(sql, spawned, booked=False)


def cut(connection: Connection) -> NoReturn:
    """What a driver does when it finds its connection gone."""
    connection.invalidate()
    gone = ConnectionResetError("cut by the test")
    raise OperationalError("", None, gone, connection_invalidated=True)


class Fault:
    """Cuts the connection before or after one chosen statement of an engine."""

    def __init__(self, engine: AsyncEngine, when: str) -> None:
        self.at = 0
        self.seen = 0
        self.statement: str | None = None

        def executed(connection: Connection, _: Any, statement: str, *__: Any) -> None:
            self.seen += 1
            if self.seen == self.at:
                self.statement = statement
                cut(connection)

        event.listen(engine.sync_engine, f"{when}_cursor_execute", executed)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.slow
async def test_the_reply_to_any_statement_may_be_lost_and_so_may_the_statement(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Each statement of a worker once, one after the other, as far as a task has statements."""
    monkeypatch.setattr("durable_sa.worker.claims.LISTENING_POLL_INTERVAL", 0.3)
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_INTERVAL", 0.2)
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_AGE", 0.2)
    await create_bookings(engine)
    statements: list[str] = []
    async with named(database_url, "victim") as victim:
        fault = Fault(victim.engine, when)
        story = Story(victim)
        async with victim.worker():
            spawned = []
            for number in range(1, 60):
                fault.seen, fault.at, fault.statement = 0, number, None
                spawned.append(await durable.spawn(story.task, Parts(steps=1, pause=0, sleep=0.02)))
                result = await durable.wait_for_result(spawned[-1], timeout=15)
                assert result.output == 0, (result, fault.statement)
                if fault.statement is None:
                    break
                statements.append(fault.statement)
            fault.at = 0
            await eventually(lambda: _all_ended(sql))
    assert len(statements) > 15
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]
    assert set(story.executed.values()) == {1}


async def _all_ended(sql: Rows) -> bool:
    return await sql("SELECT count(*) FROM durable.tasks WHERE outcome IS NULL") == [(0,)]


@pytest.mark.slow
async def test_a_claim_whose_reply_was_lost_is_run(database_url: URL, durable: Durable, sql: Rows) -> None:
    async with named(database_url, "victim") as victim:

        @victim.task(max_attempts=1)
        async def quick(ctx: TaskContext) -> int:
            return ctx.attempt

        lost = 0

        def executed(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
            nonlocal lost
            if statement.startswith("WITH open_lanes") and cursor.rowcount and lost < 5:
                lost += 1
                cut(connection)

        event.listen(victim.engine.sync_engine, "after_cursor_execute", executed)
        async with victim.worker(concurrency=5):
            spawned = [await durable.spawn(quick) for _ in range(30)]
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=10)).output == 1
    assert lost == 5
    assert await sql("SELECT DISTINCT attempt, failures, lease_losses, fence FROM durable.tasks") == [(1, 0, 0, 2)]


@pytest.mark.slow
async def test_a_transaction_whose_commit_got_no_reply_is_not_repeated(
    database_url: URL, engine: AsyncEngine, durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create_bookings(engine)
    async with named(database_url, "victim") as victim:
        story = Story(victim)
        commit = victim.engine.dialect.do_commit
        lost = 0

        def commit_silently(connection: Any) -> None:
            nonlocal lost
            commit(connection)
            if lost < 3:
                lost += 1
                connection.driver_connection.terminate()
                raise victim.engine.dialect.loaded_dbapi.InterfaceError("connection is closed")

        monkeypatch.setattr(victim.engine.dialect, "do_commit", commit_silently)
        async with victim.worker():
            spawned = [await durable.spawn(story.task, Parts(steps=1)) for _ in range(5)]
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=10)).output == 0
    assert lost == 3
    await assert_stories_ended_well(sql, spawned)


@pytest.fixture(scope="module")
def private_server() -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off"}) as server:
        yield server


@pytest.fixture
async def private(private_server: EmbeddedServer) -> AsyncGenerator[Durable]:
    """A client of a server that may be stopped, with tables of its own."""
    private_server.start()
    engine = create_async_engine(private_server.url(), poolclass=NullPool)
    async with Durable(engine) as durable:
        async with engine.begin() as connection:
            await connection.execute(text("DROP SCHEMA IF EXISTS durable CASCADE"))
            await connection.execute(text("DROP TABLE IF EXISTS public.bookings"))
        await durable.migrate()
        await create_bookings(engine)
        yield durable


def queries(durable: Durable) -> Rows:
    async def run(statement: Any, **parameters: Any) -> list[Any]:
        async with durable.engine.begin() as connection:
            result = await connection.execute(text(statement), parameters)
            return list(result.all()) if result.returns_rows else []

    return run


@pytest.mark.parametrize("how", ["fast", "immediate", "backend killed", "killed"])
@pytest.mark.slow
async def test_a_restart_of_the_server_fails_no_task(
    private: Durable, private_server: EmbeddedServer, how: str
) -> None:
    sql = queries(private)
    async with named(private_server.url(), "victim") as victim:
        story = Story(victim)
        async with victim.worker(concurrency=30, claim_timeout=60):
            spawned = await private.spawn_many([(story.task, Parts(steps=30, pause=0.03, sleep=0.5))] * 30)
            await eventually(lambda: len(story.executed) > 200)
            if how == "backend killed":
                ((pid,),) = await sql(
                    "SELECT pid FROM pg_stat_activity WHERE application_name = 'victim' ORDER BY pid LIMIT 1"
                )
                # The server takes itself for damaged then, and starts all over.
                os.kill(pid, signal.SIGKILL)
            elif how == "killed":
                await asyncio.to_thread(private_server.kill)
                await asyncio.to_thread(private_server.start)
            else:
                await asyncio.to_thread(private_server.stop, how)  # type: ignore[arg-type]
                await asyncio.sleep(0.5)
                await asyncio.to_thread(private_server.start)
            for spawn in spawned:
                await _patiently(private, spawn)
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]
    assert set(story.executed.values()) == {1}


async def _patiently(durable: Durable, spawn: SpawnResult[int]) -> None:
    """The result, from a server that may not take connections yet."""

    async def ended() -> bool:
        try:
            return (await durable.wait_for_result(spawn, timeout=30)).output == sum(range(30))
        except (SQLAlchemyError, ConnectionError, FileNotFoundError):
            return False

    await eventually(ended, within=40)


@pytest.mark.slow
async def test_an_outage_longer_than_the_lease_costs_attempts_but_no_failures(
    private: Durable, private_server: EmbeddedServer
) -> None:
    sql = queries(private)
    async with named(private_server.url(), "victim") as victim:
        story = Story(victim)
        async with victim.worker(concurrency=10, claim_timeout=1):
            spawned = await private.spawn_many([(story.task, Parts(steps=30, pause=0.1))] * 10)
            await eventually(lambda: len(story.executed) > 50)
            await asyncio.to_thread(private_server.stop)
            await asyncio.sleep(2.5)
            await asyncio.to_thread(private_server.start)
            for spawn in spawned:
                await _patiently(private, spawn)
    await assert_stories_ended_well(sql, spawned)
    ((most,),) = await sql("SELECT max(attempt) FROM durable.tasks")
    assert most >= 2
    # What was being executed when the lease ended runs once more, and nothing else.
    assert max(story.executed.values()) <= most


@pytest.mark.slow
async def test_a_worker_waits_for_connections_while_the_server_has_none_left(
    private: Durable, private_server: EmbeddedServer
) -> None:
    sql = queries(private)
    async with named(private_server.url(), "victim", poolclass=NullPool) as victim:
        story = Story(victim)
        async with victim.worker(concurrency=10, claim_timeout=30):
            async with contextlib.AsyncExitStack() as stack:
                hogging = create_async_engine(private_server.url(), poolclass=NullPool)
                spawned = await private.spawn_many([(story.task, Parts())] * 10)

                async def take() -> None:
                    while True:
                        connection = await stack.enter_async_context(hogging.connect())
                        assert not connection.closed

                with pytest.raises(DBAPIError, match=r"too many clients|reserved"):
                    await take()
                await asyncio.sleep(1.0)
            await hogging.dispose()
            for spawn in spawned:
                assert (await private.wait_for_result(spawn, timeout=20)).output == 3
    await assert_stories_ended_well(sql, spawned)


async def test_a_worker_that_is_started_without_a_database_says_so(private_server: EmbeddedServer) -> None:
    await asyncio.to_thread(private_server.stop, "immediate")
    engine = create_async_engine(private_server.url(), poolclass=NullPool)
    try:
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await Durable(engine).start_worker()
    finally:
        await asyncio.to_thread(private_server.start)
        await engine.dispose()
