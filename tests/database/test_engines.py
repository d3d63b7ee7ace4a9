"""The application's engine as it may be: whatever it was made with, durable's statements mean the same."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from durable_sa import Durable, TaskContext, task


def refuse(value: Any) -> Any:
    raise AssertionError("the application's serializer was asked for a value of durable's")


UNPREPARED = {
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
    "psycopg": {"prepare_threshold": None},
}
PREPARED = {"asyncpg": {"prepared_statement_cache_size": 1}, "psycopg": {"prepare_threshold": 0}}

ENGINES: dict[str, Callable[[str], dict[str, Any]]] = {
    "as it comes": lambda _: {},
    "serializers of its own": lambda _: {"json_serializer": refuse, "json_deserializer": refuse},
    "autocommit": lambda _: {"isolation_level": "AUTOCOMMIT"},
    "serializable": lambda _: {"isolation_level": "SERIALIZABLE"},
    "no pool": lambda _: {"poolclass": NullPool},
    "a pool that distrusts": lambda _: {"pool_pre_ping": True, "pool_recycle": 0, "pool_use_lifo": True},
    "no prepared statements": lambda driver: {"connect_args": UNPREPARED[driver]},
    "prepared statements at once": lambda driver: {"connect_args": PREPARED[driver]},
    "no cache of compiled statements": lambda _: {"query_cache_size": 0},
    "tenants": lambda _: {"execution_options": {"schema_translate_map": {None: "public", "tenant": "durable"}}},
}


@task
async def child(ctx: TaskContext, data: dict[str, Any]) -> dict[str, Any]:
    return await ctx.step("turn", turn, data)


async def turn(data: dict[str, Any]) -> dict[str, Any]:
    return {value: key for key, value in data.items()}


async def count(session: AsyncSession) -> int:
    found = await session.scalar(text("SELECT count(*) FROM durable.tasks"))
    return int(found or 0)


@task(max_attempts=1)
async def everything(ctx: TaskContext, data: dict[str, Any]) -> list[Any]:
    handle = await ctx.spawn("child", child, data)
    await ctx.sleep_for("nap", 0.01)
    await ctx.emit_event(f"event-{ctx.task_id}", data)
    return [
        await ctx.await_event(f"event-{ctx.task_id}"),
        await ctx.join(handle),
        await ctx.transaction("count", count),
        ctx.headers,
    ]


@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
async def test_an_engine_of_the_application(
    database_url: URL, durable: Durable, options: Callable[[str], dict[str, Any]], driver: str
) -> None:
    engine = create_async_engine(database_url.set(drivername=f"postgresql+{driver}"), **options(driver))
    sessions = async_sessionmaker(engine)
    headers = {"tenant": ["a", {"b": None}]}
    async with Durable(sessions, tasks=[everything, child]) as client:
        await client.migrate()
        async with client.worker(concurrency=5):
            spawned = await client.spawn(everything, {"a": "b"}, headers=headers)
            async with sessions.begin() as session:
                in_session = await client.spawn_with(session, everything, {"a": "b"}, headers=headers)
            for one in (spawned, in_session):
                result = await client.wait_for_result(one, timeout=10)
                assert result.error is None
                assert result.output is not None
                assert result.output[:2] == [{"a": "b"}, {"b": "a"}]
                assert result.output[2] in (2, 3, 4)
                assert result.output[3] == headers
    await engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
async def test_a_synchronous_engine_with_serializers_of_its_own(
    database_url: URL, engine: AsyncEngine, durable: Durable, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    sync_engine = create_engine(url, json_serializer=refuse, json_deserializer=refuse)
    with Session(sync_engine) as session:
        spawned = durable.spawn_with(session, everything, {"a": "b"}, headers={"c": "d"})
        session.commit()
    sync_engine.dispose()
    async with engine.connect() as connection:
        stored = await connection.execute(
            text("SELECT params::text, headers::text FROM durable.tasks WHERE task_id = :id"), {"id": spawned.task_id}
        )
        assert stored.one() == ('{"a":"b"}', '{"c": "d"}')
