"""Cancellation reaches running tasks, and limits on time are kept, whatever the workers are busy with."""

import asyncio
import contextlib
import threading
import time

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    CancellationPolicy,
    ChildCancelled,
    Durable,
    RetryStrategy,
    SyncTaskContext,
    TaskContext,
    TaskRow,
    TaskStatus,
)

from ..support import eventually
from .conftest import Rows
from .test_claims import Claimer


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.parametrize("within", ["a step", "the body", "a thread", "a synchronous task", "gathered steps"])
@pytest.mark.slow
async def test_a_running_task_that_is_cancelled_is_interrupted_within_about_a_second(
    durable: Durable, sql: Rows, within: str, listen: bool
) -> None:
    started, interrupted = threading.Event(), threading.Event()

    async def step() -> None:
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            interrupted.set()
            raise

    def block() -> None:
        started.set()
        time.sleep(0.3)

    @durable.task
    async def stepping(ctx: TaskContext) -> None:
        await ctx.step("step", step)

    @durable.task
    async def plain(ctx: TaskContext) -> None:
        await step()

    @durable.task
    async def threaded(ctx: TaskContext) -> None:
        try:
            for _ in range(100):
                await ctx.step("block", block)
        finally:
            interrupted.set()

    @durable.task
    def synchronous(ctx: SyncTaskContext) -> None:
        try:
            for _ in range(100):
                ctx.step("block", block)
        finally:
            interrupted.set()

    @durable.task
    async def gathering(ctx: TaskContext) -> None:
        await asyncio.gather(*(ctx.step("step", step) for _ in range(3)))

    task = {
        "a step": stepping,
        "the body": plain,
        "a thread": threaded,
        "a synchronous task": synchronous,
        "gathered steps": gathering,
    }[within]
    spawned = await durable.spawn(task)
    async with durable.worker(concurrency=1, listen=listen):
        await eventually(started.is_set)
        # Another process than the worker's would have cancelled it.
        other = Durable(durable.engine)
        cancelled_at = time.monotonic()
        assert await other.cancel_task(spawned.task_id) is TaskStatus.CANCELLED
        await eventually(interrupted.is_set)
        assert time.monotonic() - cancelled_at < (1.5 if listen else 2.5)

        # Its slot is free again.
        @durable.task
        async def next_one(ctx: TaskContext) -> int:
            return 1

        assert (await durable.wait_for_result(await durable.spawn(next_one), timeout=5)).output == 1
    assert (await durable.wait_for_result(spawned, timeout=5)).status is TaskStatus.CANCELLED
    runs = await sql("SELECT attempt, state FROM durable.runs WHERE state <> 'completed'")
    assert runs == [(1, "cancelled")]
    assert await sql("SELECT count(*) FROM durable.checkpoints WHERE name = 'step'") == [(0,)]


@pytest.mark.slow
async def test_a_cancelled_task_that_ignores_it_writes_nothing_more_and_frees_its_slot(
    durable: Durable, sql: Rows
) -> None:
    """It swallows whatever is raised in it; its context is of no use to it any more."""
    swallowed: list[str] = []
    started, over = asyncio.Event(), asyncio.Event()

    async def one() -> int:
        return 1

    @durable.task
    async def stubborn(ctx: TaskContext) -> str:
        started.set()
        while not over.is_set():
            for attempt in (asyncio.sleep, lambda _: ctx.step("one", one)):
                try:
                    await attempt(60)
                except GeneratorExit:
                    raise
                except BaseException as error:  # noqa: BLE001 - what this is about
                    swallowed.append(type(error).__name__)
        return "over"

    @durable.task
    async def quick(ctx: TaskContext) -> int:
        return 2

    spawned = await durable.spawn(stubborn)
    async with durable.worker(concurrency=1):
        await started.wait()
        await durable.cancel_task(spawned)
        result = await durable.wait_for_result(await durable.spawn(quick), timeout=15)
        assert result.output == 2
    over.set()
    assert "TaskCancelled" in swallowed
    # It was told again and again, but it did not spin.
    assert len(swallowed) < 500
    assert await sql("SELECT name FROM durable.checkpoints") == []
    assert (await durable.wait_for_result(spawned, timeout=1)).status is TaskStatus.CANCELLED


