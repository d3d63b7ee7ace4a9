"""The tasks that ended per minute, as workers count them for charts."""

import asyncio
import logging
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update

from durable_sa import Durable, RetryStrategy, TaskContext, task
from durable_sa.models import TaskMinute, TaskRow
from durable_sa.worker import minutes
from tests.support import eventually


@task("work")
async def work(ctx: TaskContext) -> None:
    pass


@task("slow")
async def slow(ctx: TaskContext) -> None:
    await asyncio.sleep(0.05)


@task("broken", max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
async def broken(ctx: TaskContext) -> None:
    raise ValueError


@task("waiting")
async def waiting(ctx: TaskContext) -> None:
    await ctx.await_event("never")


@task("parent", max_attempts=1)
async def parent(ctx: TaskContext) -> None:
    await ctx.spawn("child", waiting, delay=3600)
    raise ValueError


@task("busy")
async def busy(ctx: TaskContext) -> None:
    await asyncio.sleep(60)


TASKS = (work, slow, broken, waiting, parent, busy)


async def counts(durable: Durable) -> dict[str, tuple[int, int, int]]:
    async with durable.engine.connect() as connection:
        found = await connection.execute(
            text(
                "SELECT task_name, sum(completed), sum(failed), sum(cancelled) FROM durable.task_minutes"
                " GROUP BY task_name"
            )
        )
        return {row[0]: (int(row[1]), int(row[2]), int(row[3])) for row in found}


@pytest.fixture
def registered(durable: Durable) -> Durable:
    for each in TASKS:
        durable.register(each)
    return durable


async def test_a_worker_counts_what_it_ends_and_what_it_finds_to_be_cancelled(
    registered: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = registered
    monkeypatch.setattr(minutes, "WRITE_INTERVAL", 0.02)
    for _ in range(3):
        await durable.spawn(work)
    for each in (slow, broken, parent):
        await durable.spawn(each)
    overdue = await durable.spawn(waiting)
    async with durable.engine.begin() as connection:
        await connection.execute(
            update(TaskRow)
            .where(TaskRow.task_id == overdue.task_id)
            .values(available_at=datetime.now(UTC) + timedelta(days=1), cancel_at=datetime.now(UTC))
        )
    expected = {
        "work": (3, 0, 0),
        "slow": (1, 0, 0),
        "broken": (0, 1, 0),
        "parent": (0, 1, 0),
        "waiting": (0, 0, 2),
    }

    async def counted() -> bool:
        return await counts(durable) == expected

    # The child of a failed parent is cancelled when the worker has nothing else to do.
    async with durable.worker():
        await eventually(counted)
    async with durable.engine.connect() as connection:
        rows = (await connection.execute(select(TaskMinute.__table__))).all()
    for row in rows:
        assert (row.queue_name, row.minute.second, row.minute.microsecond) == ("default", 0, 0)
        assert abs(datetime.now(UTC) - row.minute) < timedelta(minutes=3)
        assert 0 <= row.slowest <= row.milliseconds
    # It took 50 ms, from the server's clock to the worker's, which differ by up to a round trip.
    assert max(row.slowest for row in rows if row.task_name == "slow") >= 25


async def test_a_running_task_that_a_client_cancels_is_counted_once(registered: Durable) -> None:
    durable = registered
    spawned = await durable.spawn(busy)
    async with durable.worker():
        await eventually(lambda: _state_is(durable, spawned.task_id, "running"))
        await durable.cancel_task(spawned.task_id)
    assert await counts(durable) == {"busy": (0, 0, 1)}


async def _state_is(durable: Durable, task_id: uuid.UUID, state: str) -> bool:
    found = await durable.get_task_result(task_id)
    return found is not None and found.status == state


async def test_counts_are_written_every_few_seconds_and_are_those_of_the_whole_minute(
    registered: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = registered
    monkeypatch.setattr(minutes, "WRITE_INTERVAL", 0.02)
    async with durable.worker():
        for number in range(1, 4):
            await durable.spawn(work)

            async def written(number: int = number) -> bool:
                return await counts(durable) == {"work": (number, 0, 0)}

            await eventually(written)


async def test_a_worker_that_may_not_write_counts_works_and_says_so_once(
    registered: Durable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = registered
    monkeypatch.setattr(minutes, "WRITE_INTERVAL", 0.02)
    async with durable.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE durable.task_minutes ADD CONSTRAINT never CHECK (completed < 0)"))
    try:
        async with durable.worker():
            await durable.wait_for_result(await durable.spawn(work), timeout=20)
            await eventually(lambda: "the count of ended tasks failed" in caplog.text)
    finally:
        async with durable.engine.begin() as connection:
            await connection.execute(text("ALTER TABLE durable.task_minutes DROP CONSTRAINT never"))
    about = [record for record in caplog.records if "count of ended tasks" in record.message]
    assert [record.levelno for record in about] == [logging.ERROR]
    assert "has ended with work left" not in caplog.text


FILL = """
INSERT INTO durable.task_minutes (queue_name, minute, task_name, worker_id, completed)
SELECT :queue, date_trunc('minute', now()) - number * interval '1 hour', 'work', gen_random_uuid(), 1
FROM generate_series(0, 2399) AS number
"""


async def test_counts_are_kept_as_long_as_tasks_and_are_deleted_with_their_queue(registered: Durable) -> None:
    durable = registered
    await durable.create_queue("mail", retention=timedelta(days=10))
    await durable.create_queue("audit", retention=None)

    async def number(queue: str) -> Any:
        async with durable.engine.connect() as connection:
            return await connection.scalar(
                text("SELECT count(*) FROM durable.task_minutes WHERE queue_name = :queue"), {"queue": queue}
            )

    async with durable.engine.begin() as connection:
        for queue in ("mail", "audit"):
            await connection.execute(text(FILL), {"queue": queue})
    async with durable.worker(queue_names=["audit"]) as worker:
        worker.maintenance.look_at_everything()

        async def deleted() -> bool:
            worker.maintenance.look_at_everything()
            return bool(await number("mail") == 240)

        await eventually(deleted)
    assert await number("audit") == 2400
    await durable.drop_queue("audit")
    assert (await number("audit"), await number("mail")) == (0, 240)
