"""The timeout of a task: the time in memory of each attempt."""

import asyncio
import threading
import time
from typing import Any

import pytest

from durable_sa import (
    Durable,
    InvalidConfiguration,
    RetryStrategy,
    SyncTaskContext,
    TaskContext,
    TaskTimeout,
    step,
    task,
)
from durable_sa.statements.history import CHECKPOINTS

from ..support import eventually
from .conftest import Rows

NOW = RetryStrategy.fixed(0)


async def failure(durable: Durable, function: Any) -> tuple[str, str, str | None]:
    spawned = await durable.spawn(function)
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status == "failed", result
    assert result.error is not None
    return result.error.name, result.error.message, result.error.step


async def test_each_attempt_has_its_time_and_is_retried(durable: Durable, sql: Rows) -> None:
    caught: list[BaseException] = []

    @durable.task(timeout=0.1, max_attempts=2, retry_strategy=NOW)
    async def slow(ctx: TaskContext) -> None:
        try:
            await asyncio.sleep(3600)
        except TaskTimeout as error:
            caught.append(error)
            raise

    assert await failure(durable, slow) == ("TaskTimeout", "Task 'slow' took longer than 0.1 s", None)
    assert len(caught) == 2
    rows = await sql("SELECT attempt, state, error ->> 'name' FROM durable.runs ORDER BY 1")
    assert rows == [(1, "failed", "TaskTimeout"), (2, "failed", "TaskTimeout")]


async def test_what_is_awaited_is_cancelled(durable: Durable) -> None:
    """Also what asyncio cancels only for a cancellation, such as the tasks of a group."""
    cancelled: list[str] = []

    async def branch(name: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.append(name)

    @durable.task(timeout=0.05, max_attempts=1)
    async def grouped(ctx: TaskContext) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(branch("group"))
        except TaskTimeout:
            assert cancelled == ["group"]
        try:
            async with asyncio.timeout(3600):
                await asyncio.gather(branch("gather"), asyncio.wait_for(branch("wait_for"), 3600))
        except TaskTimeout:
            assert sorted(cancelled) == ["gather", "group", "wait_for"]
        await asyncio.sleep(3600)

    # A task that catches it gets the next one as long after it.
    began = time.monotonic()
    assert (await failure(durable, grouped))[0] == "TaskTimeout"
    assert time.monotonic() - began > 0.15


async def test_a_step_is_interrupted_and_not_tried_once_more(durable: Durable, sql: Rows) -> None:
    calls: list[int] = []

    @step(max_attempts=5, retry_strategy=NOW, timeout=3600)
    async def hang() -> None:
        calls.append(1)
        await asyncio.sleep(3600)

    @durable.task(timeout=0.05, max_attempts=1)
    async def slow(ctx: TaskContext) -> None:
        await hang()

    assert await failure(durable, slow) == ("TaskTimeout", "Task 'slow' took longer than 0.05 s", "hang")
    assert len(calls) == 1
    assert await sql("SELECT name FROM durable.checkpoints") == []


@pytest.mark.slow
async def test_suspension_does_not_count_and_memory_adds_up(durable: Durable, sql: Rows) -> None:
    """An attempt of many short runs comes to its end, and the next one begins with all its time."""

    @durable.task(timeout=0.5, max_attempts=2, retry_strategy=NOW)
    async def stages(ctx: TaskContext) -> None:
        while True:
            await ctx.sleep_for("pause", 0.15)
            if ctx.attempt == 2:
                return
            await ctx.step("work", asyncio.sleep, 0.1)

    spawned = await durable.spawn(stages)
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=20)).status == "completed"
    assert await sql("SELECT attempt, error ->> 'name' FROM durable.runs ORDER BY 1") == [(1, "TaskTimeout"), (2, None)]
    # If the pauses counted, there would be two.
    pauses = await sql("SELECT count(*) FROM durable.checkpoints WHERE name = 'pause'")
    assert 3 <= pauses[0][0] <= 6
    assert "$time" not in [row.name for row in await sql(CHECKPOINTS, task_id=spawned.task_id, with_payloads=True)]


@pytest.mark.slow
async def test_a_plain_task_gets_it_in_its_next_call(durable: Durable) -> None:
    seen: list[str] = []

    @durable.task(timeout=0.1, max_attempts=1)
    def slow(ctx: SyncTaskContext) -> None:
        time.sleep(0.3)
        try:
            ctx.now()
        except TaskTimeout:
            seen.append("raised")
            raise

    @durable.task(timeout=0.4, max_attempts=1)
    def stepping(ctx: SyncTaskContext) -> None:
        ctx.step("nap", nap)
        seen.append("recorded")
        ctx.step("never", nap)

    def nap() -> None:
        time.sleep(0.6)

    @durable.task(timeout=0.1, max_attempts=1)
    def calling(ctx: SyncTaskContext) -> None:
        ctx.step("hang", asyncio.sleep, 3600)

    assert await failure(durable, slow) == ("TaskTimeout", "Task 'slow' took longer than 0.1 s", None)
    assert await failure(durable, stepping) == ("TaskTimeout", "Task 'stepping' took longer than 0.4 s", None)
    assert await failure(durable, calling) == ("TaskTimeout", "Task 'calling' took longer than 0.1 s", "hang")
    assert seen == ["raised", "recorded"]
    await eventually(lambda: not any(t.name.startswith("durable:") for t in threading.enumerate()))


async def test_a_wait_that_suspends_is_none_of_its_concern(durable: Durable, sql: Rows) -> None:
    @durable.task(timeout=0.2)
    async def waiting(ctx: TaskContext) -> Any:
        return await ctx.await_event("go", timeout=3600)

    spawned = await durable.spawn(waiting)
    async with durable.worker():

        async def sleeps() -> bool:
            return await sql("SELECT state FROM durable.tasks") == [("sleeping",)]

        await eventually(sleeps)
        await asyncio.sleep(0.3)
        await durable.emit_event("go", 5)
        assert (await durable.wait_for_result(spawned, timeout=10)).output == 5


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5"])
def test_a_timeout_that_cannot_work_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="timeout"):
        task(timeout=timeout)
