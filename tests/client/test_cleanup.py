"""Deleting by hand what has ended: as much as was asked for, and nothing that somebody still needs."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, ForeignKey
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from durable_sa import (
    Durable,
    InvalidConfiguration,
    InvalidState,
    TaskContext,
    TaskNotFound,
    TaskRow,
    TaskStatus,
    UserError,
    task,
)
from durable_sa.models import Event
from durable_sa.worker.retention import PAGES, Retention
from tests.client.support import count, read
from tests.support import eventually

TABLES = ("tasks", "runs", "checkpoints", "waits", "events")


@task
async def work(ctx: TaskContext, params: str) -> str:
    await ctx.step("one", lambda: 1)
    if params == "fail":
        raise UserError("no")
    if params == "wait":
        await ctx.await_event("go")
    return params


async def age(engine: AsyncEngine, how_long: timedelta) -> None:
    """Make everything older."""
    async with engine.begin() as connection:
        await connection.execute(sa.update(TaskRow).values(finished_at=TaskRow.finished_at - how_long))
        await connection.execute(sa.update(Event).values(emitted_at=Event.emitted_at - how_long))


async def counts(engine: AsyncEngine) -> list[int]:
    return [await count(engine, f"durable.{table}") for table in TABLES]


async def test_what_has_ended_goes_with_all_that_belongs_to_it(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(work)
    async with durable.worker(concurrency=5):
        ended = [await durable.spawn(work, params) for params in ("done", "fail", "wait")]
        waits = await durable.spawn(work, "wait")
        pending = await durable.spawn(work, "", delay=3600)
        await eventually(lambda: has_waits(engine, 2))
        await durable.cancel_task(ended[2])
        for each in ended:
            await durable.wait_for_result(each, timeout=20)
    assert await counts(engine) == [5, 3, 4, 1, 0]
    assert await durable.cleanup_tasks(0) == 3
    assert await counts(engine) == [2, 0, 1, 1, 0]
    assert await durable.cleanup_tasks(0) == 0
    for each in ended:
        assert await durable.get_task_result(each) is None
        for call in (durable.cancel_task, durable.retry_task, durable.wait_for_result):
            with pytest.raises(TaskNotFound, match="or it was cleaned up"):
                await call(each)
    assert (await read(engine, waits.task_id)).state == "sleeping"
    assert (await read(engine, pending.task_id)).state == "pending"


async def has_waits(engine: AsyncEngine, wanted: int) -> bool:
    return await count(engine, "durable.waits") == wanted


async def test_only_what_is_old_enough_goes(durable: Durable, engine: AsyncEngine) -> None:
    async def cancelled() -> uuid.UUID:
        spawned = await durable.spawn(work, "")
        await durable.cancel_task(spawned)
        return spawned.task_id

    old = await cancelled()
    await age(engine, timedelta(hours=1))
    new = await cancelled()
    assert await durable.cleanup_tasks(timedelta(hours=2)) == 0
    assert await durable.cleanup_tasks(3600.5) == 0
    assert await durable.cleanup_tasks(1800) == 1
    assert await durable.get_task_result(old) is None
    assert await durable.get_task_result(new) is not None


async def test_no_more_go_than_were_asked_for_and_the_oldest_first(durable: Durable, engine: AsyncEngine) -> None:
    spawned = await durable.spawn_many([(work, "")] * 30)
    for each in spawned:
        await durable.cancel_task(each)
    assert await durable.cleanup_tasks(0, limit=7) == 7
    async with engine.connect() as connection:
        left = set(await connection.scalars(sa.select(TaskRow.task_id)))
    assert left == {each.task_id for each in spawned[7:]}
    assert await durable.cleanup_tasks(0, limit=1000) == 23


async def test_more_than_a_page_goes_in_one_call(durable: Durable, engine: AsyncEngine) -> None:
    await durable.spawn_many([(work, "")] * 2500)
    async with engine.begin() as connection:
        ended = {"state": "cancelled", "outcome": "cancelled", "finished_at": sa.func.now()}
        await connection.execute(sa.update(TaskRow).values(ended))
    assert await durable.cleanup_tasks(0, limit=2400) == 2400
    assert await durable.cleanup_tasks(0, limit=2400) == 100


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, 2**63])
async def test_a_limit_that_cannot_be_is_refused(durable: Durable, limit: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="limit"):
        await durable.cleanup_tasks(0, limit=limit)
    with pytest.raises(InvalidConfiguration, match="limit"):
        await durable.cleanup_events(0, limit=limit)


@pytest.mark.parametrize("older_than", [-1, "1 day", float("nan"), None])
async def test_an_age_that_cannot_be_is_refused(durable: Durable, older_than: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="older_than"):
        await durable.cleanup_tasks(older_than)
    with pytest.raises(InvalidConfiguration, match="older_than"):
        await durable.cleanup_events(older_than)


async def test_other_queues_are_left_alone(durable: Durable, engine: AsyncEngine) -> None:
    await durable.create_queue("mails")
    spawned = await durable.spawn(work, "", queue_name="mails")
    await durable.cancel_task(spawned)
    await durable.emit_event("e", queue_name="mails")
    assert await durable.cleanup_tasks(0) == await durable.cleanup_events(0) == 0
    async with Durable(engine, queue_name="mails") as mails:
        assert await mails.cleanup_tasks(0) == await mails.cleanup_events(0) == 1


async def test_a_child_stays_until_all_its_ancestors_have_ended(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("leaf")
    async def leaf(ctx: TaskContext) -> str:
        return "leaf"

    @durable.task("middle")
    async def middle(ctx: TaskContext) -> str:
        await ctx.spawn("leaf", leaf)
        return "middle"

    @durable.task("root")
    async def root(ctx: TaskContext) -> str:
        child = await ctx.spawn("middle", middle)
        await ctx.await_event("go")
        return await ctx.join(child)

    async with durable.worker(concurrency=5):
        spawned = await durable.spawn(root)

        async def descendants_ended() -> bool:
            return await count(engine, "durable.tasks", "state = 'completed'") == 2

        await eventually(descendants_ended)
        assert await durable.cleanup_tasks(0) == 0
        await durable.emit_event("go")
        assert (await durable.wait_for_result(spawned, timeout=20)).output == "middle"
    # And then the whole family goes at once.
    assert await durable.cleanup_tasks(0) == 3
    assert await counts(engine) == [0, 0, 0, 0, 1]


async def test_a_parent_stays_as_long_as_it_has_children(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("child")
    async def child(ctx: TaskContext) -> None: ...

    @durable.task("parent")
    async def parent(ctx: TaskContext) -> None:
        await ctx.spawn("child", child, delay=3600)

    async with durable.worker():
        spawned = await durable.spawn(parent)
        await durable.wait_for_result(spawned, timeout=20)
    assert await durable.cleanup_tasks(0) == 0
    async with engine.connect() as connection:
        child_id = await connection.scalar(sa.select(TaskRow.task_id).where(TaskRow.parent_task_id.is_not(None)))
    assert child_id is not None
    await durable.cancel_task(child_id)
    assert await durable.cleanup_tasks(0) == 2


async def test_what_a_task_waits_for_stays(durable: Durable, engine: AsyncEngine) -> None:
    """Also where it is nobody's child."""

    @durable.task("child")
    async def child(ctx: TaskContext) -> None: ...

    @durable.task("parent")
    async def parent(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("child", child, delay=3600))

    async with durable.worker(concurrency=2):
        spawned = await durable.spawn(parent)
        await eventually(lambda: has_waits(engine, 1))
    async with engine.connect() as connection:
        child_id = await connection.scalar(sa.select(TaskRow.task_id).where(TaskRow.parent_task_id.is_not(None)))
    assert child_id is not None
    async with engine.begin() as connection:
        ended = {
            "state": "cancelled",
            "outcome": "cancelled",
            "finished_at": sa.func.now(),
            "parent_task_id": sa.null(),
        }
        await connection.execute(sa.update(TaskRow).where(TaskRow.task_id == child_id).values(ended))
    assert await durable.cleanup_tasks(0) == 0
    await durable.cancel_task(spawned)
    assert await durable.cleanup_tasks(0) == 2


