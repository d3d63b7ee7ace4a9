"""Calls without an event loop: in the transaction of any of the six executors, and waiting for a result."""

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from durable_sa import (
    Durable,
    InvalidConfiguration,
    InvalidCron,
    InvalidState,
    Limit,
    QueueNotFound,
    Rate,
    ScheduleFilter,
    ScheduleNotFound,
    TaskContext,
    TaskNotFound,
    TaskStatus,
    UserError,
    task,
)

Execute = Callable[..., Any]


@task
async def square(ctx: TaskContext, number: int) -> int:
    if number < 0:
        raise UserError("negative")
    return number * number


@asynccontextmanager
async def executor(kind: str, engine: AsyncEngine, sync_engine: Engine) -> AsyncGenerator[Any]:
    """One of the six executors, in a transaction that is committed."""
    match kind:
        case "AsyncSession":
            async with AsyncSession(engine) as session, session.begin():
                yield session
        case "async_scoped_session":
            scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
            yield scoped
            await scoped.commit()
            await scoped.remove()
        case "AsyncConnection":
            async with engine.begin() as connection:
                yield connection
        case "Session":
            with Session(sync_engine) as sync_session, sync_session.begin():
                yield sync_session
        case "scoped_session":
            sync_scoped = scoped_session(sessionmaker(sync_engine))
            yield sync_scoped
            sync_scoped.commit()
            sync_scoped.remove()
        case _:
            with sync_engine.begin() as sync_connection:
                yield sync_connection


KINDS = ["AsyncSession", "async_scoped_session", "AsyncConnection", "Session", "scoped_session", "Connection"]


async def result_of(call: Any, kind: str) -> Any:
    """Return the result of a call, awaited if the executor is asynchronous."""
    assert inspect.isawaitable(call) == kind.startswith(("Async", "async"))
    return await call if inspect.isawaitable(call) else call


@pytest.mark.parametrize("kind", KINDS)
async def test_all_calls_with_an_executor(kind: str, durable: Durable, engine: AsyncEngine, sync_engine: Engine):
    durable.register(square)
    async with executor(kind, engine, sync_engine) as session:
        assert await result_of(durable.create_queue_with(session, "mail", retention=60), kind) is None
        spawned = await result_of(durable.spawn_with(session, square, -3, queue_name="mail"), kind)
        found = await result_of(durable.get_task_result_with(session, spawned), kind)
        assert found.status is TaskStatus.PENDING
        created = durable.create_schedule_with(
            session, "nightly", task=square, params=2, cron_expression="0 3 * * *", queue_name="mail"
        )
        assert await result_of(created, kind) is None
        await result_of(
            durable.create_schedule_with(session, "gone", task=square, params=2, cron_expression="* * * * *"), kind
        )
        assert await result_of(durable.delete_schedule_with(session, "gone"), kind) is None
        await result_of(durable.cancel_task_with(session, spawned), kind)
        assert await result_of(durable.retry_task_with(session, spawned, max_attempts=7), kind) is TaskStatus.PENDING
        missing = await result_of(durable.get_task_result_with(session, spawned.run_id), kind)
        assert missing is None
        # Nothing of it is to be seen before the commit.
        assert await durable.get_task_result(spawned) is None
        assert await durable.list_queues() == ["default"]
    assert await durable.list_queues() == ["default", "mail"]
    assert [info.name for info in await durable.list_schedules(ScheduleFilter())] == ["nightly"]
    async with durable.worker(queue_names=["mail"]):
        failed = await durable.wait_for_result(spawned, timeout=10)
    async with executor(kind, engine, sync_engine) as session:
        assert await result_of(durable.get_task_result_with(session, spawned), kind) == failed


@pytest.mark.parametrize("kind", KINDS)
async def test_a_queue_is_created_with_its_limits(
    kind: str, durable: Durable, engine: AsyncEngine, sync_engine: Engine
):
    durable.register(square)
    policy: Any = {"limit": Limit(concurrency=5), "limit_per_key": Limit(concurrency=1, rate=Rate(60, per=60, burst=9))}
    async with executor(kind, engine, sync_engine) as session:
        assert await result_of(durable.create_queue_with(session, "llm", **policy), kind) is None
        spawned = await result_of(durable.spawn_with(session, square, 3, queue_name="llm", limit_key="a"), kind)
    async with executor(kind, engine, sync_engine) as session:
        # The same call, in another migration.
        await result_of(durable.create_queue_with(session, "llm", **policy), kind)
        for other in (
            {"limit": None},
            {"limit_per_key": Limit(concurrency=2)},
            {**policy, "limit": Limit(concurrency=6)},
        ):
            with pytest.raises(InvalidState, match="has other limits"):
                await result_of(durable.create_queue_with(session, "llm", **other), kind)
        await result_of(durable.create_queue_with(session, "default", limit=None), kind)
    async with durable.worker(queue_names=["llm"]):
        assert (await durable.wait_for_result(spawned, timeout=10)).output == 9
    (statistics,) = await durable.queue_statistics("llm")
    assert statistics.limit_keys in ({"open": 1}, {"full": 1}, {"throttled": 1})


