"""Calls made side by side get what they themselves gave, whatever finishes first and wherever a run is cut off."""

import asyncio
import itertools
import logging
import random
from typing import Any

import pytest

from durable_sa import TaskContext, current_context, task
from tests.context.support import Crash, Runner, Tally, warnings


class Stopwatch:
    """Ends an attempt after a number of steps have been recorded, whichever these are."""

    def __init__(self, after: int) -> None:
        self.left = after

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
@pytest.mark.parametrize("how", ["gather", "group"])
async def test_branches_that_make_the_same_calls_keep_their_own_results(run: Runner, seed: int, how: str):
    """Every branch draws several times, all by the same name; what an attempt saw, later ones must see again."""
    chance = random.Random(seed)
    numbers = itertools.count()
    seen: dict[tuple[int, int], int] = {}
    drawn: list[int] = []

    async def draw() -> int:
        await asyncio.sleep(chance.random() * 0.004)
        drawn.append(next(numbers))
        return drawn[-1]

    async def branch(ctx: TaskContext, number: int, watch: Stopwatch) -> list[int]:
        found = []
        for position in range(3):
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.002)
            value = await ctx.step("draw", draw)
            assert seen.setdefault((number, position), value) == value
            found.append(value)
            watch.count()
        return found

    @task(max_attempts=50)
    async def work(ctx: TaskContext) -> list[list[int]]:
        watch = Stopwatch(chance.randint(1, 25))
        if how == "gather":
            return await asyncio.gather(*(branch(ctx, number, watch) for number in range(6)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch(ctx, number, watch)) for number in range(6)]
        return [done.result() for done in tasks]

    output = await run(work)
    assert output == [[seen[number, position] for position in range(3)] for number in range(6)]
    assert len(set(itertools.chain(*output))) == 18


async def test_nested_groups_keep_their_own_results(run: Runner):
    chance = random.Random(1)
    numbers = itertools.count()
    seen: dict[tuple[int, ...], int] = {}

    async def draw() -> int:
        await asyncio.sleep(chance.random() * 0.003)
        return next(numbers)

    @task(max_attempts=100)
    async def work(ctx: TaskContext) -> int:
        watch = Stopwatch(chance.randint(2, 20))

        async def branch(path: tuple[int, ...]) -> None:
            value = await ctx.step("draw", draw)
            assert seen.setdefault(path, value) == value
            watch.count()
            if len(path) < 3:
                async with asyncio.TaskGroup() as group:
                    for number in range(2):
                        group.create_task(branch((*path, number)))

        await asyncio.gather(branch((0,)), branch((1,)))
        return len(seen)

    assert await run(work) == 14
    assert len(set(seen.values())) == 14


async def test_different_arguments_find_their_results_in_any_order(run: Runner, tally: Tally):
    async def fetch(page: int) -> str:
        await asyncio.sleep(0.001 * (page * 7 % 5))
        tally.add(page)
        return f"page {page}"

    @task(max_attempts=20)
    async def work(ctx: TaskContext) -> list[str]:
        watch = Stopwatch(7)

        async def one(page: int) -> str:
            found = await ctx.step("fetch", fetch, page)
            if page not in replayed:
                watch.count()
            return found

        replayed = set(tally)
        return await asyncio.gather(*(one(page) for page in range(20)))

    assert await run(work) == [f"page {page}" for page in range(20)]


async def test_coroutines_made_before_they_are_gathered_are_told_apart(run: Runner):
    numbers = itertools.count()
    seen: list[list[int]] = []

    async def draw() -> int:
        await asyncio.sleep(random.random() * 0.005)
        return next(numbers)

    @task
    async def work(ctx: TaskContext) -> None:
        calls = [ctx.step("draw", draw) for _ in range(8)]
        seen.append(await asyncio.gather(*reversed(calls)))
        if ctx.attempt == 1:
            raise Crash

    await run(work)
    assert seen[0] == seen[1]


async def test_crash_amid_steps_of_one_name_does_not_warn(run: Runner, caplog: pytest.LogCaptureFixture):
    """Not even of other arguments: what is recorded belongs to branches that have not asked for it yet."""

    async def fetch(page: int) -> int:
        await asyncio.sleep(30 if page == 0 and current_context().attempt == 1 else 0)
        return page

    @task
    async def work(ctx: TaskContext) -> list[int]:
        async def one(page: int) -> int:
            found = await ctx.step("fetch", fetch, page)
            if page == 3 and ctx.attempt == 1:
                raise Crash
            return found

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(page)) for page in range(4)]
        return [done.result() for done in tasks]

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        assert await run(work) == [0, 1, 2, 3]
    assert warnings(caplog) == []


async def test_failing_branch_of_a_gather_fails_the_attempt_and_the_others_are_kept(run: Runner, tally: Tally):
    async def step(name: str) -> str:
        tally.add(name)
        if name == "bad" and tally.count("bad") == 1:
            await asyncio.sleep(0.05)
            raise ConnectionError
        return name

    @task
    async def work(ctx: TaskContext) -> list[str]:
        return await asyncio.gather(*(ctx.step(name, step, name) for name in ("a", "bad", "b")))

    assert await run(work) == ["a", "bad", "b"]
    assert sorted(tally) == ["a", "b", "bad", "bad"]


async def test_branches_that_are_left_running_are_cancelled_with_the_end_of_the_task(run: Runner):
    ended = asyncio.Event()
    cleaned = asyncio.Event()

    async def background() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    @task
    async def work(ctx: TaskContext) -> str:
        running = asyncio.create_task(background())
        await asyncio.sleep(0)
        assert not running.done()
        ended.set()
        return "done"

    assert await run(work) == "done"
    assert ended.is_set()
    async with asyncio.timeout(5):
        await cleaned.wait()


async def test_helper_tasks_in_a_step_do_not_shift_the_branches_outside(run: Runner):
    numbers = itertools.count()
    seen: list[list[int]] = []

    async def draw() -> int:
        return next(numbers)

    async def step_with_helpers() -> int:
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(3)))
        return 0

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.step("helpers", step_with_helpers)
        seen.append(await asyncio.gather(ctx.step("draw", draw), asyncio.create_task(one(ctx))))
        if ctx.attempt == 1:
            raise Crash

    async def one(ctx: TaskContext) -> int:
        return await ctx.step("draw", draw)

    await run(work)
    assert seen[0] == seen[1]


async def test_first_completed_with_steps_can_be_replayed(run: Runner):
    """Which one was first is not remembered, but each result is that of its own step."""

    async def wait(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        tasks = [asyncio.create_task(ctx.step("wait", wait, seconds)) for seconds in (0.01, 0.3)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = [finished.result() for finished in done]
        if ctx.attempt == 1:
            raise Crash
        return [first, sorted(await asyncio.gather(*tasks))]

    assert await run(work) == [[0.01], [0.01, 0.3]]
