"""The clock of tests: what it moves, and what it leaves alone."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    CancellationPolicy,
    Durable,
    InvalidConfiguration,
    InvalidState,
    RetryStrategy,
    TaskContext,
    TaskRow,
    TaskStatus,
    TaskTimeout,
    step,
    task,
)
from durable_sa.execution import run
from durable_sa.models import WorkerRow
from durable_sa.testing import Clock, run_until_idle, time_travel
from durable_sa.worker.worker import Worker

from ..support import eventually

WEEK = timedelta(days=7)


@task
async def sleeper(ctx: TaskContext, days: float) -> list[datetime]:
    before = await ctx.now()
    await ctx.sleep_for("long", timedelta(days=days))
    return [before, await ctx.now()]


@task
async def waiter(ctx: TaskContext) -> str:
    try:
        return str(await ctx.await_event("never", timeout=WEEK))
    except TaskTimeout:
        return "timeout"


@task
async def branches(ctx: TaskContext) -> str:
    """One branch sleeps in the database's time while the other keeps the run from being suspended."""

    async def sleep() -> None:
        await ctx.sleep_for("a week", WEEK)
        woken.set()

    woken = asyncio.Event()
    await asyncio.gather(sleep(), ctx.step("until woken", woken.wait))
    return "woken"


@task(max_attempts=2, retry_strategy=RetryStrategy.fixed(WEEK))
async def flaky(ctx: TaskContext) -> int:
    if ctx.attempt == 1:
        raise ConnectionError
    return ctx.attempt


@task
async def quick(ctx: TaskContext) -> str:
    return "done"


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    async with Durable(engine, tasks=[sleeper, waiter, branches, flaky, quick]) as durable:
        yield durable


async def sleeping(durable: Durable, spawned: object) -> None:
    async def asleep() -> bool:
        result = await durable.get_task_result(spawned)  # type: ignore[call-overload]
        return result.status is TaskStatus.SLEEPING

    await eventually(asleep)