async def test_calls_with_a_session_are_refused_like_the_others(durable: Durable, sync_engine: Engine):
    durable.register(square)
    with Session(sync_engine) as session, session.begin():
        with pytest.raises(InvalidCron):
            durable.create_schedule_with(session, "x", task=square, params=1, cron_expression="at noon")
        with pytest.raises(QueueNotFound):
            durable.create_schedule_with(
                session, "x", task=square, params=1, cron_expression="* * * * *", queue_name="nowhere"
            )
        with pytest.raises(ScheduleNotFound):
            durable.delete_schedule_with(session, "x")
        with pytest.raises(InvalidConfiguration, match="max_attempts"):
            durable.retry_task_with(session, durable.spawn_with(session, square, 1), max_attempts=0)
        with pytest.raises(InvalidState, match="pending"):
            durable.retry_task_with(session, durable.spawn_with(session, square, 1))
        with pytest.raises(TypeError, match="unexpected keyword argument 'limits'"):
            durable.create_queue_with(session, "x", limits=1)
        # The transaction is usable after all of them.
        assert durable.create_queue_with(session, "y") is None
    assert "y" in await durable.list_queues()


@pytest.fixture
async def clients(database_url: URL, sync_engine: Engine) -> AsyncGenerator[dict[str, Durable]]:
    """Clients that can wait without a loop, by what they are made of."""
    psycopg = database_url.set(drivername="postgresql+psycopg")
    async_engine = create_async_engine(psycopg)
    made = {
        "Engine": Durable(sync_engine, tasks=[square]),
        "sessionmaker": Durable(sessionmaker(sync_engine), tasks=[square]),
        "URL of psycopg2": Durable(database_url.set(drivername="postgresql+psycopg2"), tasks=[square]),
        "URL of psycopg": Durable(psycopg, tasks=[square]),
        "AsyncEngine of psycopg": Durable(async_engine, tasks=[square]),
        "async_sessionmaker of psycopg": Durable(async_sessionmaker(async_engine), tasks=[square]),
        "sync_bind": Durable(database_url, sync_bind=scoped_session(sessionmaker(sync_engine)), tasks=[square]),
    }
    yield made
    for client in made.values():
        await client.close()


async def test_waiting_for_a_result(durable: Durable, clients: dict[str, Durable], sync_engine: Engine):
    durable.register(square)
    good, bad = await durable.spawn(square, 3), await durable.spawn(square, -3)
    held: list[int] = []
    event.listen(sync_engine, "checkout", lambda *_: held.append(1))
    event.listen(sync_engine, "checkin", lambda *_: held.append(-1))
    waiting = asyncio.create_task(asyncio.to_thread(clients["Engine"].wait_for_result_sync, good, timeout=20))
    while len(held) < 6:
        await asyncio.sleep(0.01)
    assert sum(held) in (0, 1)
    async with durable.worker():
        assert (await waiting).output == 9
        for client in clients.values():
            assert (await asyncio.to_thread(client.wait_for_result_sync, good)).output == 9
            failed = await asyncio.to_thread(client.wait_for_result_sync, bad.task_id)
            assert failed.status is TaskStatus.FAILED
    assert sum(held) == 0


async def test_waiting_that_ends_without_a_result(durable: Durable, clients: dict[str, Durable]):
    durable.register(square)
    client = clients["Engine"]
    spawned = await durable.spawn(square, 3)
    with pytest.raises(TimeoutError, match="it is pending"):
        await asyncio.to_thread(client.wait_for_result_sync, spawned, timeout=0.05)
    with pytest.raises(TaskNotFound):
        await asyncio.to_thread(client.wait_for_result_sync, spawned.run_id)
    with pytest.raises(InvalidState, match="await durable.wait_for_result"):
        client.wait_for_result_sync(spawned)
    with pytest.raises(InvalidConfiguration, match="psycopg"):
        await asyncio.to_thread(durable.wait_for_result_sync, spawned)


async def test_a_synchronous_client_says_what_it_cannot_do(clients: dict[str, Durable]):
    calls: list[Callable[[Durable], Awaitable[Any]]] = [
        lambda client: client.spawn(square, 3),
        lambda client: client.start_worker(),
        lambda client: client.list_queues(),
        lambda client: client.emit_event("x"),
    ]
    for name in ("Engine", "sessionmaker", "URL of psycopg2"):
        for call in calls:
            with pytest.raises(InvalidConfiguration, match=r"asynchronous driver|asyncio mode") as refusal:
                await call(clients[name])
            assert "postgresql+psycopg://" in str(refusal.value)
            assert "_with" in str(refusal.value)


def test_what_is_no_sync_bind(engine_of_sqlite: Engine, database_url: URL):
    for bind, said in [
        (engine_of_sqlite, "PostgreSQL"),
        (create_engine(database_url), "asyncpg has no synchronous form"),
        (database_url, "of type .*URL"),
        (lambda: None, "type function"),
    ]:
        with pytest.raises(InvalidConfiguration, match=said):
            Durable(sync_bind=bind)


@pytest.fixture
def engine_of_sqlite() -> Engine:
    return create_engine("sqlite://")


def test_threads_share_one_engine(database_url: URL):
    client = Durable(database_url.set(drivername="postgresql+psycopg"))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(client.sync_database)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    asyncio.run(client.close())
