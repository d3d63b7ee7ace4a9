"""Values that tasks publish: few writes, the last one always, and none by a replay."""

import asyncio
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from durable_sa import (
    Durable,
    InvalidName,
    PayloadTooLarge,
    SerializationError,
    SyncTaskContext,
    TaskContext,
    TaskNotFound,
    TaskRow,
    TaskValueRow,
    task,
)
from durable_sa.testing import task_context
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


class Progress(BaseModel):
    done: int
    total: int = 10


async def versions(engine: AsyncEngine, spawned: Any) -> dict[str, int]:
    async with engine.connect() as connection:
        rows = await connection.execute(
            select(TaskValueRow.name, TaskValueRow.version).where(TaskValueRow.task_id == spawned.task_id)
        )
        return {row.name: row.version for row in rows}


async def test_the_last_value_is_written_before_the_task_suspends_or_ends(run: Runner, engine: AsyncEngine) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        for done in range(500):
            await ctx.publish("progress", Progress(done=done))
        await ctx.publish("state", "waiting")
        await ctx.await_event("go on")
        await ctx.publish("progress", Progress(done=500))

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    assert await run.durable.get_value(spawned, "progress", type=Progress) == Progress(done=499)
    assert await run.durable.get_value(spawned.task_id, "state") == "waiting"
    assert await run.durable.get_value(spawned, "other") is None
    assert (await versions(engine, spawned))["progress"] <= 3
    await run.durable.emit_event("go on")
    await run.wait(spawned)
    assert await run.durable.get_value(spawned, "progress") == {"done": 500, "total": 10}
    async with AsyncSession(engine) as session:
        joined = await session.execute(
            select(TaskRow.task_name, TaskValueRow.value)
            .join(TaskValueRow, TaskValueRow.task_id == TaskRow.task_id)
            .where(TaskValueRow.name == "state")
        )
        assert joined.all() == [("work", "waiting")]


