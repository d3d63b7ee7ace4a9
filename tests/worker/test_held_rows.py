"""Rows that somebody else holds locked, for however long: all that a worker tends besides goes on at once."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, TaskContext, TaskStatus
from durable_sa.database.channel import DedicatedConnection
from durable_sa.worker.retention import Retention

from ..support import eventually
from .conftest import Rows

PROMPT = 5.0
"""Seconds in which things happen that nobody holds up; those that are, wait for their holder, or for 15 and more."""


@asynccontextmanager
async def held(observer: AsyncEngine, *queries: str) -> AsyncGenerator[None]:
    async with observer.connect() as connection, connection.begin():
        for query in queries:
            await connection.execute(text(f"{query} FOR UPDATE"))
        yield


@pytest.mark.slow
async def test_events_whose_waiters_are_held_hold_up_no_other(
    durable: Durable, observer: AsyncEngine, sql: Rows
) -> None:
    @durable.task
    async def waiter(ctx: TaskContext, name: str) -> str:
        return await ctx.await_event(name, type=str)

    names = [f"held-{number}" for number in range(120)]
    async with durable.worker(concurrency=50):
        spawned = await durable.spawn_many([(waiter, name) for name in names])
        late = await durable.spawn(waiter, "late")
        await eventually(lambda: is_count(sql, "waits", 121))
        async with held(observer, f"SELECT 1 FROM durable.tasks WHERE task_id <> '{late.task_id}'"):
            async with durable.engine.begin() as connection:
                for name in names:
                    await durable.emit_event_with(connection, name, name)
            for name in ("late", "again"):
                waiting = late if name == "late" else await durable.spawn(waiter, name)
                await durable.emit_event(name, name)
                assert (await durable.wait_for_result(waiting, timeout=PROMPT)).output == name
            assert await sql("SELECT count(*) FROM durable.tasks WHERE finished_at IS NULL") == [(120,)]
        for spawn, name in zip(spawned, names, strict=True):
            assert (await durable.wait_for_result(spawn, timeout=PROMPT)).output == name
        await eventually(lambda: is_count(sql, "events WHERE delivered_at IS NULL", 0))


async def is_count(sql: Rows, what: str, number: int) -> bool:
    return bool(await sql(f"SELECT count(*) FROM durable.{what}") == [(number,)])


async def test_more_than_a_batch_of_held_rows_holds_up_no_other(
    durable: Durable, observer: AsyncEngine, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a lost worker, and subtasks of what has failed."""
    monkeypatch.setattr("durable_sa.worker.takeover.BATCH", 5)
    monkeypatch.setattr("durable_sa.worker.cancellations.BATCH", 5)

    @durable.task
    async def work(ctx: TaskContext) -> int:
        return ctx.attempt

    lost = await durable.spawn_many([(work, None)] * 20)
    failed = await durable.spawn(work)
    children = await durable.spawn_many([(work, None)] * 20)
    worker_id = uuid.uuid4()
    await sql(
        "INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)"
        " VALUES (:worker_id, 'lost', '{default}', '1 s', now() - interval '1 s')",
        worker_id=worker_id,
    )
    await sql(
        "UPDATE durable.tasks SET state = 'running', attempt = 1, fence = 1, claimed_by = :worker_id"
        " WHERE task_id = ANY(:task_ids)",
        worker_id=worker_id,
        task_ids=[spawn.task_id for spawn in lost],
    )
    await sql(
        "UPDATE durable.tasks SET parent_task_id = :parent, available_at = now() + interval '1 h'"
        " WHERE task_id = ANY(:task_ids)",
        parent=failed.task_id,
        task_ids=[spawn.task_id for spawn in children],
    )
    await sql(
        "UPDATE durable.tasks SET state = 'failed', outcome = 'failed', finished_at = now() WHERE task_id = :task_id",
        task_id=failed.task_id,
    )
    first = [spawn.task_id for spawn in (*lost[:12], *children[:12])]
    ids = ", ".join(f"'{task_id}'" for task_id in first)
    async with held(observer, f"SELECT 1 FROM durable.tasks WHERE task_id IN ({ids})"), durable.worker() as worker:
        worker.maintenance.look_at_everything()
        for spawn in lost[12:]:
            assert (await durable.wait_for_result(spawn, timeout=PROMPT)).output == 2
        for spawn in children[12:]:
            assert (await durable.wait_for_result(spawn, timeout=PROMPT)).status is TaskStatus.CANCELLED
    async with durable.worker() as worker:
        worker.maintenance.look_at_everything()
        for spawn in lost:
            assert (await durable.wait_for_result(spawn, timeout=PROMPT)).output == 2
        for spawn in children:
            assert (await durable.wait_for_result(spawn, timeout=PROMPT)).status is TaskStatus.CANCELLED


