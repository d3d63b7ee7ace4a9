"""The tables as an application sees them: beside its own models, in the same session."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from durable_sa import CancellationPolicy, Durable, TaskContext, TaskRow, UserError, models, task
from tests.client.support import close, count


class Base(DeclarativeBase):
    pass


class Task(Base):
    """An application's own, of the same name."""

    __tablename__ = "tasks"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    task_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey(TaskRow.task_id, ondelete="SET NULL"))
    shipment: Mapped[TaskRow | None] = relationship(TaskRow)


@task
async def ship(ctx: TaskContext, params: dict[str, Any]) -> dict[str, Any]:
    await ctx.step("pack", lambda: ["box"])
    if params["item"] == "bomb":
        raise UserError({"code": 451})
    return {"sent": params["item"]}


@pytest.fixture
async def orders(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def order(session: AsyncSession, durable: Durable, item: str) -> Order:
    spawned = await durable.spawn_with(session, ship, {"item": item}, headers={"for": item})
    order = Order(item=item, task_id=spawned.task_id)
    session.add(order)
    return order


async def test_an_order_is_stored_with_the_id_of_its_task(durable: Durable, engine: AsyncEngine, orders: None) -> None:
    async with AsyncSession(engine) as session:
        first = await order(session, durable, "book")
        await session.commit()
        await session.refresh(first, ["shipment"])
        assert first.shipment is not None
        assert (first.shipment.task_name, first.shipment.state) == ("ship", "pending")
        session.add(Order(item="nothing", task_id=uuid.uuid4()))
        with pytest.raises(IntegrityError):
            await session.commit()


async def test_orders_and_tasks_are_joined_in_one_select(durable: Durable, engine: AsyncEngine, orders: None) -> None:
    durable.register(ship)
    async with AsyncSession(engine) as session, session.begin():
        for item in ("book", "bomb"):
            await order(session, durable, item)
        session.add(Order(item="later"))
    async with durable.worker(concurrency=2), AsyncSession(engine) as session:
        for task_id in await session.scalars(sa.select(Order.task_id).where(Order.task_id.is_not(None))):
            assert task_id is not None
            await durable.wait_for_result(task_id, timeout=20)
    async with AsyncSession(engine) as session:
        pairs = sa.select(Order, TaskRow).outerjoin(TaskRow, TaskRow.task_id == Order.task_id).order_by(Order.id)
        found: list[tuple[Order, Any]] = [(each, row) for each, row in (await session.execute(pairs)).all()]
        assert [each.item for each, _ in found] == ["book", "bomb", "later"]
        assert [row and (row.state, row.output) for _, row in found] == [
            ("completed", {"sent": "book"}),
            ("failed", None),
            None,
        ]
        assert found[0][1].params == {"item": "book"}
        assert found[1][1].error["raw"] == {"code": 451}
        assert found[0][0].shipment is found[0][1]
        for_book = sa.select(Order).join(Order.shipment).where(TaskRow.headers["for"].as_string() == "book")
        assert (await session.scalars(for_book)).one().item == "book"


async def test_every_column_to_rely_on_is_there_and_filled(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("parent", cancellation=CancellationPolicy(max_running_time=3600))
    async def parent(ctx: TaskContext) -> None:
        child = await ctx.spawn("child", ship, {"item": "book"})
        await ctx.join(child)
        await ctx.await_event("go")

    durable.register(ship)
    async with durable.worker(concurrency=3):
        spawned = await durable.spawn(parent, idempotency_key="k", priority=3)
        await durable.emit_event("go", {"a": 1})
        await durable.wait_for_result(spawned, timeout=20)
        waiting = await durable.spawn(parent, queue_name="default")
        await durable.cancel_task(waiting)

    async with AsyncSession(engine) as session:
        row = await session.get_one(TaskRow, spawned.task_id)
        assert (row.queue_name, row.task_name, row.params, row.headers) == ("default", "parent", None, None)
        assert (row.state, row.priority, row.attempt, row.idempotency_key) == ("completed", 3, 1, "k")
        assert row.parent_task_id is row.error is row.output is None
        times = [row.created_at, row.first_started_at, row.finished_at]
        assert all(isinstance(time, datetime) and time.tzinfo is not None for time in times)
        assert times == sorted(times, key=lambda time: time or datetime.max.replace(tzinfo=UTC))
        child = (await session.scalars(sa.select(TaskRow).where(TaskRow.parent_task_id == spawned.task_id))).one()
        run = (await session.scalars(sa.select(models.Run).where(models.Run.task_id == child.task_id))).one()
        assert (run.run_id, run.attempt, run.state, run.error) == (child.run_id, 1, "completed", None)
        assert run.worker_id is not None
        assert run.started_at is not None
        assert run.started_at <= run.finished_at
        step = (
            await session.scalars(sa.select(models.Checkpoint).where(models.Checkpoint.task_id == child.task_id))
        ).one()
        assert (step.name, step.value) == ("pack", ["box"])
        event = (await session.scalars(sa.select(models.Event))).one()
        assert (event.queue_name, event.name, event.payload) == ("default", "go", {"a": 1})
        assert isinstance(event.emitted_at, datetime)
        assert (await session.scalars(sa.select(models.Wait))).all() == []
        assert (await session.scalars(sa.select(models.Queue.queue_name))).all() == ["default"]
        assert (await session.scalars(sa.select(models.Schedule))).all() == []
        assert (await session.scalars(sa.select(models.WorkerRow))).all() == []


def test_names_and_metadata_are_apart_from_the_applications() -> None:
    assert TaskRow is models.Task is models.TaskRow
    assert models.Base.metadata is models.metadata
    assert models.metadata.schema == "durable"
    assert not {table.key for table in Base.metadata.sorted_tables} & {
        table.key for table in models.metadata.sorted_tables
    }
    assert str(Task.__table__) == "tasks"
    names = {"Queue", "TaskRow", "RunRow", "Checkpoint", "Event", "Wait", "Schedule", "WorkerRow", "EndedWorker"}
    names |= {
        "LimitRow",
        "LimitKeyRow",
        "LimitTotalRow",
        "LimitArrivalRow",
        "Message",
        "TaskValueRow",
        "Stream",
        "StreamItems",
        "TaskMinute",
    }
    assert {mapper.class_.__name__ for mapper in models.Base.registry.mappers} == names


def test_a_synchronous_session_reads_them_as_well(sync_engine: Engine, durable: Durable) -> None:
    with Session(sync_engine) as session:
        spawned = durable.spawn_with(session, ship, {"item": "book"})
        assert session.get_one(TaskRow, spawned.task_id).params == {"item": "book"}
        session.rollback()
        assert session.scalars(sa.select(TaskRow)).all() == []


async def test_cleaning_up_obeys_the_applications_foreign_keys(
    durable: Durable, engine: AsyncEngine, orders: None
) -> None:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        first = await order(session, durable, "book")
        await session.commit()
        assert first.task_id is not None
        await durable.cancel_task(first.task_id)
        assert await durable.cleanup_tasks(0) == 1
        await session.refresh(first)
        assert first.task_id is None


async def test_an_open_transaction_that_refers_to_a_task_does_not_keep_it_from_running(
    durable: Durable, engine: AsyncEngine, orders: None
) -> None:
    durable.register(ship)
    spawned = await durable.spawn(ship, {"item": "book"})
    async with AsyncSession(engine) as session:
        session.add(Order(item="book", task_id=spawned.task_id))
        await session.flush()
        async with durable.worker():
            assert (await durable.wait_for_result(spawned, timeout=20)).output == {"sent": "book"}
        await session.commit()
    assert await count(engine, "orders") == 1


async def test_the_models_are_not_written_by_a_session_unless_it_is_told_to(
    durable: Durable, engine: AsyncEngine
) -> None:
    """Reading rows and committing changes nothing of them."""
    spawned = await durable.spawn(ship, {"b": -0.0, "a": 1})
    app = create_async_engine(engine.url)
    async with AsyncSession(app) as session:
        row = await session.get_one(TaskRow, spawned.task_id)
        assert row.params == {"b": -0.0, "a": 1}
        assert session.dirty == set() or not session.is_modified(row)
        await session.commit()
    await close(app)
    async with engine.connect() as connection:
        stored = sa.select(sa.cast(TaskRow.params, sa.Text))
        assert await connection.scalar(stored) == '{"b":-0.0,"a":1}'