async def test_the_last_value_of_a_task_that_fails_is_written(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.publish("state", "begun")
        await ctx.publish("state", "failing")
        raise Crash

    spawned = await run.spawn(work, max_attempts=1)
    await run.wait(spawned)
    assert await run.durable.get_value(spawned, "state") == "failing"


async def test_a_replay_publishes_nothing(run: Runner, engine: AsyncEngine) -> None:
    async def step() -> None: ...

    @task
    async def work(ctx: TaskContext) -> None:
        async def publish() -> None:
            await ctx.publish("step", ctx.attempt)

        await ctx.publish("attempt", ctx.attempt)
        await ctx.step("publish", publish)
        await ctx.step("step", step)
        if ctx.attempt == 1:
            raise Crash
        await ctx.publish("late", ctx.attempt)

    spawned = await run.spawn(work)
    await run.wait(spawned)
    values = [await run.durable.get_value(spawned, name) for name in ("attempt", "step", "late")]
    assert values == [1, 1, 2]
    assert await versions(engine, spawned) == {"attempt": 1, "step": 1, "late": 1}


async def test_a_value_that_is_published_for_long_is_seen_meanwhile(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async def busy() -> None:
            number = 0
            while not done.is_set():
                number += 1
                await ctx.publish("number", number)
                await asyncio.sleep(0.01)

        await ctx.step("busy", busy)

    done = asyncio.Event()
    spawned = await run.spawn(work)
    seen: list[int] = []
    async for number in run.durable.watch_value(spawned, "number", type=int):
        seen.append(number)
        if len(seen) == 2:
            done.set()
    assert seen[0] < seen[1] <= seen[-1]
    assert seen[-1] == await run.durable.get_value(spawned, "number")
    assert [value async for value in run.durable.watch_value(spawned, "number")] == seen[-1:]
    assert [value async for value in run.durable.watch_value(spawned, "other")] == []


async def test_a_value_is_read_in_the_callers_transaction(
    run: Runner, engine: AsyncEngine, sync_engine: Engine
) -> None:
    @task
    def work(ctx: SyncTaskContext) -> None:
        ctx.publish("progress", Progress(done=3))

    spawned = await run.spawn(work)
    await run.wait(spawned)
    async with AsyncSession(engine) as session:
        assert await run.durable.get_value_with(session, spawned, "progress", type=Progress) == Progress(done=3)
    with Session(sync_engine) as sync_session:
        assert run.durable.get_value_with(sync_session, spawned, "progress", type=Progress) == Progress(done=3)
        assert run.durable.get_value_with(sync_session, spawned, "other") is None
        with pytest.raises(TaskNotFound):
            run.durable.get_value_with(sync_session, uuid.uuid4(), "progress")


async def test_what_cannot_be_published_or_read_is_refused(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> int:
        for name in ("", "$name", "a\n", "x" * 201):
            with pytest.raises(InvalidName):
                _ = ctx.publish(name, 1)
        with pytest.raises(SerializationError, match="Value 'a'"):
            _ = ctx.publish("a", float("inf"))
        with pytest.raises(PayloadTooLarge):
            _ = ctx.publish("a", "x" * 2**24)
        await ctx.publish("a", "one")
        return 1

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == 1
    durable, unknown = run.durable, uuid.uuid4()
    with pytest.raises(SerializationError, match="Value 'a' of task"):
        await durable.get_value(spawned, "a", type=int)
    with pytest.raises(TaskNotFound):
        await durable.get_value(unknown, "a")
    with pytest.raises(TaskNotFound):
        await anext(durable.watch_value(unknown, "a"))
    with pytest.raises(InvalidName):
        await durable.get_value(spawned, "$a")


async def test_a_call_that_is_never_awaited_fails_the_task(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        ctx.publish("a", 1)  # type: ignore[unused-coroutine]

    assert "publish 'a' is made and never awaited" in (await run.failure(work, max_attempts=1)).message


async def test_a_run_that_lost_its_task_publishes_nothing_more(run: Runner) -> None:
    begun, lost = asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> int:
        async def body() -> None:
            begun.set()
            try:
                await lost.wait()
                await ctx.publish("attempt", ctx.attempt)
                await asyncio.sleep(60)
            finally:
                lost.set()

        if ctx.attempt == 1:
            await ctx.step("body", body)
        return ctx.attempt

    spawned = await run.spawn(work)
    await begun.wait()
    await Rows(run.durable, spawned).take_over()
    lost.set()
    assert (await run.wait(spawned)).output is not None
    assert await run.durable.get_value(spawned, "attempt") is None


@pytest.mark.parametrize("ends", [True, False])
async def test_a_value_that_a_lost_run_has_not_written_is_written_after_the_replay(
    run: Runner, engine: AsyncEngine, ends: bool
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.publish("state", "one")
        await ctx.step("first", Tally().add, 1)
        await ctx.publish("state", "two")
        await ctx.step("second", Tally().add, 2)
        if not begun.is_set():
            begun.set()
            await asyncio.sleep(60)
        if not ends:
            await go_on.wait()

    spawned, rows = await run.spawn(work), Rows(run.durable, 0)
    rows.task_id = spawned.task_id
    await begun.wait()
    await eventually(lambda: run.durable.get_value(spawned, "state"))
    await eventually(lambda: rows.checkpoints("second"))
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE durable.tasks SET lease_losses = 1"))
        await connection.execute(text("DELETE FROM durable.task_values"))
    await rows.take_over()
    if not ends:
        assert await eventually(lambda: run.durable.get_value(spawned, "state")) == "two"
        go_on.set()
    await run.wait(spawned)
    assert await run.durable.get_value(spawned, "state") == "two"
    assert await versions(engine, spawned) == {"state": 1}


async def test_values_are_deleted_with_their_task(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None:
        await ctx.publish("a", 1)

    async with durable.worker():
        spawned = await durable.spawn(work)
        await durable.wait_for_result(spawned, timeout=5)
    assert await durable.cleanup_tasks(0) == 1
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM durable.task_values")) == 0


async def test_a_context_without_a_database_publishes() -> None:
    ctx = task_context()
    await ctx.publish("progress", Progress(done=1))
    await ctx.publish("progress", Progress(done=2))
    assert ctx.recorded.published == {"progress": {"done": 2, "total": 10}}
