"""Several event loops with one client or one engine: nothing of one loop is used on another, nor kept after its end."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, TaskContext, task
from durable_sa.database import notifier
from durable_sa.database.connections import Database
from durable_sa.errors import InvalidState

# Connections of a loop that was closed without more ado are closed by the garbage collector, with warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

LIMIT = 15.0


@task
async def noop(ctx: TaskContext) -> int:
    return 7


@pytest.fixture(autouse=True)
def collected() -> Generator[None]:
    """Have the warnings of each test within it: the next loop drops what the closed ones had."""
    yield

    async def come() -> None:
        notifier.sender(Database(create_async_engine("postgresql+asyncpg://")))

    asyncio.run(come())
    for _ in range(3):
        gc.collect()


@pytest.fixture
def url(database_url: URL) -> URL:
    async def prepare() -> None:
        async with Durable(database_url) as durable:
            await durable.create_queue()

    in_thread(prepare)
    return database_url


def in_thread(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Return the result of `main` in an event loop of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(asyncio.wait_for(main(), LIMIT))).result(LIMIT + 5)


def spawn_in_threads(durable: Durable, threads: int = 8, rounds: int = 5) -> None:
    together = threading.Barrier(threads)

    def work() -> None:
        together.wait()
        for _ in range(rounds):
            asyncio.run(asyncio.wait_for(durable.spawn(noop), LIMIT))

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result(LIMIT + 5)


async def count(url: URL) -> int:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        return int((await connection.execute(sa.text("SELECT count(*) FROM durable.tasks"))).scalar_one())


def test_threads_with_loops_of_their_own_share_an_engine_without_a_pool(url: URL) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    spawn_in_threads(Durable(engine, tasks=[noop]))
    assert asyncio.run(count(url)) == 40


@pytest.mark.slow
def test_threads_with_loops_of_their_own_share_a_client_of_a_url(url: URL) -> None:
    spawn_in_threads(Durable(url, tasks=[noop]))
    assert asyncio.run(count(url)) == 40


def unfinished(durable: Durable) -> None:
    """Close a loop in the middle of calls."""
    loop = asyncio.new_event_loop()

    async def begin() -> list[asyncio.Task[Any]]:
        first = await durable.spawn(noop)
        calls = [durable.spawn(noop), durable.wait_for_result(first), durable.list_queues()]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        return tasks

    for unended in loop.run_until_complete(asyncio.wait_for(begin(), LIMIT)):
        unended._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()


@pytest.mark.parametrize("kind", ["url", "engine without a pool"])
def test_a_loop_that_was_closed_in_the_middle_of_calls_holds_nothing_up(url: URL, kind: str) -> None:
    durable = Durable(url if kind == "url" else create_async_engine(url, poolclass=NullPool), tasks=[noop])
    unfinished(durable)

    async def go_on() -> int:
        async with durable, durable.worker():
            spawned = await durable.spawn(noop)
            return (await durable.wait_for_result(spawned, timeout=10)).output

    for _ in range(2):
        assert asyncio.run(asyncio.wait_for(go_on(), LIMIT)) == 7


def test_a_pool_with_connections_of_a_closed_loop_is_refused_at_once(url: URL) -> None:
    engine = create_async_engine(url)
    durable = Durable(engine, tasks=[noop])
    asyncio.run(durable.spawn(noop))
    with pytest.raises(InvalidState, match="NullPool"):
        asyncio.run(asyncio.wait_for(durable.spawn(noop), LIMIT))
    with pytest.raises(InvalidState, match="NullPool"):
        asyncio.run(asyncio.wait_for(durable.list_queues(), LIMIT))


def test_a_pool_that_was_disposed_of_before_its_loop_ended_goes_on(url: URL) -> None:
    engine = create_async_engine(url)
    durable = Durable(engine, tasks=[noop])

    async def once() -> None:
        await durable.spawn(noop)
        await durable.close()
        await engine.dispose()

    for _ in range(3):
        asyncio.run(asyncio.wait_for(once(), LIMIT))


async def test_a_pool_that_another_running_loop_uses_is_refused_at_once(url: URL, engine: AsyncEngine) -> None:
    durable = Durable(engine, tasks=[noop])
    await durable.spawn(noop)
    with pytest.raises(InvalidState, match="NullPool"):
        await asyncio.to_thread(asyncio.run, durable.spawn(noop))
    await durable.spawn(noop)


async def test_a_worker_of_another_loop_is_shut_down_by_close(url: URL) -> None:
    durable = Durable(url, tasks=[noop])
    ended: list[bool] = []

    async def work() -> None:
        worker = await durable.start_worker()
        started.set()
        await worker.wait()
        ended.append(True)

    started = threading.Event()
    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, work()))
    await asyncio.to_thread(started.wait, LIMIT)
    spawned = await durable.spawn(noop)
    assert (await durable.wait_for_result(spawned, timeout=10)).output == 7
    await asyncio.wait_for(durable.close(), LIMIT)
    await asyncio.wait_for(thread, LIMIT)
    assert ended