async def test_a_worker_that_sees_the_later_time_first_moves_its_clock_once(
    durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = Clock._hold

    async def hold_and_look(self: Clock, workers: AbstractSet[Worker], time: timedelta) -> None:
        await hold(self, workers, time)
        for worker in workers:
            worker.maintenance.look_at_everything()
            await worker.maintenance.work()

    async with durable.worker() as worker, time_travel(durable) as clock:
        monkeypatch.setattr(Clock, "_hold", hold_and_look)
        await clock.advance(WEEK)
        assert abs(worker._clock.now() - await clock.now()) < timedelta(minutes=1)


async def test_a_week_passes_in_a_moment_for_a_running_worker(durable: Durable) -> None:
    async with durable.worker(), time_travel(durable) as clock:
        spawned = await durable.spawn(sleeper, 7)
        await sleeping(durable, spawned)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await clock.advance(WEEK)
        result = await durable.wait_for_result(spawned, timeout=30)
        assert loop.time() - began < 5
    before, after = result.output or []
    assert WEEK <= after - before < WEEK + timedelta(minutes=1)


async def test_a_worker_that_starts_afterwards_goes_by_the_clock(durable: Durable) -> None:
    spawned = await durable.spawn(sleeper, 7)
    await run_until_idle(durable)
    await sleeping(durable, spawned)
    async with time_travel(durable) as clock:
        await clock.advance(WEEK - timedelta(minutes=1))
        await run_until_idle(durable)
        await sleeping(durable, spawned)
        await clock.advance(60)
        await run_until_idle(durable)
    result = await durable.get_task_result(spawned)
    assert result is not None
    assert result.status is TaskStatus.COMPLETED


async def test_a_sleep_in_a_branch_ends_while_the_run_goes_on(durable: Durable) -> None:
    async with durable.worker(), time_travel(durable) as clock:
        spawned = await durable.spawn(branches)

        async def registered() -> bool:
            async with durable.engine.connect() as connection:
                count = sa.text("SELECT count(*) FROM durable.checkpoints WHERE kind = 'sleep'")
                return bool((await connection.execute(count)).scalar())

        await eventually(registered)
        await clock.advance(WEEK)
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "woken"


@pytest.mark.slow
async def test_a_sleep_that_the_database_does_not_know_of_yet_has_begun_all_the_same(
    durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "REGISTER_AFTER", 0.3)
    in_step, woken = asyncio.Event(), asyncio.Event()

    async def until_woken() -> None:
        in_step.set()
        await woken.wait()

    @durable.task
    async def sleeps_beside_a_step(ctx: TaskContext) -> None:
        async def sleep() -> None:
            await ctx.sleep_for("a week", WEEK)
            woken.set()

        await asyncio.gather(sleep(), ctx.step("until woken", until_woken))

    async with durable.worker(), time_travel(durable) as clock:
        spawned = await durable.spawn(sleeps_beside_a_step)
        await in_step.wait()
        await clock.advance(WEEK)
        result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status is TaskStatus.COMPLETED


async def test_timeouts_retries_and_limits_come_with_the_clock(durable: Durable) -> None:
    waiting = await durable.spawn(waiter)
    failing = await durable.spawn(flaky)
    late = await durable.spawn(quick, available_at=datetime.now(UTC) + WEEK)
    limited = await durable.spawn(sleeper, 30, cancellation=CancellationPolicy(max_running_time=WEEK))
    await run_until_idle(durable)
    async with time_travel(durable) as clock:
        await clock.advance(WEEK)
        await run_until_idle(durable)
    results = [await durable.get_task_result(spawned) for spawned in (waiting, failing, late, limited)]
    assert [result.output if result else None for result in results] == ["timeout", 2, "done", None]
    assert results[3] is not None
    assert results[3].status is TaskStatus.CANCELLED


@pytest.mark.slow
async def test_a_machine_whose_clock_is_a_week_behind_makes_no_difference(durable: Durable) -> None:
    """All times are the database's: what begins there and then ends there and then."""
    async with time_travel(durable) as clock:
        await clock.advance(WEEK)
        spawned = [
            await durable.spawn(waiter),
            await durable.spawn(flaky),
            await durable.spawn(sleeper, 7),
            await durable.spawn(branches),
            await durable.spawn(quick, delay=WEEK),
            await durable.spawn(sleeper, 30, cancellation=CancellationPolicy(max_running_time=WEEK)),
        ]
        async with durable.worker(concurrency=10, shutdown_timeout=1):

            async def all_are_under_way() -> bool:
                async with durable.engine.connect() as connection:
                    rows = await connection.scalars(sa.select(TaskRow.available_at))
                    return sum(moment > datetime.now(UTC) + 1.9 * WEEK for moment in rows) == 5

            await eventually(all_are_under_way)
            await clock.advance(WEEK - timedelta(minutes=1))
            await asyncio.sleep(0.3)
            for each in spawned:
                result = await durable.get_task_result(each)
                assert result is not None
                assert not result.status.finished
            await clock.advance(120)
            results = [await durable.wait_for_result(each, timeout=10) for each in spawned]
    statuses = [TaskStatus.COMPLETED] * 5 + [TaskStatus.CANCELLED]
    assert [result.status for result in results] == statuses


@pytest.mark.slow
async def test_schedules_fire_and_queues_forget_by_the_clock(durable: Durable) -> None:
    await durable.create_queue(retention=timedelta(days=2))
    await durable.create_schedule("daily", task=quick, cron_expression="0 12 * * *", misfire="run_all")

    async def completed() -> list[datetime]:
        async with durable.engine.connect() as connection:
            found = await connection.execute(sa.select(TaskRow.finished_at).where(TaskRow.state == "completed"))
            return [moment for moment in found.scalars() if moment is not None]

    async with time_travel(durable) as clock, durable.worker():
        now = await clock.now()
        noon = now.replace(hour=12, minute=0, second=0, microsecond=0)
        if noon <= now:
            noon += timedelta(days=1)
        await clock.move_to(noon + timedelta(days=2, hours=1))
        await eventually(lambda: has_length(completed(), 3))
        await clock.advance(timedelta(days=3))

        async def only_new_ones_are_left() -> bool:
            moments = await completed()
            return len(moments) == 3 and min(moments) > noon + timedelta(days=5)

        await eventually(only_new_ones_are_left)


async def has_length(rows: Awaitable[list[datetime]], length: int) -> bool:
    return len(await rows) == length


@pytest.mark.slow
async def test_workers_keep_their_leases(durable: Durable, caplog: pytest.LogCaptureFixture) -> None:
    async with durable.worker(claim_timeout=10) as first, durable.worker(claim_timeout=10) as second:
        ids = {first.worker_id, second.worker_id}
        async with time_travel(durable) as clock:
            for _ in range(20):
                await clock.advance(WEEK)
                await asyncio.sleep(0.02)
            assert {first.worker_id, second.worker_id} == ids
            async with durable.engine.connect() as connection:
                rows = (await connection.execute(sa.select(WorkerRow.expires_at, WorkerRow.lost_at))).all()
            assert [row.lost_at for row in rows] == [None, None]
            assert all(row.expires_at > datetime.now(UTC) + 19 * WEEK for row in rows)
        async with durable.engine.connect() as connection:
            rows = (await connection.execute(sa.select(WorkerRow.expires_at, WorkerRow.claim_timeout))).all()
        assert [row.claim_timeout for row in rows] == [timedelta(seconds=10)] * 2
        assert all(row.expires_at < datetime.now(UTC) + timedelta(minutes=1) for row in rows)
        spawned = await durable.spawn(quick)
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "done"
    assert "lease" not in caplog.text


async def lost(durable: Durable) -> list[str]:
    """Which workers are found lost by a search that begins now and finds one that has crashed."""
    async with durable.engine.begin() as connection:
        crashed = sa.insert(WorkerRow).values(
            worker_id=sa.func.gen_random_uuid(),
            name="crashed",
            queue_names=["default"],
            claim_timeout=timedelta(hours=1),
            expires_at=sa.func.now() - timedelta(hours=1),
        )
        await connection.execute(crashed)

    async def found() -> list[str]:
        async with durable.engine.connect() as connection:
            return list(await connection.scalars(sa.select(WorkerRow.name).where(WorkerRow.lost_at.is_not(None))))

    async def crashed_is_found() -> list[str]:
        for worker in durable.workers:
            worker.clock_moved(worker._clock.now(), timedelta())
        names = await found()
        return names if "crashed" in names else []

    return await eventually(crashed_is_found)


@pytest.mark.slow
async def test_a_heartbeat_that_is_on_its_way_does_not_end_a_lease(durable: Durable) -> None:
    """It goes by the earlier time, by which the lease would be over long before the later."""
    on_its_way, moved = threading.Event(), threading.Event()

    def delay(connection: object, cursor: object, statement: str, *_: object) -> None:
        # It is called after the clock, and so with a statement that has its time.
        if "heartbeat_at=" in statement and threading.current_thread().name == "durable-heartbeat":
            on_its_way.set()
            moved.wait(1)

    async def beats() -> list[datetime]:
        async with durable.engine.connect() as connection:
            return list(await connection.scalars(sa.select(WorkerRow.heartbeat_at)))

    async with durable.worker(claim_timeout=3), time_travel(durable) as clock:
        await clock.advance(WEEK)
        # As long as it is called, nobody may take it away.
        sa.event.listen(sa.Engine, "before_cursor_execute", delay)
        try:
            assert await asyncio.to_thread(on_its_way.wait, 10)
            await clock.advance(WEEK)
            before = await beats()
            moved.set()

            async def beaten() -> bool:
                return await beats() != before

            await eventually(beaten)
        finally:
            moved.set()
            sa.event.remove(sa.Engine, "before_cursor_execute", delay)
        assert await clock.now() - (await beats())[0] > timedelta(days=6)
        async with durable.worker():
            assert await lost(durable) == ["crashed"]


async def test_centuries_do_not_end_a_lease(durable: Durable) -> None:
    async with durable.worker(), durable.worker(), time_travel(durable) as clock:
        await clock.move_to(datetime(3000, 1, 1, tzinfo=UTC))
        assert await lost(durable) == ["crashed"]


async def test_a_lease_that_nobody_holds_any_more_is_over(durable: Durable) -> None:
    async with durable.engine.begin() as connection:
        lost = sa.insert(WorkerRow).values(
            worker_id=sa.func.gen_random_uuid(),
            name="crashed",
            queue_names=["default"],
            claim_timeout=timedelta(hours=1),
            expires_at=sa.func.now() + timedelta(hours=1),
        )
        await connection.execute(lost)

    async def taken_over() -> bool:
        async with durable.engine.connect() as connection:
            found = await connection.execute(sa.select(WorkerRow.lost_at).where(WorkerRow.name == "crashed"))
            return found.scalar_one() is not None

    async with durable.worker(), time_travel(durable) as clock:
        assert not await taken_over()
        await clock.advance(timedelta(hours=2))
        await eventually(taken_over)


async def test_only_durables_own_statements_see_it(durable: Durable, engine: AsyncEngine) -> None:
    async with time_travel(durable) as clock, engine.connect() as connection:
        kept = await connection.scalar(sa.text("SELECT now()"))
        await clock.advance(WEEK)
        assert (await clock.now()) - datetime.now(UTC) > WEEK - timedelta(minutes=1)
        assert await connection.scalar(sa.text("SELECT now()")) == kept
        spawned = await durable.spawn(quick)
        row = (await connection.execute(sa.select(TaskRow).where(TaskRow.task_id == spawned.task_id))).one()
        assert row.created_at == row.available_at > datetime.now(UTC) + timedelta(days=6)
    assert abs((await Clock(durable).now()) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_statement_of_an_open_connection_and_of_a_session_is_moved(durable: Durable) -> None:
    async with durable.engine.connect() as connection:
        await connection.execute(sa.text("SELECT 1"))
        async with time_travel(durable) as clock:
            await clock.advance(WEEK)
            spawned = await durable.spawn_with(connection, quick)
            await connection.commit()
        row = await connection.execute(sa.select(TaskRow.available_at).where(TaskRow.task_id == spawned.task_id))
        available_at = row.scalar_one()
    assert available_at is not None
    assert available_at > datetime.now(UTC) + timedelta(days=6)


async def test_it_moves_to_a_time(durable: Durable) -> None:
    christmas = datetime(2199, 12, 24, 18, tzinfo=UTC)
    async with time_travel(durable) as clock:
        await clock.move_to(christmas)
        assert christmas <= await clock.now() < christmas + timedelta(minutes=1)
        with pytest.raises(InvalidConfiguration, match="2199-12-24T17:59:59.* has passed"):
            await clock.move_to(christmas - timedelta(seconds=1))
        with pytest.raises(InvalidConfiguration, match="not between 0"):
            await clock.advance(-1)


async def test_there_is_one_clock(durable: Durable) -> None:
    async with time_travel(durable):
        with pytest.raises(InvalidState, match="already in use"):
            async with time_travel(durable):
                pass
    async with time_travel(durable):
        pass


async def test_pauses_between_the_tries_of_a_step_follow_the_clock_inside_of_other_steps_too(durable: Durable) -> None:
    tries = asyncio.Queue[str]()

    async def fail_once(name: str) -> str:
        tries.put_nowait(name)
        if name not in failed:
            failed.add(name)
            raise ValueError(name)
        return name

    failed = set[str]()
    inner = step("inner", max_attempts=2, retry_strategy=RetryStrategy.fixed(WEEK))(fail_once)
    short = step("short", max_attempts=2, retry_strategy=RetryStrategy.fixed(0.9))(fail_once)

    async def outer() -> str:
        return await inner("nested")

    @durable.task(max_attempts=1)
    async def retries(ctx: TaskContext) -> list[str]:
        return [await ctx.step("outer", outer), await short("short")]

    async with durable.worker(), time_travel(durable) as clock:
        spawned = await durable.spawn(retries)
        for name, pause in (("nested", WEEK), ("short", timedelta(seconds=0.9))):
            assert await tries.get() == name
            began = asyncio.get_running_loop().time()
            await eventually(lambda: _pausing(durable))
            await clock.advance(pause)
            assert await tries.get() == name
            if pause != WEEK:
                assert asyncio.get_running_loop().time() - began < 0.8
        assert (await durable.wait_for_result(spawned, timeout=20)).output == ["nested", "short"]


def _pausing(durable: Durable) -> bool:
    (worker,) = durable.workers
    return any(run._pauses for run in worker._slots.runs.values())