@pytest.mark.slow
async def test_what_an_application_refers_to_stays_and_the_others_go(durable: Durable, engine: AsyncEngine) -> None:
    class Base(DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        task_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(TaskRow.task_id))

    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    spawned = await durable.spawn_many([(work, "")] * 20)
    for each in spawned:
        await durable.cancel_task(each)
    kept = {spawned[3].task_id, spawned[17].task_id}
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Order), [{"id": n, "task_id": task_id} for n, task_id in enumerate(kept)])
    assert await durable.cleanup_tasks(0) == 18
    async with engine.connect() as connection:
        assert set(await connection.scalars(sa.select(TaskRow.task_id))) == kept


@pytest.mark.slow
async def test_what_an_application_holds_locked_stays_and_neither_worker_nor_caller_waits_for_it(
    durable: Durable, engine: AsyncEngine
) -> None:
    """The row that refers to a task, in a transaction that is open for long."""
    durable.register(work)
    async with engine.begin() as connection:
        await connection.execute(
            sa.text("CREATE TABLE orders (task_id uuid REFERENCES durable.tasks ON DELETE SET NULL)")
        )
    spawned = await durable.spawn_many([(work, "")] * 20)
    for each in spawned:
        await durable.cancel_task(each)
    held = spawned[7].task_id
    async with engine.begin() as connection:
        await connection.execute(sa.text("INSERT INTO orders VALUES (:held)"), {"held": held})
    async with engine.connect() as connection, connection.begin():
        await connection.execute(sa.text("SELECT 1 FROM orders FOR UPDATE"))
        async with asyncio.timeout(5):
            assert await durable.cleanup_tasks(0) == 19
        await durable.create_queue(retention=0)
        async with durable.worker(concurrency=5) as worker:
            waiting = await durable.spawn(work, "wait")
            await eventually(lambda: has_waits(engine, 1))
            worker.maintenance.look_at_everything()
            await asyncio.sleep(0.2)
            await durable.emit_event("go")
            # Runs that go on are loaded over the connection that the worker deletes with.
            assert (await durable.wait_for_result(waiting, timeout=5)).output == "wait"
    async with engine.connect() as connection:
        assert held in set(await connection.scalars(sa.select(TaskRow.task_id)))


