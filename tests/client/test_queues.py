"""Queues: made as often as one likes, dropped with all that is theirs, and never mistaken for one another."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import (
    CancellationPolicy,
    Durable,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    QueueNotFound,
    QueueStatistics,
    Spawn,
    SpawnResult,
    TaskContext,
    TaskRow,
    TaskStatus,
    task,
)
from durable_sa.models import Queue
from tests.client.support import count
from tests.support import eventually

TABLES = ("tasks", "runs", "checkpoints", "waits", "events", "schedules", "queues")


@task
async def idle(ctx: Any, params: Any = None) -> None: ...


async def test_queues_are_made_listed_and_dropped(durable: Durable) -> None:
    await durable.create_queue("b")
    await durable.create_queue("a")
    await durable.create_queue("a")
    assert await durable.list_queues() == ["a", "b", "default"]
    await durable.drop_queue("a")
    await durable.drop_queue("a")
    assert await durable.list_queues() == ["b", "default"]
    with pytest.raises(QueueNotFound, match=r"'a'\. Create it first: `await durable.create_queue\('a'\)`"):
        await durable.spawn(idle, queue_name="a")


async def test_the_queue_of_a_client_is_the_one_without_a_name(engine: AsyncEngine) -> None:
    async with Durable(engine, queue_name="mails") as client:
        with pytest.raises(QueueNotFound, match="'mails'"):
            await client.spawn(idle)
        await client.create_queue()
        await client.spawn(idle)
        assert await client.count_unclaimed_ready_tasks() == 1
        assert await client.count_unclaimed_ready_tasks("default") == 0
        assert await client.list_queues() == ["default", "mails"]
        await client.drop_queue()
        assert await client.list_queues() == ["default"]


async def test_twenty_creators_at_once_make_one_queue(database_url: URL) -> None:
    app = create_async_engine(database_url, pool_size=20)
    clients = [Durable(app) for _ in range(20)]
    await asyncio.gather(*(client.create_queue("mails", retention=number) for number, client in enumerate(clients)))
    assert await clients[0].list_queues() == ["default", "mails"]
    await app.dispose()


async def test_policies_change_only_when_they_are_given(durable: Durable, engine: AsyncEngine) -> None:
    async def policies() -> Any:
        async with engine.connect() as connection:
            row = sa.select(Queue.retention, Queue.event_retention).where(Queue.queue_name == "mails")
            return tuple((await connection.execute(row)).one())

    await durable.create_queue("mails", retention=1.5)
    assert await policies() == (timedelta(seconds=1.5), timedelta(days=30))
    await durable.create_queue("mails", event_retention=timedelta(days=2))
    assert await policies() == (timedelta(seconds=1.5), timedelta(days=2))
    await durable.create_queue("mails", retention=None)
    await durable.create_queue("mails")
    assert await policies() == (None, timedelta(days=2))
    with pytest.raises(InvalidConfiguration, match="retention"):
        await durable.create_queue("mails", retention=-1)
    with pytest.raises(TypeError, match="'retentoin'"):
        await durable.create_queue("mails", retentoin=1)  # type: ignore[call-arg]
    assert await policies() == (None, timedelta(days=2))


async def test_queues_keep_what_has_ended_for_thirty_days_unless_told_otherwise(
    durable: Durable, engine: AsyncEngine
) -> None:
    await durable.create_queue("kept", retention=None, event_retention=None)
    await durable.create_queue("mails")
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(Queue.queue_name, Queue.retention, Queue.event_retention))
        policies = {row.queue_name: (row.retention, row.event_retention) for row in rows}
    month = timedelta(days=30)
    assert policies == {"default": (month, month), "mails": (month, month), "kept": (None, None)}


NAMES = [
    "a",
    "A",
    "a ",
    " a",
    "col_d",
    "tasks",
    "durable.tasks",
    "pg_catalog",
    'quo"te',
    "quo'te",
    "'; DROP TABLE durable.queues; --",
    "%s %(x)s :x $1 {} ?",
    "../../etc",
    "é" * 41 + "a",
    "é" * 41 + "b",
    "e\u0301",
    "é",
    "\u202eright to left",
    "😀" * 50,
    "x" * 200,
    "x" * 199,
]


@pytest.mark.slow
async def test_any_name_is_a_queue_of_its_own(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(idle)
    for name in NAMES:
        await durable.create_queue(name)
    spawned = {name: await durable.spawn(idle, name, queue_name=name) for name in NAMES}
    await asyncio.gather(*(durable.emit_event("e", name, queue_name=name) for name in NAMES))
    assert set(await durable.list_queues()) == {*NAMES, "default"}
    assert [await durable.count_unclaimed_ready_tasks(name) for name in NAMES] == [1] * len(NAMES)
    served = NAMES[::2]
    async with durable.worker(queue_names=served, concurrency=len(NAMES)):
        for name in served:
            await durable.wait_for_result(spawned[name], timeout=20)
    for name in NAMES[1::2]:
        result = await durable.get_task_result(spawned[name])
        assert result is not None
        assert result.status is TaskStatus.PENDING
    for name in NAMES:
        await durable.drop_queue(name)
        assert await count(engine) == len(NAMES) - NAMES.index(name) - 1
    assert await durable.list_queues() == ["default"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("a\nb", r"U\+000A"),
        ("a\0", r"U\+0000"),
        ("é" * 101, "202 bytes"),
        ("\ud800", "surrogate"),
        (7, "not int"),
    ],
)
async def test_names_that_break_the_rules_are_refused(durable: Durable, name: Any, reason: str) -> None:
    for call in (durable.create_queue, durable.drop_queue, durable.count_unclaimed_ready_tasks):
        with pytest.raises(InvalidName, match=f"queue name .*{reason}"):
            await call(name)
    with pytest.raises(InvalidName, match="queue name"):
        Durable(queue_name=name)
    assert await durable.list_queues() == ["default"]


async def test_a_dropped_queue_takes_all_that_is_its_own(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("work")
    async def work(ctx: TaskContext, params: str) -> None:
        await ctx.step("one", lambda: 1)
        if params == "wait":
            await ctx.await_event("never")

    await durable.create_queue("mails")
    kept = await durable.spawn(work, "done")
    async with durable.worker(queue_names=["mails", "default"], concurrency=4):
        ended = await durable.spawn(work, "done", queue_name="mails")
        waits = await durable.spawn(work, "wait", queue_name="mails")
        await durable.spawn(work, "wait", queue_name="mails", delay=3600)
        await durable.emit_event("mine", queue_name="mails")
        await durable.emit_event("kept")
        await durable.create_schedule("mine", task=work, cron_expression="0 0 1 1 *", params="x", queue_name="mails")
        await durable.create_schedule("kept", task=work, cron_expression="0 0 1 1 *", params="x")
        for each in (ended, kept):
            await durable.wait_for_result(each, timeout=20)
        await eventually(lambda: count(engine, "durable.waits"))
    await durable.drop_queue("mails")
    assert [await count(engine, f"durable.{table}") for table in TABLES] == [1, 1, 1, 0, 1, 1, 1]
    assert await durable.get_task_result(waits) is None
    await durable.create_queue("mails")
    assert await durable.count_unclaimed_ready_tasks("mails") == 0
    assert await durable.emit_event("mine", queue_name="mails")


async def test_a_queue_dropped_under_a_worker_interrupts_its_runs_and_spares_the_others(
    durable: Durable, engine: AsyncEngine
) -> None:
    entered, interrupted = asyncio.Event(), asyncio.Event()

    @durable.task("run")
    async def run(ctx: TaskContext) -> None:
        entered.set()
        try:
            await asyncio.sleep(3600)
        finally:
            interrupted.set()

    durable.register(idle)
    await durable.create_queue("mails")
    async with durable.worker(queue_names=["mails", "default"], concurrency=2):
        await durable.spawn(run, queue_name="mails")
        await asyncio.wait_for(entered.wait(), 20)
        await durable.drop_queue("mails")
        await asyncio.wait_for(interrupted.wait(), 20)
        result = await durable.wait_for_result(await durable.spawn(idle), timeout=20)
        assert result.status is TaskStatus.COMPLETED
    assert await count(engine, "durable.tasks", "queue_name = 'mails'") == 0
    assert await count(engine, "durable.runs") == 1


@pytest.mark.slow
async def test_a_drop_while_others_spawn_leaves_nothing_behind(durable: Durable, engine: AsyncEngine) -> None:
    await durable.create_queue("mails")
    refused = 0

    async def spawn() -> None:
        nonlocal refused
        for _ in range(30):
            try:
                await durable.spawn_many([Spawn(idle, queue_name="mails")] * 5)
            except QueueNotFound:
                refused += 1

    spawning = [asyncio.create_task(spawn()) for _ in range(4)]
    await eventually(lambda: count(engine, "durable.tasks"))
    await durable.drop_queue("mails")
    await asyncio.gather(*spawning)
    assert refused
    assert await count(engine) == 0


async def test_ready_are_those_that_a_worker_could_claim_now(durable: Durable, engine: AsyncEngine) -> None:
    gate = asyncio.Event()

    @durable.task("work")
    async def work(ctx: TaskContext, params: str) -> None:
        if params == "run":
            await gate.wait()
        if params == "sleep":
            await ctx.sleep_for("nap", 3600)
        if params == "wait":
            await ctx.await_event("never")

    async def sleeping() -> bool:
        return await count(engine, "durable.tasks", "state = 'sleeping'") == 2

    async with durable.worker(concurrency=4):
        running = await durable.spawn(work, "run")
        await durable.spawn(work, "sleep")
        await durable.spawn(work, "wait")
        done = await durable.spawn(work, "")
        await durable.wait_for_result(done, timeout=20)
        await eventually(sleeping)
        assert await durable.count_unclaimed_ready_tasks() == 0
        gate.set()
        await durable.wait_for_result(running, timeout=20)
    assert await durable.count_unclaimed_ready_tasks() == 0
    await durable.spawn(work, "", delay=3600)
    await durable.spawn(work, "", cancellation=CancellationPolicy(max_pending_time=0))
    await durable.spawn_by_name("elsewhere", unchecked=True)
    cancelled = await durable.spawn(work, "")
    await durable.cancel_task(cancelled)
    assert await durable.count_unclaimed_ready_tasks() == 1
    await durable.spawn_many([Spawn(work, "", priority=number) for number in range(3)])
    assert await durable.count_unclaimed_ready_tasks() == 4
    async with engine.begin() as connection:
        await connection.execute(sa.update(Queue).values(paused_at=sa.func.now()))
    assert await durable.count_unclaimed_ready_tasks() == 0
    assert await durable.count_unclaimed_ready_tasks("nowhere") == 0


async def test_tasks_are_found_by_their_queue_in_the_users_own_queries(durable: Durable, engine: AsyncEngine) -> None:
    await durable.create_queue("mails")
    await durable.spawn_many([Spawn(idle, queue_name="mails"), Spawn(idle)])
    async with engine.connect() as connection:
        per_queue = sa.select(TaskRow.queue_name, sa.func.count()).group_by(TaskRow.queue_name)
        assert {tuple(row) for row in await connection.execute(per_queue)} == {("mails", 1), ("default", 1)}


async def test_what_was_spawned_by_a_transaction_that_outlived_the_queue_goes_with_a_second_drop(
    durable: Durable, engine: AsyncEngine
) -> None:
    await durable.create_queue("mails")
    async with engine.connect() as connection:
        await durable.spawn_with(connection, idle, queue_name="mails")
        await durable.drop_queue("mails")
        await connection.commit()
    assert await count(engine) == 1
    await durable.drop_queue("mails")
    assert await count(engine) == 0


async def test_statistics_of_queues(durable: Durable) -> None:
    @durable.task
    async def nap(ctx: TaskContext, params: Any = None) -> None:
        await ctx.sleep_for("nap", 3600)

    @durable.task(max_attempts=1)
    async def broken(ctx: TaskContext) -> None:
        raise ValueError

    await durable.create_queue("mails")
    sleeping = await durable.spawn(nap)
    failed = await durable.spawn(broken)
    async with durable.worker():
        await durable.wait_for_result(failed, timeout=10)
        await eventually(lambda: _is(durable, sleeping, TaskStatus.SLEEPING))
    await durable.spawn(idle)
    await durable.spawn(idle, delay=3600)
    await durable.spawn(idle, queue_name="mails")
    await durable.pause_queue("mails")

    default, mails = await durable.queue_statistics()
    assert (default.queue_name, default.paused) == ("default", False)
    assert (default.ready, default.scheduled, default.running, default.failed) == (1, 2, 0, 1)
    assert default.oldest_ready is not None
    assert timedelta() < default.oldest_ready < timedelta(minutes=1)
    assert (mails.queue_name, mails.paused, mails.ready) == ("mails", True, 1)

    await durable.create_queue("empty")
    assert await durable.queue_statistics("empty") == [QueueStatistics("empty", False, 0, 0, 0, 0, None)]
    with pytest.raises(QueueNotFound, match="nowhere"):
        await durable.queue_statistics("nowhere")
    with pytest.raises(InvalidName):
        await durable.queue_statistics("")


async def _is(durable: Durable, spawned: SpawnResult[Any], status: TaskStatus) -> bool:
    result = await durable.get_task_result(spawned)
    return result is not None and result.status is status


async def test_a_queue_whose_tasks_the_application_refers_to_is_dropped_but_for_those(
    durable: Durable, engine: AsyncEngine
) -> None:
    spawned = await durable.spawn(idle)
    await durable.spawn(idle)
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE orders (task_id uuid REFERENCES durable.tasks)"))
        await connection.execute(sa.text("INSERT INTO orders VALUES (:id)"), {"id": spawned.task_id})
    with pytest.raises(
        InvalidState, match="'default' is dropped except for tasks that rows of the application refer to"
    ):
        await durable.drop_queue()
    assert await durable.list_queues() == []
    async with engine.begin() as connection:
        await connection.execute(sa.text("DELETE FROM orders"))
    await durable.drop_queue()
    assert await count(engine) == 0
