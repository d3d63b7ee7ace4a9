"""Tasks as plain functions: what a context without a database does, and that it refuses what the engine refuses."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from durable_sa import (
    ChildCancelled,
    ChildFailed,
    InvalidName,
    InvalidState,
    RetryStrategy,
    SerializationError,
    SyncTaskContext,
    TaskContext,
    TaskHandle,
    TaskNotFound,
    TaskTimeout,
    UserError,
    current_context,
    heartbeat,
    step,
    task,
)
from durable_sa.testing import task_context

NEW_YEAR = datetime(2030, 1, 1, tzinfo=UTC)


@dataclass
class Point:
    x: int
    y: int


async def test_a_step_runs_and_its_result_takes_the_way_through_json() -> None:
    async def locate(name: str) -> Point:
        return Point(len(name), 0)

    def plain(name: str):
        return (name,)

    ctx = task_context()
    assert await ctx.step("locate", locate, "abc") == Point(3, 0)
    assert await ctx.step("plain", plain, "abc") == ["abc"]
    assert ctx.recorded.steps == ["locate", "plain"]


async def test_what_the_engine_refuses_is_refused() -> None:
    async def anything(*_: object) -> object:
        return object()

    ctx = task_context()
    with pytest.raises(InvalidName):
        await ctx.step("$mine", anything)
    with pytest.raises(SerializationError, match="argument"):
        await ctx.step("argument", anything, object())
    with pytest.raises(SerializationError, match="result of step 'result'"):
        await ctx.step("result", anything)
    with pytest.raises(InvalidState, match="inside a step"):
        await ctx.step("asleep", lambda: ctx.sleep_for("here", 1))
    with pytest.raises(TaskNotFound):
        await ctx.join(TaskHandle(uuid.uuid4()))
    assert ctx.recorded.steps == []


async def test_steps_are_tried_again_without_a_pause() -> None:
    tries: list[int] = []

    @step(max_attempts=3, retry_strategy=RetryStrategy.fixed(3600))
    async def flaky() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        return len(tries)

    @step(max_attempts=2)
    def failing() -> None:
        raise ConnectionError

    ctx = task_context(now=NEW_YEAR)
    began = time.monotonic()
    assert await ctx.step("flaky", flaky) == 3
    assert await ctx.now() == NEW_YEAR + timedelta(hours=2)
    with pytest.raises(ConnectionError):
        await ctx.step("failing", failing)
    assert time.monotonic() - began < 1
    assert ctx.recorded.sleeps == []


async def test_a_step_that_takes_too_long_times_out() -> None:
    @step(timeout=0.01)
    async def slow() -> None:
        await asyncio.sleep(10)

    with pytest.raises(TaskTimeout, match="Step 'slow'"):
        await task_context().step("slow", slow)


async def test_time_passes_in_sleeps_and_timeouts_only() -> None:
    ctx = task_context(now=NEW_YEAR)
    assert await ctx.now() == await ctx.now() == NEW_YEAR
    await ctx.sleep_for("a day", timedelta(days=1))
    await ctx.sleep_until("an hour more", NEW_YEAR + timedelta(days=1, hours=1))
    await ctx.sleep_until("in the past", NEW_YEAR)
    with pytest.raises(TaskTimeout):
        await ctx.await_event("never", timeout=60)
    assert await ctx.now() == NEW_YEAR + timedelta(days=1, hours=1, minutes=1)
    assert [(slept.name, slept.duration) for slept in ctx.recorded.sleeps] == [
        ("a day", timedelta(days=1)),
        ("an hour more", timedelta(hours=1)),
    ]


async def test_events_are_those_given_and_those_emitted() -> None:
    ctx = task_context(events={"point": {"x": 1, "y": 2}})
    assert await ctx.await_event("point", type=Point) == Point(1, 2)
    assert await ctx.emit_event("point", "again") is False
    assert await ctx.emit_event("mine", [1]) is True
    assert await ctx.await_event("mine") == [1]
    assert ctx.recorded.emitted == {"mine": [1]}
    with pytest.raises(InvalidState, match=r"Event 'unknown' is awaited.*events="):
        await ctx.await_event("unknown")


@task
async def double(ctx: TaskContext, point: Point) -> Point:
    await ctx.sleep_for("a minute", 60)
    return Point(point.x * 2, point.y * 2)


@task
def refuse(ctx: SyncTaskContext) -> None:
    raise UserError({"code": ctx.state})


async def test_children_are_run_where_they_are_joined() -> None:
    ctx = task_context(now=NEW_YEAR, state=7)
    doubled = await ctx.spawn("a", double, Point(1, 2), priority=3)
    refused = await ctx.spawn("b", refuse)
    assert await ctx.join(doubled) == Point(2, 4)
    with pytest.raises(ChildFailed) as failure:
        await ctx.join(refused)
    assert failure.value.raw == {"code": 7}
    assert [(child.name, child.task_name, child.params) for child in ctx.recorded.spawned] == [
        ("a", "double", Point(1, 2)),
        ("b", "refuse", None),
    ]
    assert ctx.recorded.spawned[0].options.get("priority") == 3
    assert ctx.recorded.sleeps == []


async def test_results_given_take_the_place_of_children() -> None:
    ctx = task_context(
        results={
            "first": Point(5, 5),
            "double": Point(6, 6),
            "remote": [1],
            "cancelled": ChildCancelled(uuid.uuid4()),
            "late": TaskTimeout("anything", 1),
            "failed": ValueError("no"),
        }
    )
    first = await ctx.spawn("first", double, Point(0, 0))
    second = await ctx.spawn("second", double, Point(0, 0))
    remote, cancelled, late, failed, unknown = [
        await ctx.spawn_by_name(name, "somewhere else") for name in ("remote", "cancelled", "late", "failed", "unknown")
    ]
    assert [await ctx.join(child) for child in (first, second, remote)] == [Point(5, 5), Point(6, 6), [1]]
    with pytest.raises(ChildCancelled):
        await ctx.join(cancelled)
    with pytest.raises(TaskTimeout):
        await ctx.join(late, timeout=60)
    with pytest.raises(ChildFailed, match="no") as failure:
        await ctx.join(failed)
    assert failure.value.name == "ValueError"
    with pytest.raises(InvalidState, match=r"'unknown' is not known.*results="):
        await ctx.join(unknown)


async def test_gathered_calls_are_told_apart() -> None:
    async def square(number: int) -> int:
        return number**2

    ctx = task_context()
    assert await asyncio.gather(*(ctx.step("square", square, number) for number in range(3))) == [0, 1, 4]


async def test_a_seed_repeats_what_is_drawn() -> None:
    async def drawn(**options: Any) -> list[object]:
        ctx = task_context(now=NEW_YEAR, **options)
        return [await ctx.rand(), await ctx.uuid7(), await ctx.rand(), await ctx.uuid7()]

    first = await drawn(seed=1)
    assert first == await drawn(seed=1) != await drawn()
    assert first[1] != first[3]
    assert isinstance(first[1], uuid.UUID)
    assert first[1].version == 7
    assert first[1].int >> 80 == NEW_YEAR.timestamp() * 1000


async def test_it_is_what_it_is_said_to_be() -> None:
    task_id = uuid.uuid4()
    ctx = task_context(task_id=task_id, task_name="t", queue_name="q", attempt=3, headers={"tenant": 1}, state="s")
    assert (ctx.task_id, ctx.task_name, ctx.queue_name, ctx.attempt) == (task_id, "t", "q", 3)
    assert (ctx.headers, ctx.state) == ({"tenant": 1}, "s")
    assert isinstance(ctx, TaskContext)
    assert isinstance(task_context(sync=True), SyncTaskContext)
    await ctx.heartbeat()
    with pytest.raises(TypeError, match="'stat'"):
        task_context(stat=1)  # type: ignore[call-overload]


async def test_entered_it_is_the_current_context() -> None:
    @step("named", max_attempts=2)
    async def decorated() -> str:
        await heartbeat()
        return str(current_context().task_name)

    with task_context(task_name="mine") as ctx:
        assert await decorated() == "mine"
        assert ctx.recorded.steps == ["named"]
    with pytest.raises(InvalidState):
        current_context()


def test_a_def_task_blocks() -> None:
    @step(max_attempts=2)
    def flaky() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError
        return len(tries)

    async def asynchronous() -> str:
        await asyncio.sleep(0)
        return "async"

    @task
    def everything(ctx: SyncTaskContext, name: str) -> list[Any]:
        ctx.sleep_for("a day", 86400)
        child = ctx.spawn("child", double, Point(1, 1))
        ctx.emit_event("emitted", name)
        return [
            ctx.step("flaky", flaky),
            ctx.step("asynchronous", asynchronous),
            ctx.join(child),
            ctx.await_event("emitted"),
            ctx.now(),
        ]

    tries: list[int] = []
    ctx = task_context(sync=True, now=NEW_YEAR)
    day_later = NEW_YEAR + timedelta(days=1, seconds=5)
    assert everything(ctx, "x") == [2, "async", Point(2, 2), "x", day_later]
    assert ctx.recorded.steps == ["flaky", "asynchronous"]


def test_a_step_of_a_def_task_is_not_suspended() -> None:
    ctx = task_context(sync=True)
    with pytest.raises(InvalidState, match="inside a step"):
        ctx.step("asleep", lambda: ctx.sleep_for("here", 1))


async def test_a_def_task_can_be_called_where_an_event_loop_runs() -> None:
    ctx = task_context(sync=True)
    assert ctx.step("one", lambda: 1) == 1
    ctx.sleep_for("a day", 86400)
    assert len(ctx.recorded.sleeps) == 1


metadata = MetaData()
orders = Table("orders", metadata, Column("id", Integer, primary_key=True))


@pytest.fixture
def sync_engine() -> Generator[Engine]:
    engine = create_engine("sqlite://")
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncGenerator[AsyncSession]:
    async with engine.connect() as connection, connection.begin() as transaction:
        await connection.run_sync(metadata.create_all)
        yield AsyncSession(connection, join_transaction_mode="create_savepoint")
        await transaction.rollback()


async def place(session: AsyncSession, number: int) -> int:
    await session.execute(insert(orders).values(id=number))
    if number < 0:
        raise ValueError
    if number == 13:
        await session.commit()
    if number == 14:
        await session.rollback()
    return number


def place_sync(session: Session, number: int) -> int:
    session.execute(insert(orders).values(id=number))
    if number < 0:
        raise ValueError
    if number == 13:
        session.commit()
    if number == 14:
        session.rollback()
    return number


COUNT = select(func.count()).select_from(orders)


async def test_a_transaction_is_a_savepoint_of_the_session_given(session: AsyncSession) -> None:
    ctx = task_context(session=session)
    assert await ctx.transaction("place", place, 1) == 1
    assert await ctx.transaction("place", place_sync, 2) == 2
    for number, error in [(-1, ValueError), (13, InvalidState), (14, InvalidState)]:
        for function in (place, place_sync):
            with pytest.raises(error):
                await ctx.transaction("place", function, number)
    with pytest.raises(SerializationError, match="is a coroutine, which is never awaited.*Pass the coroutine function"):
        await ctx.transaction("place", lambda _: place(session, 3))
    assert await session.scalar(COUNT) == 2
    assert ctx.recorded.steps == ["place", "place"]
    with pytest.raises(InvalidState, match=r"without a session.*session="):
        await task_context().transaction("place", place, 1)


def test_a_transaction_of_a_def_task_stays_in_its_thread(sync_engine: Engine) -> None:
    with Session(sync_engine) as session:
        ctx = task_context(sync=True, session=session)
        assert ctx.transaction("place", place_sync, 1) == 1
        with pytest.raises(InvalidState, match="committed"):
            ctx.transaction("place", place_sync, 13)
        assert session.scalar(COUNT) == 1


def test_a_def_task_needs_a_session_of_its_kind() -> None:
    engine = create_async_engine("postgresql+asyncpg://", poolclass=NullPool)
    ctx = task_context(sync=True, session=AsyncSession(engine))
    with pytest.raises(InvalidState, match="synchronous"):
        ctx.transaction("place", place_sync, 1)
