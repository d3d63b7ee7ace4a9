"""Asking how a task stands, and waiting for what comes of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import (
    Durable,
    InvalidConfiguration,
    RetryStrategy,
    SerializationError,
    TaskContext,
    TaskErrorInfo,
    TaskHandle,
    TaskNotFound,
    TaskPollResult,
    TaskRow,
    TaskStatus,
    UserError,
    task,
)
from durable_sa.testing import run_until_idle
from tests.client.support import Gate, read
from tests.support import eventually


@dataclass
class Receipt:
    total: Decimal
    at: datetime


RECEIPT = Receipt(Decimal("1.10"), datetime(2026, 1, 1, tzinfo=UTC))


@task
async def pay(ctx: Any, params: int) -> Receipt:
    return RECEIPT


@task
async def idle(ctx: Any) -> None: ...


@pytest.mark.slow
async def test_a_task_is_followed_from_beginning_to_end(durable: Durable, engine: AsyncEngine) -> None:
    gate = asyncio.Event()

    @durable.task("work")
    async def work(ctx: TaskContext) -> str:
        await gate.wait()
        await ctx.sleep_for("nap", 0.3)
        return "done"

    spawned = await durable.spawn(work)
    seen: list[TaskPollResult[str]] = []

    async def stands(wanted: TaskStatus) -> bool:
        result = await durable.get_task_result(spawned)
        assert result is not None
        if not seen or seen[-1] != result:
            seen.append(result)
        return result.status is wanted

    assert await stands(TaskStatus.PENDING)
    async with durable.worker():
        await eventually(lambda: stands(TaskStatus.RUNNING))
        gate.set()
        await eventually(lambda: stands(TaskStatus.SLEEPING))
        await eventually(lambda: stands(TaskStatus.COMPLETED))
    assert {result.task_id for result in seen} == {spawned.task_id}
    assert [result.output for result in seen if result.status is not TaskStatus.COMPLETED] == [None] * (len(seen) - 1)
    assert seen[-1] == TaskPollResult(spawned.task_id, TaskStatus.COMPLETED, "done", None)
    assert seen[-1].status.finished


async def test_outputs_are_typed_where_the_task_is_known_and_json_elsewhere(
    durable: Durable, engine: AsyncEngine
) -> None:
    durable.register(pay)
    spawned = await durable.spawn(pay, 1)
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=20)
    assert result.output == RECEIPT
    for named in (spawned, spawned.task_id, TaskHandle[Receipt](spawned.task_id)):
        found = await durable.get_task_result(named)
        assert found is not None
        assert found.output == RECEIPT
    stranger = Durable(engine)
    plain = await stranger.get_task_result(spawned.task_id)
    assert plain is not None
    assert plain.output == {"total": "1.10", "at": "2026-01-01T00:00:00Z"}


async def test_every_falsy_output_comes_back(durable: Durable) -> None:
    @durable.task("echo")
    async def echo(ctx: Any, params: Any) -> Any:
        return params

    value: Any
    async with durable.worker(concurrency=6):
        for value in (None, False, 0, "", [], {}):
            result = await durable.wait_for_result(await durable.spawn(echo, value), timeout=20)
            assert (result.status, result.output, result.error) == (TaskStatus.COMPLETED, value, None)


async def test_a_failure_says_why(durable: Durable) -> None:
    @durable.task("fail", max_attempts=1)
    async def fail(ctx: Any, params: str) -> None:
        if params == "user":
            raise UserError({"message": "Not found", "code": 404})
        raise KeyError(params)

    async with durable.worker(concurrency=2):
        user = await durable.wait_for_result(await durable.spawn(fail, "user"), timeout=20)
        other = await durable.wait_for_result(await durable.spawn(fail, "other"), timeout=20)
    assert (user.status, user.output) == (TaskStatus.FAILED, None)
    assert user.error == TaskErrorInfo("UserError", "Not found", {"message": "Not found", "code": 404})
    assert other.error == TaskErrorInfo("KeyError", "'other'", None)


async def test_a_task_between_attempts_has_no_error_yet(durable: Durable) -> None:
    @durable.task("fail", retry_strategy=RetryStrategy.fixed(3600))
    async def fail(ctx: Any) -> None:
        raise ValueError

    async with durable.worker():
        spawned = await durable.spawn(fail)

        async def failed_once() -> bool:
            row = await read(durable.engine, spawned.task_id)
            return bool(row.failures)

        await eventually(failed_once)
    result = await durable.get_task_result(spawned)
    assert result == TaskPollResult(spawned.task_id, TaskStatus.PENDING, None, None)


async def test_an_unknown_task_has_no_result(durable: Durable) -> None:
    unknown = uuid.uuid4()
    assert await durable.get_task_result(unknown) is None
    with pytest.raises(TaskNotFound, match=str(unknown)):
        await durable.wait_for_result(unknown)
    with pytest.raises(TaskNotFound, match=str(unknown)):
        await durable.wait_for_result(TaskHandle[None](unknown), timeout=5)


async def test_a_task_that_is_not_committed_is_unknown(durable: Durable, engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        spawned = await durable.spawn_with(connection, idle)
        assert await durable.get_task_result(spawned) is None


async def test_what_is_no_task_is_refused(durable: Durable) -> None:
    for wrong in (None, 5, "here", idle):
        with pytest.raises(TypeError, match="UUID, a SpawnResult or a TaskHandle"):
            await durable.get_task_result(wrong)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="UUID, a SpawnResult or a TaskHandle"):
            await durable.wait_for_result(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not 'here'"):
        await durable.cancel_task("here")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, 0.05, timedelta(milliseconds=50)])
async def test_a_wait_is_over_after_its_timeout(durable: Durable, timeout: Any) -> None:
    spawned = await durable.spawn(idle)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=f"task {spawned.task_id} has not ended within 0") as raised:
        await durable.wait_for_result(spawned, timeout=timeout)
    assert type(raised.value) is TimeoutError
    assert time.monotonic() - begun < 3
    result = await durable.get_task_result(spawned)
    assert result is not None
    assert result.status is TaskStatus.PENDING


async def test_the_end_of_a_wait_says_how_the_task_stands(durable: Durable) -> None:
    @task
    async def asleep(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", 3600)

    spawned = await durable.spawn(asleep)
    with pytest.raises(TimeoutError, match="it is pending. Does a worker run that .* knows a task named 'asleep'"):
        await durable.wait_for_result(spawned, timeout=0.05)
    durable.register(asleep)
    await run_until_idle(durable)
    with pytest.raises(TimeoutError, match="within 0.05 seconds: it is sleeping$"):
        await durable.wait_for_result(spawned, timeout=0.05)


async def test_what_has_ended_is_there_even_without_time_to_wait(durable: Durable) -> None:
    spawned = await durable.spawn(idle)
    await durable.cancel_task(spawned)
    for timeout in (0, timedelta(microseconds=1), 5):
        assert (await durable.wait_for_result(spawned, timeout=timeout)).status is TaskStatus.CANCELLED
    with pytest.raises(TaskNotFound):
        await durable.wait_for_result(uuid.uuid4(), timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
async def test_timeouts_that_cannot_be_are_refused(durable: Durable, timeout: Any) -> None:
    spawned = await durable.spawn(idle)
    with pytest.raises(InvalidConfiguration, match="timeout"):
        await durable.wait_for_result(spawned, timeout=timeout)


@pytest.mark.slow
async def test_many_waits_hold_no_connection(database_url: URL) -> None:
    app = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=5)
    async with Durable(app, tasks=[idle]) as client:
        spawned = await client.spawn_many([(idle, None)] * 50)
        waiting = [asyncio.create_task(client.wait_for_result(each)) for each in spawned]
        free = 0
        for _ in range(60):
            await asyncio.sleep(0.005)
            free += app.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert free > 20
        async with app.connect() as connection:
            assert await connection.scalar(sa.select(sa.func.count()).select_from(TaskRow)) == 50
        for each in spawned:
            await client.cancel_task(each)
        assert {(await wait).status for wait in waiting} == {TaskStatus.CANCELLED}
    await app.dispose()


async def test_cancelling_a_waiter_ends_its_wait_and_no_other(durable: Durable, engine: AsyncEngine) -> None:
    spawned = await durable.spawn(idle)
    stays = asyncio.create_task(durable.wait_for_result(spawned))
    for round_ in range(20):
        waiter = asyncio.create_task(durable.wait_for_result(spawned))
        await asyncio.sleep(round_ * 0.0005)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(durable.wait_for_result(spawned), 0.01)
    await durable.cancel_task(spawned)
    assert (await asyncio.wait_for(stays, 5)).status is TaskStatus.CANCELLED
    await durable.close()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.slow
async def test_a_wait_outlasts_an_outage_of_the_database(gate: Gate, durable: Durable) -> None:
    spawned = await durable.spawn(idle)
    async with Durable(gate.url) as client:
        await client.get_task_result(spawned)
        waiting = asyncio.create_task(client.wait_for_result(spawned, timeout=20))
        for _ in range(3):
            await asyncio.sleep(0.1)
            await gate.shut()
            await asyncio.sleep(0.3)
            await gate.open()
        assert not waiting.done()
        await durable.cancel_task(spawned)
        assert (await waiting).status is TaskStatus.CANCELLED
        # Its deadline holds while the database is away.
        other = await durable.spawn(idle)
        waiting = asyncio.create_task(client.wait_for_result(other, timeout=0.5))
        await asyncio.sleep(0.1)
        await gate.shut()
        with pytest.raises(TimeoutError, match="has not ended within 0.5 seconds"):
            await waiting
        with pytest.raises(OSError, match="Connect"):
            await client.wait_for_result(other, timeout=20)
        await gate.open()


async def test_a_timeout_of_the_database_is_not_one_of_the_wait() -> None:
    async def keep_silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await closing.wait()
        writer.close()

    closing = asyncio.Event()
    server = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    app = create_async_engine(f"postgresql+asyncpg://a:b@127.0.0.1:{port}/c", connect_args={"timeout": 0.1})
    for timeout in (None, 30):
        with pytest.raises(TimeoutError) as raised:
            await Durable(app).wait_for_result(uuid.uuid4(), timeout=timeout)
        assert "has not ended" not in str(raised.value)
    closing.set()
    server.close()
    await app.dispose()


async def test_a_result_that_no_longer_fits_says_so(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(pay)
    spawned = await durable.spawn(pay, 1)
    async with durable.worker():
        await durable.wait_for_result(spawned, timeout=20)
    async with engine.begin() as connection:
        await connection.execute(sa.text("UPDATE durable.tasks SET output = '\"gone\"'"))
    with pytest.raises(SerializationError, match=f"output of task {spawned.task_id} cannot be read back as Receipt"):
        await durable.get_task_result(spawned)


@pytest.mark.parametrize("error", ["[1]", '"garbage"', "7"])
async def test_an_error_that_somebody_has_changed_says_so(durable: Durable, engine: AsyncEngine, error: str) -> None:
    spawned = await durable.spawn(pay, 1)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(
            f"UPDATE durable.tasks SET state = 'failed', outcome = 'failed', finished_at = now(), error = '{error}'"
        )
    with pytest.raises(SerializationError, match=f"error of task {spawned.task_id} cannot be read back"):
        await durable.get_task_result(spawned)


@pytest.mark.slow
async def test_another_process_ends_the_wait_soon(durable: Durable, database_url: URL) -> None:
    """Another client here: what it does is seen in the database only."""
    spawned = await durable.spawn(idle)
    waiting = asyncio.create_task(durable.wait_for_result(spawned))
    await asyncio.sleep(0.3)
    async with Durable(database_url, tasks=[idle]) as other, other.worker():
        await other.wait_for_result(spawned, timeout=20)
        begun = time.monotonic()
        await waiting
        assert time.monotonic() - begun < 3
