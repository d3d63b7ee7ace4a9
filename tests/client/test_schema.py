"""Durable's tables in another schema than `durable`: made, used and left alone by others."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any
from uuid import UUID

import asyncpg  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, foreign, mapped_column, relationship, selectinload

from durable_sa import Durable, InvalidConfiguration, SchemaMismatch, TaskContext, TaskRow, TaskStatus, task
from durable_sa.database.hint import channel_name
from tests.client.support import Hints, close, count
from tests.support import eventually


@task
async def child(ctx: TaskContext, params: int) -> int:
    return params + 1


@task
async def parent(ctx: TaskContext, params: int) -> int:
    handle = await ctx.spawn("child", child, params)
    joined = await ctx.join(handle)
    await ctx.sleep_for("nap", 0.01)
    stored = await ctx.transaction("write", write, joined)
    paid = await ctx.await_event("paid", type=int)
    return stored + paid


async def write(session: AsyncSession, value: int) -> int:
    await session.execute(sa.text("INSERT INTO notes VALUES (:value)"), {"value": value})
    return value * 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jobs", 'Odd "name"; -- :y', "é" * 31])
async def test_everything_works_in_another_schema(name: str, database_url: URL, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE notes (value int)"))
    async with Durable(database_url, schema=name, tasks=[parent, child]) as durable:
        await durable.migrate()
        await durable.migrate()
        await durable.create_queue("mails")
        async with durable.worker(concurrency=3):
            spawned = await durable.spawn(parent, 1, idempotency_key="k")
            assert not (await durable.spawn(parent, 1, idempotency_key="k")).created
            await durable.emit_event("paid", 5)
            assert (await durable.wait_for_result(spawned, timeout=30)).output == 25
        cancelled = (await durable.spawn_many([(child, 1)] * 3))[0]
        assert await durable.cancel_task(cancelled) is TaskStatus.CANCELLED
        assert await durable.retry_task(cancelled) is TaskStatus.PENDING
        assert await durable.count_unclaimed_ready_tasks() == 3
        assert await durable.list_queues() == ["default", "mails"]
        assert await durable.cleanup_tasks(0) == 2
        assert await durable.cleanup_events(0) == 1
        await durable.drop_queue()
    assert await count(engine, "notes") == 1
    assert await count(engine, "durable.tasks") == await count(engine, "durable.runs") == 0
    async with engine.connect() as connection:
        schemas = sa.text("SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_|information_schema|public'")
        assert set(await connection.scalars(schemas)) == {"durable", name}


async def test_two_schemas_of_one_database_know_nothing_of_each_other(
    durable: Durable, database_url: URL, engine: AsyncEngine
) -> None:
    async with Durable(engine, schema="jobs", tasks=[child]) as jobs:
        await jobs.migrate()
        durable.register(child)
        here, there = await durable.spawn(child, 1), await jobs.spawn(child, 2)
        assert await durable.emit_event("e")
        assert await jobs.emit_event("e")
        async with jobs.worker():
            assert (await jobs.wait_for_result(there, timeout=20)).output == 3
        result = await durable.get_task_result(here)
        assert result is not None
        assert result.status is TaskStatus.PENDING
        assert await durable.get_task_result(there) is await jobs.get_task_result(here) is None


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = ({"schema": "app"},)

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


@pytest.mark.parametrize("mapped", [False, True])
async def test_in_the_callers_transaction(
    mapped: bool, database_url: URL, engine: AsyncEngine, sync_engine: Engine
) -> None:
    """Whose own schema_translate_map stays in force."""
    client = Durable(schema="jobs")
    async with Durable(engine, schema="jobs") as durable:
        await durable.migrate()
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE SCHEMA app"))
        await connection.execute(sa.text("CREATE SCHEMA tenant"))
        for schema in ("app", "tenant"):
            translated = await connection.execution_options(schema_translate_map={"app": schema})
            await translated.run_sync(Base.metadata.create_all)
    options: dict[str, Any] = {"schema_translate_map": {"app": "tenant"}} if mapped else {}
    app = create_async_engine(database_url, execution_options=options)
    async with AsyncSession(app) as session:
        await client.spawn_with(session, child, 1)
        session.add(Order(item="book"))
        await client.emit_event_with(session, "e")
        await session.commit()
    with Session(sync_engine.execution_options(**options)) as sync_session:
        spawned = client.spawn_with(sync_session, child, 2)
        sync_session.add(Order(item="pen"))
        sync_session.flush()
        assert client.cancel_task_with(sync_session, spawned) is TaskStatus.CANCELLED
        sync_session.commit()
    async with Durable(schema="jobs"):
        pass
    await close(app)
    assert await count(engine, "jobs.tasks") == 2
    assert await count(engine, "durable.tasks") == 0
    assert await count(engine, "tenant.orders" if mapped else "app.orders") == 2


async def test_models_are_read_by_a_translation_of_the_schema(engine: AsyncEngine, durable: Durable) -> None:
    async with Durable(engine, schema="jobs") as jobs:
        await jobs.migrate()
        spawned = await jobs.spawn(child, 1)
    variant = engine.execution_options(schema_translate_map={"durable": "jobs"})
    async with AsyncSession(variant) as session:
        assert (await session.get_one(TaskRow, spawned.task_id)).params == 1
    async with AsyncSession(engine) as session:
        assert await session.get(TaskRow, spawned.task_id) is None


class Jobs(DeclarativeBase):
    pass


assert isinstance(TaskRow.__table__, sa.Table)
jobs_tasks = TaskRow.__table__.to_metadata(Jobs.metadata, schema="jobs")


class Parcel(Jobs):
    __tablename__ = "parcels"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[UUID | None] = mapped_column(sa.ForeignKey(jobs_tasks.c.task_id, ondelete="SET NULL"))
    task: Mapped[TaskRow | None] = relationship(
        TaskRow, viewonly=True, primaryjoin=lambda: foreign(Parcel.task_id) == TaskRow.task_id
    )


async def test_an_applications_models_are_joined_with_tables_in_another_schema(
    database_url: URL, engine: AsyncEngine
) -> None:
    app = create_async_engine(database_url, execution_options={"schema_translate_map": {"durable": "jobs"}})
    async with Durable(app, schema="jobs", tasks=[child]) as jobs:
        await jobs.migrate()
        async with app.begin() as connection:
            await connection.run_sync(Jobs.metadata.create_all)
        async with AsyncSession(app) as session, session.begin():
            spawned = await jobs.spawn_with(session, child, 1)
            session.add(Parcel(task_id=spawned.task_id))
        async with jobs.worker():
            assert (await jobs.wait_for_result(spawned, timeout=20)).output == 2
        async with AsyncSession(app) as session:
            both = sa.select(Parcel, TaskRow).join(TaskRow, TaskRow.task_id == Parcel.task_id)
            parcel, row = (await session.execute(both)).one()
            assert row.output == 2
            related = sa.select(Parcel).options(selectinload(Parcel.task)).join(Parcel.task)
            assert (await session.scalars(related)).one().task is row
        assert await jobs.cleanup_tasks(0) == 1
    assert await count(engine, "parcels", "task_id IS NULL") == 1
    await close(app)


async def test_hints_of_a_schema_have_a_channel_of_their_own(
    database_url: URL, engine: AsyncEngine, hints: Hints
) -> None:
    async with Durable(engine, schema="jobs", tasks=[child]) as jobs:
        await jobs.migrate()
        async with jobs.worker(poll_interval=60) as worker:
            listener = worker._listener
            assert listener is not None
            await eventually(lambda: listener.working)
            result = await asyncio.wait_for(jobs.wait_for_result(await jobs.spawn(child, 1)), 3)
            assert result.output == 2
    assert await hints.so_far() == []


async def test_a_worker_says_when_the_tables_are_not_there(engine: AsyncEngine, database_url: URL) -> None:
    async with Durable(engine, schema="nowhere") as durable:
        with pytest.raises(SchemaMismatch, match="not installed"):
            await durable.start_worker()


@pytest.mark.slow
async def test_every_call_says_when_the_tables_are_not_there(
    engine: AsyncEngine, database_url: URL, sync_engine: Engine
) -> None:
    some = uuid.uuid4()
    async with Durable(engine, schema="nowhere", tasks=[child]) as durable:
        calls = [
            durable.create_queue(),
            durable.drop_queue("mails"),
            durable.list_queues(),
            durable.spawn(child, 1),
            durable.spawn(child, 1, idempotency_key="key"),
            durable.spawn_many([(child, 1)]),
            durable.emit_event("paid"),
            durable.cancel_task(some),
            durable.retry_task(some),
            durable.get_task_result(some),
            durable.wait_for_result(some),
            durable.count_unclaimed_ready_tasks(),
            durable.cleanup_tasks(60),
            durable.cleanup_events(60),
            durable.create_schedule("daily", task=child, params=1, cron_expression="0 0 * * *"),
            durable.list_schedules(),
            durable.delete_schedule("daily"),
        ]
        for call in calls:
            with pytest.raises(SchemaMismatch, match=r'(?s)not installed.*schema="nowhere"'):
                await call
        async with engine.connect() as connection:
            with pytest.raises(SchemaMismatch, match="not installed"):
                await durable.spawn_with(connection, child, 1)
        with sync_engine.connect() as connection, pytest.raises(SchemaMismatch, match="not installed"):
            durable.emit_event_with(connection, "paid")
        await durable.migrate()
        assert await durable.list_queues() == ["default"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "empty"), ("é" * 32, "64 bytes .*at most 63"), ("a\0b", r"U\+0000"), (5, "str, not int"), ("pg_jobs", "pg_")],
)
def test_names_that_no_schema_can_have_are_refused(name: Any, reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"schema: .*{reason}"):
        Durable(schema=name)


async def test_two_long_names_never_share_a_channel(database_url: URL) -> None:
    names = {channel_name("x" * 62 + end) for end in "ab"} | {channel_name("durable"), channel_name("Durable")}
    assert len(names) == 4
    connection = await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(False))
    for name in names:
        assert len(name.encode()) <= 63
        await connection.execute(f'LISTEN "{name}"')
    assert len(await connection.fetch("SELECT pg_listening_channels()")) == 4
    await connection.close()
