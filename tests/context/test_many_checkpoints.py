"""Long and large histories: a replay costs in proportion to their length, and large values are fetched when asked for."""

import asyncio
import random
import time
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, SyncTaskContext, TaskContext, task
from tests.context.support import Crash, Rows, Runner, Tally


@pytest.mark.slow
async def test_ten_thousand_steps_are_replayed_in_linear_time(run: Runner):
    took: dict[int, list[float]] = {}
    executed = [0]

    async def step(number: int) -> int:
        executed[0] += 1
        return number

    @task
    async def work(ctx: TaskContext, count: int) -> int:
        started = time.monotonic()
        total = 0
        for start in range(0, count, 500):
            total += sum(
                await asyncio.gather(*(ctx.step("step", step, number) for number in range(start, start + 500)))
            )
        took.setdefault(count, []).append(time.monotonic() - started)
        if ctx.attempt == 1:
            raise Crash
        return total

    for count in (1000, 10_000):
        assert await run(work, count) == count * (count - 1) // 2
    assert executed[0] == 11_000
    (_, short), (_, long) = took[1000], took[10_000]
    assert long < max(30 * short, 2.0)


@pytest.mark.slow
async def test_occurrences_of_one_step_by_the_thousand(run: Runner):
    numbers = iter(range(100_000))

    async def draw() -> int:
        return next(numbers)

    seen: list[list[int]] = []

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append([await ctx.step("draw", draw) for _ in range(1500)])
        if ctx.attempt == 1:
            raise Crash

    await run(work)
    assert seen[0] == seen[1]


def noise(seed: int, size: int) -> str:
    """Text that does not get smaller by being compressed."""
    return random.Random(seed).randbytes(size * 3 // 8).hex()[: size - 2]


@pytest.mark.slow
async def test_values_that_are_too_many_to_load_at_once_are_fetched(run: Runner, engine: AsyncEngine, tally: Tally):
    statements: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    async def large(number: int) -> str:
        tally.add(number)
        return noise(number, 1_000_000)

    @task
    async def work(ctx: TaskContext) -> list[str]:
        values = [await ctx.step("large", large, number) for number in range(8)]
        values += await asyncio.gather(*(ctx.step("large", large, number) for number in range(8, 12)))
        await ctx.emit_event("large", values[0])
        payload = await ctx.await_event("large")
        small = await ctx.step("small", lambda: "small")
        if ctx.attempt == 1:
            statements.clear()
            raise Crash
        assert payload == values[0]
        return [value[:20] for value in values] + [small]

    output = await run(work)
    assert output == [noise(number, 1_000_000)[:20] for number in range(12)] + ["small"]
    assert tally == list(range(12))
    # They did not all come with the first statement.
    assert sum("unnest" in statement and "durable.checkpoints" in statement for statement in statements) > 4


@pytest.mark.slow
async def test_ten_megabytes_in_one_value(run: Runner):
    @task
    async def work(ctx: TaskContext, size: int) -> str:
        async def large() -> str:
            return "é" * size

        found = await ctx.step("large", large)
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work, 5_000_000) == "é" * 5_000_000


async def test_value_left_behind_is_fetched_for_a_plain_task_as_well(run: Runner, tally: Tally):
    def large(number: int) -> str:
        tally.add(number)
        return noise(number, 1_500_000)

    @task
    def work(ctx: SyncTaskContext) -> list[str]:
        values = [ctx.step("large", large, number)[:20] for number in range(5)]
        if ctx.attempt == 1:
            raise Crash
        return values

    assert await run(work) == [noise(number, 1_500_000)[:20] for number in range(5)]
    assert tally == list(range(5))


@pytest.mark.slow
async def test_many_suspensions_of_a_task_with_many_steps(engine: AsyncEngine):
    """Each of them loads what is recorded; what has been done is not done again."""
    executed = [0]

    async def step(number: int) -> int:
        executed[0] += 1
        return number

    async with Durable(engine) as durable, durable.worker():
        run = Runner(durable)

        @task
        async def work(ctx: TaskContext) -> int:
            total = 0
            for turn in range(15):
                total += sum(await asyncio.gather(*(ctx.step("step", step, turn * 100 + n) for n in range(100))))
                await ctx.sleep_for("nap", 0.01)
            return total

        spawned = await run.spawn(work)
        assert (await run.wait(spawned)).output == 1500 * 1499 // 2
        assert executed[0] == 1500
        assert len(await Rows(durable, spawned).checkpoints("nap")) == 15