async def test_a_finally_of_a_cancelled_task_runs_and_may_await(durable: Durable) -> None:
    cleaned = asyncio.Event()
    started = asyncio.Event()

    @durable.task
    async def tidy(ctx: TaskContext) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()

    spawned = await durable.spawn(tidy)
    async with durable.worker():
        await started.wait()
        await durable.cancel_task(spawned)
        await asyncio.wait_for(cleaned.wait(), 5)


@pytest.mark.slow
async def test_cancelling_races_completing_and_one_of_them_wins(durable: Durable, sql: Rows) -> None:
    @durable.task
    async def brief(ctx: TaskContext, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return 1

    async with durable.worker(concurrency=50):
        spawned = [await durable.spawn(brief, number % 10 / 500) for number in range(100)]
        told = await asyncio.gather(*(durable.cancel_task(spawn) for spawn in spawned))
        results = [await durable.wait_for_result(spawn, timeout=10) for spawn in spawned]
    for state, result in zip(told, results, strict=True):
        assert result.status == state
        assert result.output == (1 if result.status == "completed" else None)
    assert await sql("SELECT count(*) FROM durable.tasks WHERE finished_at IS NULL") == [(0,)]
    # An attempt has one end.
    assert (
        await sql(
            "SELECT t.task_id FROM durable.tasks t LEFT JOIN durable.runs r USING (task_id, attempt)"
            " WHERE t.attempt > 0 AND r.state IS DISTINCT FROM t.state"
        )
        == []
    )


async def _lateness(sql: Rows, since: str, limit: float) -> float:
    ((late,),) = await sql(
        f"SELECT extract(epoch FROM finished_at - {since})::float - {limit} FROM durable.tasks"
        " WHERE outcome = 'cancelled'"
    )
    return float(late)


@pytest.mark.slow
@pytest.mark.parametrize("listen", [True, False])
async def test_max_pending_time_is_kept_while_no_slot_is_free(durable: Durable, sql: Rows, listen: bool) -> None:
    release = asyncio.Event()

    @durable.task
    async def hold(ctx: TaskContext) -> None:
        await release.wait()

    @durable.task(cancellation=CancellationPolicy(max_pending_time=0.4))
    async def urgent(ctx: TaskContext) -> None:
        raise AssertionError("started too late")

    async with durable.worker(concurrency=1, listen=listen):
        await durable.spawn(hold)
        await eventually(lambda: _running(sql))
        spawned = await durable.spawn(urgent)
        result = await durable.wait_for_result(spawned, timeout=5)
        release.set()
    assert result.status is TaskStatus.CANCELLED
    assert result.error is not None
    assert "max_pending_time" in result.error.message
    assert 0 <= await _lateness(sql, "available_at", 0.4) < (0.6 if listen else 1.6)
    assert await sql("SELECT attempt, first_started_at FROM durable.tasks WHERE outcome = 'cancelled'") == [(0, None)]


async def _running(sql: Rows) -> bool:
    return await sql("SELECT count(*) FROM durable.tasks WHERE state = 'running'") == [(1,)]


@pytest.mark.slow
async def test_max_pending_time_begins_when_the_task_may_be_claimed(durable: Durable, sql: Rows) -> None:
    @durable.task(cancellation=CancellationPolicy(max_pending_time=0.3))
    async def later(ctx: TaskContext) -> int:
        return 1

    async with durable.worker():
        spawned = await durable.spawn(later, delay=0.6)
        assert (await durable.wait_for_result(spawned, timeout=5)).output == 1


async def test_max_pending_time_is_kept_for_tasks_that_nobody_here_knows(durable: Durable, sql: Rows) -> None:
    """No worker has registered it, or it is on a queue that no worker claims from."""
    await durable.create_queue("elsewhere")
    policy = CancellationPolicy(max_pending_time=0.2)
    spawned = [
        await durable.spawn_by_name("unknown", unchecked=True, cancellation=policy),
        await durable.spawn_by_name("unknown", unchecked=True, cancellation=policy, queue_name="elsewhere"),
    ]
    async with durable.worker():
        for spawn in spawned:
            assert (await durable.wait_for_result(spawn, timeout=5)).status is TaskStatus.CANCELLED


@pytest.mark.slow
async def test_each_of_several_limits_is_kept_when_it_is_over(durable: Durable, sql: Rows) -> None:
    """A worker that looks around every second or so does it in between for the limits that it has seen."""
    for seconds in (1.0, 1.3, 1.6, 1.9):
        policy = CancellationPolicy(max_pending_time=seconds)
        await durable.spawn_by_name("unknown", unchecked=True, cancellation=policy)

    async def cancelled() -> bool:
        return await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'cancelled'") == [(4,)]

    async with durable.worker():
        await eventually(cancelled)
    late = await sql("SELECT extract(epoch FROM finished_at - cancel_at)::float FROM durable.tasks")
    assert sum(seconds < 0.2 for (seconds,) in late) >= 3, late


async def test_a_task_whose_pending_time_is_over_is_not_started(durable: Durable, sql: Rows) -> None:
    spawned = await durable.spawn_by_name(
        "late", unchecked=True, cancellation=CancellationPolicy(max_pending_time=0.05)
    )
    await asyncio.sleep(0.15)
    claimer = Claimer(durable.database)
    await claimer.register()
    assert await claimer.claim(1, "late") == []
    assert spawned.created


@pytest.mark.slow
@pytest.mark.parametrize("listen", [True, False])
async def test_max_running_time_is_kept_while_the_task_runs(durable: Durable, sql: Rows, listen: bool) -> None:
    interrupted = asyncio.Event()

    @durable.task(cancellation=CancellationPolicy(max_running_time=0.4))
    async def endless(ctx: TaskContext) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            interrupted.set()

    async with durable.worker(concurrency=1, listen=listen):
        spawned = await durable.spawn(endless)
        result = await durable.wait_for_result(spawned, timeout=5)
        await asyncio.wait_for(interrupted.wait(), 2)
    assert result.status is TaskStatus.CANCELLED
    assert result.error is not None
    assert "max_running_time" in result.error.message
    assert 0 <= await _lateness(sql, "first_started_at", 0.4) < 0.6


@pytest.mark.slow
async def test_max_running_time_counts_sleeping_and_retries(durable: Durable, sql: Rows) -> None:
    limit = CancellationPolicy(max_running_time=0.6)

    @durable.task(cancellation=limit)
    async def sleeper(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", 3600)

    @durable.task(cancellation=limit, max_attempts=1000)
    async def failing(ctx: TaskContext) -> None:
        raise ValueError("again")

    @durable.task(cancellation=limit)
    async def waiter(ctx: TaskContext) -> None:
        for number in range(1000):
            with contextlib.suppress(TimeoutError):
                await ctx.await_event(f"never-{number}", timeout=0.1)

    async with durable.worker():
        spawned = [
            await durable.spawn(sleeper),
            await durable.spawn(failing, retry_strategy=RetryStrategy.fixed(0.05)),
            await durable.spawn(waiter),
        ]
        for spawn in spawned:
            assert (await durable.wait_for_result(spawn, timeout=5)).status is TaskStatus.CANCELLED
    late = await sql("SELECT extract(epoch FROM finished_at - first_started_at)::float FROM durable.tasks")
    assert all(0.6 <= seconds < 1.6 for (seconds,) in late), late
    assert await sql("SELECT count(*) FROM durable.waits") == [(0,)]


async def test_limits_of_a_crowd_are_kept_in_batches(
    durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.cancellations.BATCH", 20)
    policy = CancellationPolicy(max_pending_time=0.1)
    for _ in range(90):
        await durable.spawn_by_name("unknown", unchecked=True, cancellation=policy)
    async with durable.worker():

        async def cancelled() -> bool:
            return await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'cancelled'") == [(90,)]

        await eventually(cancelled)


async def test_cancelling_a_parent_interrupts_its_running_descendants(durable: Durable, sql: Rows) -> None:
    running: set[str] = set()
    interrupted: set[str] = set()

    @durable.task
    async def leaf(ctx: TaskContext, name: str) -> None:
        running.add(name)
        try:
            await asyncio.sleep(60)
        finally:
            interrupted.add(name)

    @durable.task
    async def branch(ctx: TaskContext, name: str) -> None:
        handles = [await ctx.spawn(f"leaf-{number}", leaf, f"{name}/{number}") for number in range(3)]
        for handle in handles:
            await ctx.join(handle)

    @durable.task
    async def root(ctx: TaskContext) -> None:
        handles = [await ctx.spawn(f"branch-{number}", branch, str(number)) for number in range(3)]
        for handle in handles:
            await ctx.join(handle)

    spawned = await durable.spawn(root)
    async with durable.worker(concurrency=20):
        await eventually(lambda: len(running) == 9)
        await durable.cancel_task(spawned)
        await eventually(lambda: interrupted == running)
        assert await sql("SELECT state, count(*) FROM durable.tasks GROUP BY 1") == [("cancelled", 13)]


@pytest.mark.slow
async def test_a_descendant_that_somebody_holds_locked_is_cancelled_later_and_nothing_waits_for_that(
    durable: Durable, engine: AsyncEngine, sql: Rows
) -> None:
    @durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @durable.task(max_attempts=1)
    async def parent(ctx: TaskContext) -> None:
        await ctx.spawn("child", child)
        await ctx.await_event("fail")
        raise ValueError("as it should")

    @durable.task
    async def other(ctx: TaskContext) -> int:
        return await ctx.await_event("go on", type=int)

    async with durable.worker(concurrency=5):
        failing, waiting, late = await durable.spawn(parent), await durable.spawn(other), await durable.spawn(other)

        async def asleep() -> bool:
            return await sql("SELECT count(*) FROM durable.tasks WHERE state = 'sleeping'") == [(4,)]

        await eventually(asleep)
        async with engine.connect() as connection, connection.begin():
            await connection.execute(select(TaskRow.task_id).where(TaskRow.task_name == "child").with_for_update())
            await durable.emit_event("fail")
            assert (await durable.wait_for_result(failing, timeout=5)).status is TaskStatus.FAILED
            await sql("UPDATE durable.tasks SET cancel_at = now() WHERE task_id = :task_id", task_id=late.task_id)
            assert (await durable.wait_for_result(late, timeout=8)).status is TaskStatus.CANCELLED
            await durable.emit_event("go on", 1)
            assert (await durable.wait_for_result(waiting, timeout=8)).output == 1
            assert await sql("SELECT state FROM durable.tasks WHERE task_name = 'child'") == [("sleeping",)]

        async def cancelled() -> bool:
            return await sql("SELECT state FROM durable.tasks WHERE task_name = 'child'") == [("cancelled",)]

        await eventually(cancelled, within=3)


@pytest.mark.slow
async def test_a_task_whose_time_is_over_takes_its_descendants_along_and_its_parent_is_told(durable: Durable) -> None:
    """At once: a search for what was forgotten would find them as well, but many seconds later."""

    @durable.task
    async def leaf(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", 3600)

    @durable.task(cancellation=CancellationPolicy(max_running_time=0.3))
    async def branch(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("leaf", leaf))

    @durable.task
    async def root(ctx: TaskContext) -> str:
        try:
            await ctx.join(await ctx.spawn("branch", branch))
        except ChildCancelled as error:
            return str(error)
        return "joined"

    spawned = await durable.spawn(root)
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=6)
        assert result.output is not None
        assert "cancelled" in result.output

        async def leaf_cancelled() -> bool:
            return await _states(durable) == {"completed", "cancelled"}

        await eventually(leaf_cancelled, within=6)


async def _states(durable: Durable) -> set[str]:
    async with durable.engine.connect() as connection:
        return set(await connection.scalars(select(TaskRow.state)))
