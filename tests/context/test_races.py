"""Races: the first of several waits, the same one in every replay; the losing waits are withdrawn."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from durable_sa import (
    ChildFailed,
    Durable,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    Race,
    SyncTaskContext,
    TaskContext,
    TaskTimeout,
    UserError,
    task,
)
from durable_sa.testing import run_until_idle, task_context, time_travel
from tests.context.support import Crash, Rows, Runner, Tally, warnings
from tests.support import eventually


@task
async def pay(ctx: TaskContext) -> list[Any]:
    race = await ctx.race("payment", paid=ctx.receive("paid"), late=ctx.sleep_for("grace", timedelta(hours=1)))
    if ctx.attempt == 1:
        raise Crash
    return [race.winner, race.value]


async def test_the_first_wait_wins_and_the_others_are_withdrawn(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    spawned = await run.spawn(pay)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.send(spawned, "paid", 12)
    assert (await run.wait(spawned)).output == ["paid", 12]
    rows: Rows[Any] = Rows(run.durable, spawned)
    assert await rows.waits() == []
    assert sorted(row.kind for row in await rows.checkpoints()) == ["message", "race"]
    assert warnings(caplog) == []


async def test_the_losing_waits_are_gone_before_the_task_goes_on(run: Runner) -> None:
    reached, go = asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> int:
        race = await ctx.race(
            "payment", paid=ctx.receive("paid"), late=ctx.sleep_for("grace", 3600), never=ctx.await_event("never")
        )
        await ctx.step("ship", ship)
        return race.value

    async def ship() -> None:
        reached.set()
        await go.wait()

    spawned = await run.spawn(work)
    rows: Rows[Any] = Rows(run.durable, spawned)
    await rows.until("sleeping")
    assert len(await rows.waits()) == 2  # a sleep is the time of the task
    await run.durable.send(spawned, "paid", 12)
    await asyncio.wait_for(reached.wait(), 10)
    assert await rows.waits() == []
    go.set()
    assert (await run.wait(spawned)).output == 12


async def test_a_sleep_wins_when_it_is_over(durable: Durable) -> None:
    durable.register(pay)
    async with time_travel(durable) as clock:
        spawned = await durable.spawn(pay)
        await run_until_idle(durable)
        await clock.advance(timedelta(hours=2))
        await run_until_idle(durable)
        result = await durable.wait_for_result(spawned)
    assert result.output == ["late", None]
    assert await Rows(durable, spawned).waits() == []


async def test_a_message_that_lost_stays_to_be_received(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        first = await ctx.race("first", a=ctx.receive("a"), b=ctx.receive("b"), c=ctx.await_event("c"))
        if ctx.attempt == 1:
            raise Crash
        second = await ctx.race("second", c=ctx.await_event("c"), b=ctx.receive("b"))
        return [first.winner, first.value, second.winner, second.value, await ctx.receive("b")]

    await run.durable.pause_queue()
    spawned = await run.spawn(work)
    await run.durable.emit_event("c", "see")
    await run.durable.send(spawned, "b", "bee")
    await run.durable.send(spawned, "a", "ay")
    await run.durable.resume_queue()
    assert (await run.wait(spawned)).output == ["a", "ay", "c", "see", "bee"]


async def test_a_replay_takes_the_winner_although_another_is_over_since(run: Runner, tally: Tally) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        race = await ctx.race("race", a=ctx.await_event("a"), b=ctx.receive("b"))
        tally.add(race.winner)
        if ctx.attempt == 1:
            await run.durable.emit_event("a", 1)
            raise Crash
        # Branches after a race are the same in a replay, in which its tasks are not created.
        return [race.value, *await asyncio.gather(ctx.step("one", one), ctx.step("one", one))]

    async def one() -> int:
        return 1

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.send(spawned, "b", 2)
    assert (await run.wait(spawned)).output == [2, 1, 1]
    assert tally == ["b", "b"]


async def test_branches_after_a_race_keep_their_places(run: Runner, tally: Tally) -> None:
    def count(number: int) -> int:
        tally.add(number)
        return number

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        await ctx.race("race", a=ctx.sleep_for("a", 0), b=ctx.receive("b"))
        found = await asyncio.gather(*(ctx.step("count", count, number) for number in range(3)))
        if ctx.attempt == 1:
            raise Crash
        return list(found)

    assert await run(work) == [0, 1, 2]
    assert sorted(tally) == [0, 1, 2]


async def test_the_error_of_a_winner_is_raised_each_time(run: Runner) -> None:
    @task
    async def failing(ctx: TaskContext) -> None:
        raise UserError("no")

    @task
    async def work(ctx: TaskContext) -> list[str]:
        child = await ctx.spawn("child", failing)
        found: list[str] = []
        with pytest.raises(ChildFailed):
            await ctx.race("child", child=ctx.join(child), message=ctx.receive("m"))
        try:
            await ctx.race("timeout", a=ctx.receive("a", timeout=0.01), b=ctx.await_event("b"))
        except TaskTimeout as error:
            found.append(str(error))
            if ctx.attempt < 3:
                raise
        return found

    run.durable.register(failing)
    [error] = await run(work)
    assert "topic 'a'" in error


async def test_a_race_beside_a_busy_branch_is_decided_in_memory(run: Runner) -> None:
    done = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        async def listen() -> Any:
            race = await ctx.race("race", a=ctx.receive("a"), b=ctx.receive("b"))
            done.set()
            return race.value

        return list(await asyncio.gather(ctx.step("busy", done.wait), listen()))

    spawned = await run.spawn(work)
    await eventually(lambda: Rows(run.durable, spawned).waits())
    await run.durable.send(spawned, "b", 5)
    assert (await run.wait(spawned)).output == [True, 5]


async def test_of_races_and_calls_for_one_topic_each_gets_a_message(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        async def race(name: str) -> Any:
            return (await ctx.race(name, a=ctx.receive("a"), b=ctx.receive("b"))).value

        return sorted(await asyncio.gather(race("one"), race("two"), ctx.receive("a")))

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    for number in range(3):
        await run.durable.send(spawned, "a", number)
    assert (await run.wait(spawned)).output == [0, 1, 2]


async def test_def_tasks_race(run: Runner) -> None:
    @task
    def work(ctx: SyncTaskContext) -> list[Any]:
        race = ctx.race("race", a=lambda: ctx.receive("a", type=int), late=lambda: ctx.sleep_for("late", 3600))
        with pytest.raises(TypeError, match="b= of a race makes 0 calls"):
            ctx.race("none", b=lambda: None)
        with pytest.raises(TypeError, match="is a function"):
            ctx.race("none", b=5)  # type: ignore[arg-type]
        if ctx.attempt == 1:
            raise Crash
        return [race.winner, race.value]

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.send(spawned, "a", 7)
    assert (await run.wait(spawned)).output == ["a", 7]


async def test_the_waits_of_a_race_that_is_refused_are_withdrawn(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> str:
        with pytest.raises(InvalidConfiguration):
            await ctx.race(
                "race",
                first=ctx.receive("first"),
                wrong=lambda: ctx.sleep_for("wrong", -1),
                unreached=ctx.receive("unreached"),
            )
        return "caught"

    assert await run(work) == "caught"


async def test_what_is_no_race_is_refused(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> int:
        async def step() -> None: ...

        async def inside() -> None:
            await ctx.race("inside", a=ctx.receive("a"))

        for waits in ({"a": ctx.step("step", step)}, {"a": step()}, {"a": 5}, {"a": ctx.receive("a"), "b": ctx.rand()}):
            with pytest.raises(TypeError, match="of a race is not a wait of this task"):
                _ = ctx.race("race", **waits)
        with pytest.raises(InvalidConfiguration, match="has no waits"):
            _ = ctx.race("race")
        with pytest.raises(InvalidName):
            _ = ctx.race("$race", a=ctx.receive("a"))
        with pytest.raises(InvalidState, match="inside a step"):
            await ctx.step("inside", inside)
        race = await ctx.race("race", a=lambda: ctx.sleep_for("none", 0))
        assert race == Race("a", None)
        return 1

    assert await run(work) == 1


async def test_a_context_without_a_database_decides_races() -> None:
    ctx = task_context(messages={"b": ["bee"]})
    assert await ctx.race("race", a=ctx.receive("a"), b=ctx.receive("b")) == Race("b", "bee")
    race = await ctx.race("late", a=ctx.sleep_for("long", 60), b=ctx.sleep_for("short", 30))
    assert race == Race("b", None)
    assert [slept.name for slept in ctx.recorded.sleeps] == ["short"]
    with pytest.raises(TaskTimeout):
        await ctx.race("timeout", a=ctx.receive("a", timeout=5), b=ctx.sleep_for("short", 30))
    with pytest.raises(InvalidState, match="would never end"):
        await ctx.race("never", a=ctx.receive("a"))
    sync = task_context(sync=True, messages={"b": ["bee"]})
    assert sync.race("race", a=lambda: sync.receive("a"), b=lambda: sync.receive("b")) == Race("b", "bee")