@pytest.mark.slow
async def test_cleaning_up_and_retrying_at_once_leaves_each_task_whole_or_gone(
    database_url: URL, engine: AsyncEngine
) -> None:
    app = create_async_engine(database_url, pool_size=10)
    client = Durable(app)
    spawned = await client.spawn_many([(work, "")] * 120)
    await asyncio.gather(*(client.cancel_task(each) for each in spawned))

    async def retry(each: Any) -> bool:
        try:
            await client.retry_task(each)
        except TaskNotFound:
            return False
        except InvalidState:
            raise AssertionError from None
        return True

    cleanups = [asyncio.create_task(client.cleanup_tasks(0, limit=10)) for _ in range(12)]
    retried = await asyncio.gather(*(retry(each) for each in spawned))
    deleted = sum(await asyncio.gather(*cleanups))
    await client.close()
    await app.dispose()
    assert retried.count(True) + deleted == 120
    assert await count(engine, "durable.tasks", "state = 'pending'") == retried.count(True) == await count(engine)


async def test_events_go_by_age_and_number(durable: Durable, engine: AsyncEngine) -> None:
    for number in range(5):
        await durable.emit_event(f"old {number}")
        await age(engine, timedelta(minutes=1))
    await durable.emit_event("new")
    assert await durable.cleanup_events(timedelta(hours=1)) == 0
    assert await durable.cleanup_events(30, limit=2) == 2
    async with engine.connect() as connection:
        assert set(await connection.scalars(sa.select(Event.name))) == {"old 2", "old 3", "old 4", "new"}
    assert await durable.cleanup_events(30) == 3
    assert await durable.emit_event("old 0")


async def test_an_event_stays_while_somebody_waits_for_it(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(work)
    async with durable.worker():
        spawned = await durable.spawn(work, "wait")
        await eventually(lambda: has_waits(engine, 1))
    await durable.emit_event("go")
    await durable.emit_event("other")
    assert await durable.cleanup_events(0) == 1
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=20)).status is TaskStatus.COMPLETED
    assert await durable.cleanup_events(0) == 1


async def test_tasks_that_are_still_needed_are_passed_over_a_few_pages_at_a_time(
    durable: Durable, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers do not look at all of them in each cycle, and come to what lies behind them all the same."""
    monkeypatch.setattr("durable_sa.worker.retention.PAGE", 2)

    @durable.task
    async def leaf(ctx: TaskContext) -> None: ...

    @durable.task
    async def family(ctx: TaskContext) -> None:
        for _ in range(8):
            await ctx.join(await ctx.spawn("leaf", leaf))
        await ctx.await_event("go")

    await durable.create_queue(retention=0)
    async with durable.worker():
        await durable.spawn(family)
        await eventually(lambda: waiting(engine))
        await durable.wait_for_result(await durable.spawn(leaf), timeout=10)

    statements: list[str] = []
    sa.event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(str(arguments[2]))
    )
    retention = Retention(durable.database)
    await retention.delete_expired()
    assert len([statement for statement in statements if "DELETE FROM durable.tasks" in statement]) == PAGES
    assert await count(engine) == 10
    await retention.delete_expired()
    assert await count(engine) == 9


async def waiting(engine: AsyncEngine) -> bool:
    return bool(await count(engine, "durable.waits", "event_name IS NOT NULL"))


@pytest.mark.slow
async def test_a_worker_that_finds_much_to_delete_does_not_wait_for_its_next_round(
    durable: Durable, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.retention.PAGE", 2)
    spawned = await durable.spawn_many([(work, "") for _ in range(20)])
    for each in spawned:
        await durable.cancel_task(each)
    await durable.create_queue(retention=0)
    async with durable.worker() as worker:
        worker.maintenance.look_at_everything()

        async def all_gone() -> bool:
            return await count(engine, "durable.tasks") == 0

        await eventually(all_gone)