HELD = {
    "waits": ["SELECT 1 FROM durable.waits WHERE name LIKE 'held%'"],
    "events": [
        "SELECT 1 FROM durable.events WHERE name LIKE 'held%'",
        "SELECT 1 FROM durable.workers WHERE name LIKE 'held%'",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HELD)
async def test_rows_that_are_held_hold_up_nothing_else(
    durable: Durable, observer: AsyncEngine, sql: Rows, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_INTERVAL", 0.2)
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_PAUSE_RATIO", 0)
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_AGE", 0.0)
    monkeypatch.setattr("durable_sa.worker.maintenance.RETENTION_INTERVAL", 0.2)

    @durable.task
    async def waiter(ctx: TaskContext, name: str) -> Any:
        await ctx.step("one", int)
        return await ctx.await_event(name)

    async with durable.worker(concurrency=5):
        names = ("held", "held cancelled", "held overdue", "held taken", "held gone", "free", "free overdue")
        ids = {name: (await durable.spawn(waiter, name)).task_id for name in names}
        await eventually(lambda: is_count(sql, "waits", len(names)))
        # One whose event was delivered already, and one that nobody tells of.
        for name in ("held past", "held lost"):
            await sql("INSERT INTO durable.events (queue_name, name) VALUES ('default', :name)", name=name)
        await eventually(lambda: is_count(sql, "events WHERE delivered_at IS NULL", 0))
    await sql(
        "INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at, lost_at) VALUES"
        " ('00000000-0000-7000-8000-000000000001', 'held', '{default}', '1 s', now(), now() - interval '1 h'),"
        " ('00000000-0000-7000-8000-000000000002', 'lost', '{default}', '1 s', now() - interval '1 s', NULL)"
    )
    await sql("UPDATE durable.events SET delivered_at = NULL")
    async with held(observer, *HELD[what]):
        await sql(
            "UPDATE durable.tasks SET state = 'running', fence = 9, available_at = now(), lease_losses = 19,"
            " claimed_by = '00000000-0000-7000-8000-000000000002' WHERE task_id = :task_id",
            task_id=ids["held taken"],
        )
        await sql("DELETE FROM durable.tasks WHERE task_id = :task_id", task_id=ids["held gone"])
        for name in ("held overdue", "free overdue"):
            await sql("UPDATE durable.tasks SET cancel_at = now() WHERE task_id = :task_id", task_id=ids[name])
        await sql(
            "UPDATE durable.tasks SET parent_task_id = (SELECT task_id FROM durable.tasks WHERE task_id = :parent)"
            " WHERE task_id = :task_id",
            parent=ids["held overdue"],
            task_id=ids["held cancelled"],
        )
        async with durable.worker(concurrency=5):
            if what != "events":
                await durable.emit_event("held", 1)
            await durable.emit_event("free", 2)
            assert (await durable.wait_for_result(ids["free"], timeout=PROMPT)).output == 2
            for name in ("held overdue", "held cancelled", "free overdue"):
                assert (await durable.wait_for_result(ids[name], timeout=PROMPT)).status is TaskStatus.CANCELLED
            assert (await durable.wait_for_result(ids["held taken"], timeout=PROMPT)).status is TaskStatus.FAILED
            # What comes last of all that is searched for.
            await sql(
                "UPDATE durable.tasks SET finished_at = now() - interval '40 days' WHERE task_id = :task_id",
                task_id=ids["free overdue"],
            )
            await eventually(lambda: is_count(sql, "tasks WHERE finished_at < now() - interval '1 day'", 0))
    async with durable.worker(concurrency=5):
        if what == "events":
            await durable.emit_event("held", 1)
        assert (await durable.wait_for_result(ids["held"], timeout=PROMPT)).output == 1
        await eventually(lambda: is_count(sql, "waits", 0))
        await eventually(lambda: is_count(sql, "events WHERE delivered_at IS NULL", 0))


async def test_ended_tasks_of_which_rows_are_held_are_soon_left(
    durable: Durable, observer: AsyncEngine, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal takes its time, and a page may have a thousand."""
    monkeypatch.setattr("durable_sa.worker.retention.PAGE_TIMEOUT", 0.1)
    await sql(
        "INSERT INTO durable.tasks (task_id, queue_name, task_name, state, outcome, finished_at, run_id, max_attempts,"
        " retry_kind, retry_base_delay, retry_factor, retry_max_backoff, retry_jitter)"
        " SELECT gen_random_uuid(), 'default', 'work', 'completed', 'completed', now() - number * interval '1 day',"
        " gen_random_uuid(), 1, 'none', 0, 1, 0, 0 FROM generate_series(40, 240) AS number"
    )
    await sql(
        "INSERT INTO durable.checkpoints (task_id, key, kind, name)"
        " SELECT task_id, gen_random_uuid(), 'step', 'one' FROM durable.tasks"
    )
    connection = DedicatedConnection(durable.database)
    retention = Retention(connection)
    async with held(observer, "SELECT 1 FROM durable.checkpoints"):
        async with asyncio.timeout(20):
            await retention.delete_expired()
        assert await is_count(sql, "tasks", 201)
    for _ in range(2):  # The first continues where the last one stopped, the second starts from the beginning.
        await retention.delete_expired()
    assert await is_count(sql, "tasks", 0)
    await connection.close()
