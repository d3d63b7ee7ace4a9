"""Cancelling, retrying and deleting all tasks that match."""

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    BulkResult,
    Durable,
    InvalidConfiguration,
    RetryStrategy,
    Spawn,
    TaskContext,
    TaskFilter,
    TaskHandle,
    TaskRow,
    TaskStatus,
)
from durable_sa.client import bulk
from tests.client.support import Order, count
from tests.support import eventually


@pytest.fixture(params=["few", "many"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches; and windows, as if there were more tasks than a page has."""
    monkeypatch.setattr(bulk, "BATCH", 4)
    if request.param == "many":
        monkeypatch.setattr(bulk, "PAGE", 7)


async def spawn_many(durable: Durable, name: str, number: int) -> list[uuid.UUID]:
    durable.tasks.get(name) or durable.task(name, max_attempts=1, retry_strategy=RetryStrategy.none())(fail)
    return [each.task_id for each in await durable.spawn_many([(durable.tasks[name], 1)] * number)]


async def fail(ctx: TaskContext, number: int) -> None:
    raise ConnectionError


async def statuses(durable: Durable, task_ids: Sequence[uuid.UUID]) -> set[TaskStatus]:
    return {(await durable.get_task(task_id)).status for task_id in task_ids}


@pytest.mark.usefixtures("pages")
async def test_all_that_match_are_cancelled(durable: Durable) -> None:
    chosen, others = await spawn_many(durable, "send", 20), await spawn_many(durable, "pack", 20)
    ended = chosen[3]
    await durable.cancel_task(ended)
    where = TaskFilter(task_name="send")
    assert await durable.cancel_tasks(where, dry_run=True) == BulkResult(20, 0, 20)
    assert await statuses(durable, chosen[:3]) == {TaskStatus.PENDING}
    seen: list[tuple[int, int]] = []
    assert await durable.cancel_tasks(where, progress=lambda *numbers: seen.append(numbers)) == BulkResult(20, 19, 1)
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {matched for _, matched in seen} == {20}
    assert await statuses(durable, chosen) == {TaskStatus.CANCELLED}
    assert await statuses(durable, others) == {TaskStatus.PENDING}
    assert await durable.cancel_tasks(where) == BulkResult(20, 0, 20)
    assert await durable.cancel_tasks(TaskFilter("send", state="pending")) == BulkResult(0, 0, 0)


@pytest.mark.usefixtures("pages")
async def test_a_select_that_is_joined_with_tables_of_the_application(
    durable: Durable, engine: AsyncEngine, orders: None
) -> None:
    plain = durable.task("plain", max_attempts=1)(fail)
    spawned = await durable.spawn_many([Spawn(plain, number, priority=number) for number in range(20)])
    async with engine.begin() as connection:
        items = [{"id": number + 1, "item": "hat" if number % 2 else "tie"} for number in range(20)]
        await connection.execute(sa.insert(Order), items)
    where = select(TaskRow.task_id).join(Order, Order.id == TaskRow.priority + 1).where(Order.item.in_(["hat"]))
    assert await durable.cancel_tasks(where) == BulkResult(10, 10, 0)
    assert await statuses(durable, [each.task_id for each in spawned[1::2]]) == {TaskStatus.CANCELLED}
    assert await statuses(durable, [each.task_id for each in spawned[::2]]) == {TaskStatus.PENDING}
    limited = select(TaskRow.task_id).where(TaskRow.state == "pending").order_by(TaskRow.priority).limit(3)
    assert await durable.cancel_tasks(limited.union(limited)) == BulkResult(3, 3, 0)
    assert await statuses(durable, [each.task_id for each in spawned[:5:2]]) == {TaskStatus.CANCELLED}


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("kind", ["limit", "fetch", "nested", "the first of each name", "joined"])
async def test_a_select_that_would_choose_others_afterwards_is_executed_once(
    durable: Durable, engine: AsyncEngine, orders: None, kind: str
) -> None:
    chosen = await spawn_many(durable, "send", 30)
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Order), [{"id": number, "item": "send"} for number in range(20)])
    pending = select(TaskRow.task_id).where(TaskRow.state == "pending").order_by(TaskRow.task_id)
    where: Any
    match kind:
        case "limit":
            where = pending.limit(12)
        case "fetch":
            where = pending.fetch(12)
        case "nested":
            where = select(TaskRow.task_id).where(TaskRow.task_id.in_(pending.limit(12)))
        case "joined":
            # SQLAlchemy would take the tasks of this select for those of the statement around it.
            where = pending.where(Order.item == TaskRow.task_name, Order.id < 1).limit(12)
        case _:
            await spawn_many(durable, "pack", 10)
            first = sa.cast(sa.func.min(sa.cast(TaskRow.task_id, sa.Text)), sa.Uuid)
            where = pending.with_only_columns(first).order_by(None).group_by(TaskRow.task_name)
    number = 2 if kind == "the first of each name" else 12
    seen: list[tuple[int, int]] = []
    assert (await durable.cancel_tasks(where, dry_run=True)).matched == number
    assert await durable.cancel_tasks(where, progress=lambda *numbers: seen.append(numbers)) == BulkResult(
        number, number, 0
    )
    assert seen[-1] == (number, number)
    assert await count(engine, where="state = 'cancelled'") == number
    if number == 12:
        assert await statuses(durable, chosen[:12]) == {TaskStatus.CANCELLED}


@pytest.mark.usefixtures("pages")
async def test_ids_of_no_task_are_not_counted(durable: Durable, engine: AsyncEngine) -> None:
    task_ids = await spawn_many(durable, "send", 10)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE parcels (number serial, task_id uuid)"))
        ids = [*task_ids[:9], task_ids[0], None, uuid.uuid4()]
        await connection.execute(text("INSERT INTO parcels (task_id) VALUES (:id)"), [{"id": each} for each in ids])
    parcels = sa.table("parcels", sa.column("number", sa.Integer), sa.column("task_id", sa.Uuid))
    for where in (
        select(parcels.c.task_id),
        select(TaskRow.task_id).join_from(parcels, TaskRow, TaskRow.task_id == parcels.c.task_id, isouter=True),
    ):
        assert await durable.retry_tasks(where, dry_run=True) == BulkResult(9, 0, 9)
        assert await durable.retry_tasks(where) == BulkResult(9, 0, 9)
    assert await durable.cancel_tasks(select(parcels.c.task_id)) == BulkResult(9, 9, 0)
    assert await durable.delete_tasks(select(parcels.c.task_id).order_by(parcels.c.number)) == BulkResult(9, 9, 0)
    assert await durable.delete_tasks(select(parcels.c.task_id)) == BulkResult(0, 0, 0)


@pytest.mark.usefixtures("pages")
async def test_failed_tasks_are_retried_and_deleted(durable: Durable) -> None:
    failed = await spawn_many(durable, "send", 15)
    async with durable.worker(concurrency=20):
        for task_id in failed:
            await durable.wait_for_result(task_id, timeout=20)
    (unfinished,) = await spawn_many(durable, "send", 1)
    where = TaskFilter(error_name="ConnectionError")
    assert await durable.retry_tasks(where, max_attempts=7) == BulkResult(15, 15, 0)
    tasks = [await durable.get_task(task_id) for task_id in failed]
    assert {(task.status, task.failures, task.max_attempts) for task in tasks} == {(TaskStatus.PENDING, 0, 7)}
    assert await durable.retry_tasks(TaskFilter("send")) == BulkResult(16, 0, 16)
    await durable.cancel_tasks(select(TaskRow.task_id).where(TaskRow.task_id.in_(failed)))
    assert await durable.delete_tasks(TaskFilter("send"), dry_run=True) == BulkResult(16, 0, 16)
    assert await durable.delete_tasks(TaskFilter("send")) == BulkResult(16, 15, 1)
    assert [task.task_id for task in (await durable.list_tasks()).items] == [unfinished]
    assert await count(durable.engine, "durable.runs") == 0


async def test_families(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task takes its descendants along, whichever of them comes first."""
    monkeypatch.setattr(bulk, "BATCH", 1)

    @durable.task
    async def leaf(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @durable.task
    async def middle(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("leaf", leaf))

    @durable.task
    async def root(ctx: TaskContext) -> None:
        handles = [await ctx.spawn(f"middle {number}", middle) for number in range(3)]
        await ctx.join(handles[0])

    async with durable.worker(concurrency=10):
        await durable.spawn(root)
        await eventually(lambda: _count(durable, TaskFilter("leaf", state="sleeping"), 3))
        assert await durable.cancel_tasks(TaskFilter(task_name="root")) == BulkResult(1, 1, 0)
        assert len((await durable.list_tasks(TaskFilter(state="cancelled"))).items) == 7
        assert await durable.retry_tasks(TaskFilter(task_name="root")) == BulkResult(1, 1, 0)
        await eventually(lambda: _count(durable, TaskFilter("leaf", state="sleeping"), 3))
    # Each of them by itself, the children perhaps before their parents.
    assert (await durable.cancel_tasks(TaskFilter())).matched == 7
    assert len((await durable.list_tasks(TaskFilter(state="cancelled"))).items) == 7
    # A parent is kept for a child that stays.
    assert await durable.delete_tasks(TaskFilter("middle")) == BulkResult(3, 0, 3)
    assert await durable.delete_tasks(TaskFilter()) == BulkResult(7, 7, 0)
    assert await count(durable.engine, "durable.checkpoints") == 0


async def _count(durable: Durable, where: TaskFilter, number: int) -> bool:
    return len((await durable.list_tasks(where)).items) == number


async def test_parents_that_join_hear_of_it(durable: Durable) -> None:
    @durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @durable.task
    async def parent(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("child", child))

    async with durable.worker(concurrency=5):
        spawned = await durable.spawn(parent)
        await eventually(lambda: _count(durable, TaskFilter("parent", state="sleeping"), 1))
        assert await durable.cancel_tasks(TaskFilter("child")) == BulkResult(1, 1, 0)
        result = await durable.wait_for_result(spawned, timeout=20)
    assert result.error is not None
    assert result.error.name == "ChildCancelled"


async def test_running_tasks_are_interrupted(durable: Durable) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def block() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    @durable.task
    async def hang(ctx: TaskContext) -> None:
        await ctx.step("block", block)

    async with durable.worker():
        await durable.spawn(hang)
        await asyncio.wait_for(started.wait(), 20)
        assert await durable.cancel_tasks(TaskFilter(state="running")) == BulkResult(1, 1, 0)
        await asyncio.wait_for(ended.wait(), 20)


async def test_what_was_interrupted_goes_on(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BATCH", 5)
    await spawn_many(durable, "send", 20)

    def interrupt(done: int, matched: int) -> None:
        if done == 10:
            raise KeyError

    with pytest.raises(KeyError):
        await durable.cancel_tasks(TaskFilter("send", state="pending"), progress=interrupt)
    assert await durable.cancel_tasks(TaskFilter("send", state="pending")) == BulkResult(10, 10, 0)
    assert await count(durable.engine, where="state = 'cancelled'") == 20


@pytest.mark.parametrize("held", ["for a moment", "for long"])
async def test_rows_that_another_transaction_has_locked(
    durable: Durable, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    task_ids = await spawn_many(durable, "send", 3)
    if held == "for long":
        monkeypatch.setattr(bulk, "LOCK_PATIENCE", 0.05)
    async with engine.connect() as connection:
        lock = text("SELECT 1 FROM durable.tasks WHERE task_id = :id FOR UPDATE")
        await connection.execute(lock, {"id": task_ids[1]})
        working = asyncio.create_task(durable.cancel_tasks(TaskFilter("send")))
        # The others are not held up.
        await eventually(lambda: _count(durable, TaskFilter(state="cancelled"), 2))
        if held == "for long":
            assert await working == BulkResult(3, 2, 1)
        await connection.rollback()
    if held == "for a moment":
        assert await working == BulkResult(3, 3, 0)


async def test_a_row_of_the_application_keeps_its_task(durable: Durable, engine: AsyncEngine) -> None:
    task_ids = await spawn_many(durable, "send", 5)
    await durable.cancel_tasks(TaskFilter())
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE parcels (task_id uuid REFERENCES durable.tasks)"))
        await connection.execute(text("INSERT INTO parcels VALUES (:id)"), {"id": task_ids[2]})
    assert await durable.delete_tasks(TaskFilter()) == BulkResult(5, 4, 1)
    assert (await durable.get_task(task_ids[2])).status is TaskStatus.CANCELLED


async def test_tasks_that_are_spawned_meanwhile_are_left_alone(
    durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PAGE", 5)
    await spawn_many(durable, "send", 20)
    late: list[asyncio.Task[Any]] = []

    def spawn(done: int, matched: int) -> None:
        late.append(asyncio.create_task(spawn_many(durable, "send", 5)))

    result = await durable.cancel_tasks(TaskFilter("send"), progress=spawn)
    await asyncio.gather(*late)
    assert result == BulkResult(20, 20, 0)


async def test_arguments_that_make_no_sense(durable: Durable) -> None:
    for call in (durable.cancel_tasks, durable.retry_tasks, durable.delete_tasks):
        with pytest.raises(TypeError, match="not NoneType"):
            await call(None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not TaskHandle"):
            await call(TaskHandle[int](uuid.uuid4()))  # type: ignore[arg-type]
        with pytest.raises(InvalidConfiguration, match="callable"):
            await call(TaskFilter(), progress=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="max_attempts"):
        await durable.retry_tasks(TaskFilter(), max_attempts=0)
    assert await durable.cancel_tasks(TaskFilter(spawned_after=datetime(2200, 1, 1, tzinfo=UTC))) == BulkResult(0, 0, 0)
