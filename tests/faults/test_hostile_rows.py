"""Rows that somebody has changed by hand: they fail by themselves, once, and stop nobody else."""

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, TaskContext

from ..support import eventually

HOSTILE = {
    "params of another type": "params = '\"garbage\"'",
    "params that are not there": "params = NULL",
    "numbers beyond all limits": "params = (repeat('9', 6000))::json",
    "depth without end": "params = (repeat('[', 3000) || repeat(']', 3000))::json",
    "half a surrogate": """params = '{"number": 1, "text": "\\ud800"}'""",
    "an attempt beyond all limits": "attempt = 2147483647",
    "a fence beyond all limits": "fence = 9223372036854775807",
    "headers that are none": "headers = '[1]'",
    "a name that nobody knows": "task_name = 'unknown'",
}
NEVER_CLAIMED = {"an attempt beyond all limits", "a fence beyond all limits", "a name that nobody knows"}
HARMLESS = {"headers that are none"}


async def test_rows_that_cannot_be_read_fail_alone(durable: Durable, engine: AsyncEngine) -> None:
    executed = 0

    @durable.task
    async def work(ctx: TaskContext, params: dict[str, int | str]) -> int:
        nonlocal executed
        executed += 1
        return executed

    good = [await durable.spawn(work, {"number": number}) for number in range(5)]
    bad = {what: await durable.spawn(work, {"number": 0}) for what in HOSTILE}
    good += [await durable.spawn(work, {"number": number}) for number in range(5)]
    async with engine.begin() as connection:
        for what, change in HOSTILE.items():
            statement = text(f"UPDATE durable.tasks SET {change.replace(':', chr(92) + ':')} WHERE task_id = :task_id")
            await connection.execute(statement, {"task_id": bad[what].task_id})

    async with durable.worker(concurrency=20):
        for spawned in good:
            assert (await durable.wait_for_result(spawned, timeout=10)).error is None
        for what, spawned in bad.items():
            if what in NEVER_CLAIMED:
                continue
            result = await durable.wait_for_result(spawned, timeout=10)
            if what not in HARMLESS:
                assert result.error is not None, what
                assert result.error.name in ("InvalidTaskParams", "SerializationError"), (what, result.error)
                assert "999" not in result.error.message
    async with engine.connect() as connection:
        rows = (await connection.execute(text("SELECT task_id, state, failures FROM durable.tasks"))).all()
    found = {row.task_id: (row.state, row.failures) for row in rows}
    for what, spawned in bad.items():
        expected: Any = ("failed", 1)
        if what in NEVER_CLAIMED:
            expected = ("pending", 0)
        elif what in HARMLESS:
            expected = ("completed", 0)
        assert found[spawned.task_id] == expected, what


@pytest.mark.parametrize(
    "change",
    [
        "state = 'garbage'",
        "available_at = 'infinity'",
        "retry_base_delay = 'NaN'",
        "retry_factor = 1e300",
        "max_attempts = 0",
        "retry_kind = 'linear'",
        "max_running_time = '1000000 years'",
        "finished_at = now()",
    ],
)
async def test_rows_that_would_stop_a_worker_cannot_be_written(
    durable: Durable, engine: AsyncEngine, change: str
) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None: ...

    await durable.spawn(work)
    async with engine.begin() as connection:
        with pytest.raises(IntegrityError):
            await connection.execute(text(f"UPDATE durable.tasks SET {change}"))


async def test_orphaned_waits_and_lost_runs_are_no_obstacle(durable: Durable, engine: AsyncEngine) -> None:
    """A wait whose task is gone, and an ended attempt that is missing."""

    @durable.task
    async def waiter(ctx: TaskContext) -> int:
        return await ctx.await_event("signal", type=int)

    async with durable.worker():
        gone, stays = await durable.spawn(waiter), await durable.spawn(waiter)

        async def waiting() -> bool:
            async with engine.connect() as connection:
                return (await connection.execute(text("SELECT count(*) FROM durable.waits"))).scalar() == 2

        await eventually(waiting)
        async with engine.begin() as connection:
            for table in ("tasks", "runs"):
                await connection.execute(
                    text(f"DELETE FROM durable.{table} WHERE task_id = :task_id"), {"task_id": gone.task_id}
                )
        await durable.emit_event("signal", 7)
        assert (await durable.wait_for_result(stays, timeout=10)).output == 7
