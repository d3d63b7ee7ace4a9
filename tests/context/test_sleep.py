"""Sleeps: until a time that is fixed the first time, by the database's clock, holding nothing meanwhile."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import text

from durable_sa import Durable, SyncTaskContext, TaskContext, task
from tests.context.support import Crash, Rows, Runner, Tally


async def database_now(durable: Durable) -> datetime:
    async with durable.engine.connect() as connection:
        return (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()


@pytest.mark.slow
async def test_task_goes_on_after_the_duration_in_the_same_attempt(run: Runner):
    seen: list[Any] = []

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append((ctx.run_id, ctx.attempt, await database_now(run.durable)))
        await ctx.sleep_for("nap", 0.3)
        seen.append((ctx.run_id, ctx.attempt, await database_now(run.durable)))

    spawned = await run.spawn(work)
    await run.wait(spawned)
    before, again, after = seen
    assert before[:2] == again[:2] == after[:2] == (spawned.run_id, 1)
    assert after[2] - before[2] >= timedelta(seconds=0.3)
    [only] = await Rows(run.durable, spawned).runs()
    assert only.state == "completed"


@pytest.mark.slow
async def test_wake_time_is_fixed_the_first_time_and_retries_do_not_move_it(run: Runner):
    """The attempt after the sleep does not sleep again, and one that failed during it sleeps no longer."""

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.sleep_for("nap", 0.4 if ctx.attempt == 1 else 60)
        if ctx.attempt < 3:
            raise Crash

    spawned = await run.spawn(work)
    row = await Rows(run.durable, spawned).until("sleeping")
    [checkpoint] = await Rows(run.durable, spawned).checkpoints("nap")
    assert datetime.fromisoformat(checkpoint.value) == row.available_at
    await run.wait(spawned)
    assert (await Rows(run.durable, spawned).checkpoints("nap")) == [checkpoint]
    assert (await Rows(run.durable, spawned).task()).finished_at - row.available_at < timedelta(seconds=10)


@pytest.mark.slow
async def test_sleep_that_a_failure_of_another_branch_cut_off_is_not_begun_anew(run: Runner):
    seen: list[datetime] = []

    async def fail() -> None:
        await asyncio.sleep(0.4)
        raise ConnectionError

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append(await database_now(run.durable))
        if ctx.attempt == 1:
            await asyncio.gather(ctx.sleep_for("nap", 0.6), ctx.step("fail", fail))
        await asyncio.gather(ctx.sleep_for("nap", 30))

    spawned = await run.spawn(work)
    async with asyncio.timeout(15):
        await run.wait(spawned)
    [checkpoint] = await Rows(run.durable, spawned).checkpoints("nap")
    due_at = datetime.fromisoformat(checkpoint.value)
    assert timedelta(seconds=0.6) <= due_at - seen[0] < timedelta(seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize("beside_a_step", [False, True])
async def test_never_wakes_early_by_the_databases_clock(run: Runner, beside_a_step: bool):
    early: list[Any] = []

    async def busy() -> None:
        await asyncio.sleep(0.5)

    async def nap(ctx: TaskContext) -> None:
        duration = 0.05 + ctx.task_id.int % 97 / 500
        begins = not await Rows(run.durable, ctx.task_id).checkpoints("nap")
        until = await database_now(run.durable) + timedelta(seconds=duration)
        await ctx.sleep_for("nap", duration)
        awake = await database_now(run.durable)
        [checkpoint] = await Rows(run.durable, ctx.task_id).checkpoints("nap")
        due_at = datetime.fromisoformat(checkpoint.value)
        # A replay finds the time that was fixed before.
        early.append((awake - due_at, due_at - until if begins else timedelta(0)))

    @task
    async def work(ctx: TaskContext) -> None:
        if beside_a_step:
            await asyncio.gather(nap(ctx), ctx.step("busy", busy))
        else:
            await nap(ctx)

    spawned = [await run.spawn(work) for _ in range(20)]
    for each in spawned:
        await run.wait(each)
    assert len(early) >= 20
    for late, drift in early:
        assert late >= timedelta(0)
        if beside_a_step:
            assert drift >= timedelta(0)


@pytest.mark.slow
async def test_sleep_until_waits_for_that_moment(run: Runner):
    when = await database_now(run.durable) + timedelta(seconds=0.4)

    @task
    async def work(ctx: TaskContext) -> datetime:
        await ctx.sleep_until("moment", when.astimezone(timezone(timedelta(hours=-7))))
        return await database_now(run.durable)

    awake = await run(work)
    assert when <= awake < when + timedelta(seconds=5)


@pytest.mark.parametrize("kind", ["zero", "past", "long past", "epsilon"])
async def test_sleep_that_is_over_does_not_suspend(run: Runner, tally: Tally, kind: str):
    @task
    async def work(ctx: TaskContext) -> None:
        tally.add("entered")
        if kind == "zero":
            await ctx.sleep_for("nap", 0)
        elif kind == "past":
            await ctx.sleep_until("nap", datetime.now(UTC) - timedelta(seconds=1))
        elif kind == "long past":
            await ctx.sleep_until("nap", datetime(1000, 1, 1, tzinfo=UTC))
        else:
            await ctx.sleep_for("nap", timedelta(microseconds=1))
        await ctx.sleep_for("nap", timedelta(0))

    await run(work)
    assert len(tally) == (2 if kind == "epsilon" else 1)


@pytest.mark.parametrize("duration", [timedelta(days=3652), 36_525 * 86_400.0])
@pytest.mark.slow
async def test_ten_years_and_the_longest_are_slept(run: Runner, duration: Any):
    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", duration)

    spawned = await run.spawn(work)
    row = await Rows(run.durable, spawned).until("sleeping")
    length = duration if isinstance(duration, timedelta) else timedelta(seconds=duration)
    assert abs(row.available_at - row.started_at - length) < timedelta(seconds=20)
    async with run.durable.engine.begin() as connection:
        await connection.execute(text("UPDATE durable.checkpoints SET value = to_json(now())"))
        await connection.execute(text("UPDATE durable.tasks SET available_at = now()"))
    assert (await run.wait(spawned)).status == "completed"


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda ctx: ctx.sleep_for("nap", -0.001), "duration"),
        (lambda ctx: ctx.sleep_for("nap", float("nan")), "duration"),
        (lambda ctx: ctx.sleep_for("nap", 1e12), "duration"),
        (lambda ctx: ctx.sleep_for("nap", "5"), "duration"),
        (lambda ctx: ctx.sleep_until("nap", datetime(2030, 1, 1)), "time zone"),
        (lambda ctx: ctx.sleep_for("$nap", 1), "'$nap'"),
    ],
)
async def test_what_cannot_be_slept_is_refused(run: Runner, call: Any, word: str):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await call(ctx)

    error = await run.failure(work)
    assert error.name in ("InvalidConfiguration", "InvalidName")
    assert word in error.message


@pytest.mark.slow
async def test_sleeps_in_a_loop_are_each_their_own(run: Runner, tally: Tally):
    @task
    async def work(ctx: TaskContext) -> int:
        tally.add("entered")
        for _ in range(5):
            await ctx.sleep_for("nap", 0.05)
        return 5

    spawned = await run.spawn(work)
    await run.wait(spawned)
    due = [datetime.fromisoformat(row.value) for row in await Rows(run.durable, spawned).checkpoints("nap")]
    assert len(due) == 5
    assert all(later - sooner >= timedelta(seconds=0.05) for sooner, later in zip(due, due[1:], strict=False))
    assert len(tally) == 6


async def test_sleeping_task_holds_no_slot_and_no_connection(engine: Any):
    async with Durable(engine) as durable, durable.worker(concurrency=1):
        run = Runner(durable)

        @durable.task
        async def sleeper(ctx: TaskContext) -> None:
            await ctx.sleep_for("long", 3600)

        @durable.task
        async def quick(ctx: TaskContext) -> str:
            return "done"

        sleepers = [await run.spawn(sleeper) for _ in range(10)]
        assert await run(quick) == "done"
        for each in sleepers:
            row = await Rows(durable, each).until("sleeping")
            assert row.claimed_by is None
        assert engine.pool.checkedout() <= 3


@pytest.mark.slow
async def test_sleep_goes_on_where_no_worker_was_there_at_its_end(durable: Durable):
    @durable.task
    async def work(ctx: TaskContext) -> str:
        await ctx.sleep_for("nap", 0.2)
        return "awake"

    async with durable.worker():
        spawned = await durable.spawn(work)
        await Rows(durable, spawned).until("sleeping")
    await asyncio.sleep(0.3)
    assert (await Rows(durable, spawned).task()).state == "sleeping"
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "awake"
    assert len(await Rows(durable, spawned).runs()) == 1


async def test_branches_sleep_side_by_side(run: Runner, tally: Tally):
    @task
    async def work(ctx: TaskContext) -> list[int]:
        tally.add(await database_now(run.durable))

        async def nap(number: int) -> int:
            await ctx.sleep_for("nap", 0.1 * number)
            return number

        return await asyncio.gather(*(nap(number) for number in (3, 1, 2, 0)))

    assert await run(work) == [3, 1, 2, 0]
    assert tally[-1] - tally[0] < timedelta(seconds=5)


async def test_sleep_beside_a_long_step_ends_without_a_suspension(run: Runner, tally: Tally):
    release = asyncio.Event()

    async def long() -> str:
        tally.add("long began")
        await release.wait()
        return "long"

    @task
    async def work(ctx: TaskContext) -> list[str]:
        tally.add("entered")

        async def other() -> str:
            await ctx.sleep_for("nap", 0.2)
            tally.add("awake")
            release.set()
            return "slept"

        return await asyncio.gather(ctx.step("long", long), other())

    assert await run(work) == ["long", "slept"]
    assert tally == ["entered", "long began", "awake"]


@pytest.mark.slow
async def test_plain_tasks_sleep(run: Runner, tally: Tally):
    @task
    def work(ctx: SyncTaskContext) -> datetime:
        tally.add("entered")
        ctx.sleep_for("nap", 0.1)
        when = ctx.now() + timedelta(seconds=0.5)
        ctx.sleep_until("moment", when)
        return when

    when = await run(work)
    assert len(tally) == 3
    assert await database_now(run.durable) >= when


async def test_sleep_inside_a_step_is_refused(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        async def step() -> None:
            await ctx.sleep_for("nap", 1)

        await ctx.step("outer", step)

    error = await run.failure(work)
    assert error.name == "InvalidState"
    assert "'nap'" in error.message
