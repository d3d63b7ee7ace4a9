"""`def` tasks: the same methods as in asynchronous ones, blocking, with their steps in the task's own thread."""

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from durable_sa import Durable, SyncTaskContext, TaskContext, current_context, step, task
from tests.context.support import Crash, Rows, Runner, Tally, warnings


async def test_task_and_its_plain_steps_run_in_one_thread_that_is_not_the_event_loops(run: Runner):
    def where() -> int:
        return threading.get_ident()

    async def on_the_loop() -> int:
        return threading.get_ident()

    @task
    def work(ctx: SyncTaskContext) -> list[int]:
        return [
            threading.get_ident(),
            ctx.step("where", where),
            ctx.step("lambda", lambda: threading.get_ident()),
            ctx.step("loop", on_the_loop),
        ]

    own, plain, anonymous, loop = await run(work)
    assert own == plain == anonymous
    assert loop == threading.get_ident() != own


async def test_steps_are_replayed(run: Runner, tally: Tally):
    def double(value: int) -> int:
        tally.add(value)
        return value * 2

    async def triple(value: int) -> int:
        tally.add(-value)
        return value * 3

    @task
    def work(ctx: SyncTaskContext, params: int) -> list[Any]:
        found = [ctx.step("double", double, params), ctx.step("triple", triple, params), ctx.step("double", double, 1)]
        found += [ctx.step("double", double, 1)]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work, 5) == [10, 15, 2, 2]
    assert tally == [5, -5, 1, 1]


async def test_step_that_turns_out_to_be_asynchronous_is_awaited(run: Runner, tally: Tally):
    async def double(value: int) -> int:
        tally.add("double")
        return value * 2

    async def outer() -> int:
        ctx: TaskContext = current_context()
        return await ctx.step("double", double, 4)

    @task(max_attempts=2)
    def work(ctx: SyncTaskContext) -> list[int]:
        found: list[int] = [ctx.step("lambda", lambda: double(2)), ctx.step("nested", lambda: outer())]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == [4, 8]
    assert tally == ["double"] * 2


async def test_step_that_failed_runs_again(run: Runner, tally: Tally):
    def flaky() -> str:
        tally.add("flaky")
        if len(tally) < 3:
            raise ConnectionError
        return "done"

    @task
    def work(ctx: SyncTaskContext) -> str:
        try:
            return ctx.step("flaky", flaky)
        except ConnectionError:
            if ctx.attempt == 2:
                return "caught"
            raise

    assert await run(work) == "caught"
    assert len(tally) == 2


async def test_everything_that_a_context_tells(run: Runner):
    @task
    def work(ctx: SyncTaskContext) -> list[Any]:
        same = current_context() is ctx
        return [str(ctx.task_id), str(ctx.run_id), ctx.attempt, ctx.task_name, ctx.queue_name, dict(ctx.headers), same]

    spawned = await run.spawn(work, headers={"a": [1]})
    assert (await run.wait(spawned)).output == [
        str(spawned.task_id),
        str(spawned.run_id),
        1,
        "work",
        "default",
        {"a": [1]},
        True,
    ]


async def test_steps_inside_a_plain_step_are_part_of_it(run: Runner, tally: Tally, caplog: pytest.LogCaptureFixture):
    """They do not count as occurrences outside, where they would get each other's results in a replay."""

    def inner(value: str) -> str:
        tally.add(f"inner {value}")
        return f"{value} {len(tally)}"

    @task
    def work(ctx: SyncTaskContext) -> list[str]:
        def outer() -> list[str]:
            tally.add("outer")
            return [ctx.step("inner", inner, "x"), ctx.step("inner", inner, "x")]

        found = [*ctx.step("outer", outer), ctx.step("inner", inner, "x")]
        if ctx.attempt == 1:
            seen.extend(found)
            raise Crash
        return found

    seen: list[str] = []
    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        assert await run(work) == seen
    assert len(set(seen)) == 3
    assert tally == ["outer", "inner x", "inner x", "inner x"]
    assert warnings(caplog) == []


async def test_decorated_steps_that_call_each_other(run: Runner, tally: Tally):
    @step
    def inner(value: int) -> int:
        tally.add("inner")
        return value + 1

    @step(max_attempts=3)
    def outer() -> int:
        tally.add("outer")
        found = inner(1)
        if tally.count("outer") < 3:
            raise ConnectionError
        return found

    @task(max_attempts=1)
    def work(ctx: SyncTaskContext) -> int:
        return outer()

    assert await run(work) == 2
    assert tally == ["outer", "inner", "outer", "outer"]


async def test_wait_inside_a_step_is_refused(run: Runner):
    @task(max_attempts=1)
    def work(ctx: SyncTaskContext) -> None:
        ctx.step("outer", lambda: ctx.sleep_for("nap", 1))

    error = await run.failure(work)
    assert error.name == "InvalidState"
    assert "'nap'" in error.message


async def test_context_used_from_another_thread_is_refused(run: Runner):
    @task
    def work(ctx: SyncTaskContext) -> str:
        found: list[str] = []

        def other() -> None:
            try:
                ctx.rand()
            except RuntimeError as error:
                found.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found[0]

    assert "thread" in await run(work)


async def test_as_many_run_side_by_side_as_the_worker_has_slots(engine: Any):
    barrier = threading.Barrier(8, timeout=20)

    @task
    def work(ctx: SyncTaskContext) -> int:
        return ctx.step("meet", barrier.wait)

    async with Durable(engine, tasks=[work]) as durable, durable.worker(concurrency=8):
        spawned = await durable.spawn_many([(work, None)] * 8)
        found = [(await durable.wait_for_result(each, timeout=20)).output for each in spawned]
    assert sorted(found) == list(range(8))


@pytest.mark.slow
async def test_blocking_code_does_not_hold_up_the_event_loop(run: Runner):
    @task
    def work(ctx: SyncTaskContext) -> None:
        time.sleep(0.5)

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("running")
    longest = 0.0
    for _ in range(30):
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before)
    assert longest < 0.3
    await run.wait(spawned)


async def test_many_suspensions_leave_no_threads_behind(run: Runner):
    @task
    def work(ctx: SyncTaskContext) -> int:
        for _ in range(10):
            ctx.sleep_for("nap", 0.01)
        return 10

    assert await run(work) == 10
    assert sum(thread.name.startswith("durable:work") for thread in threading.enumerate()) <= 1


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(1), GeneratorExit()], ids=repr)
async def test_whatever_it_raises_is_a_failure_of_the_task(run: Runner, error: BaseException):
    @task(max_attempts=1)
    def work(ctx: SyncTaskContext) -> None:
        raise error

    @task
    def healthy(ctx: SyncTaskContext) -> str:
        return "well"

    found = await run.failure(work)
    assert type(error).__name__ in found.name + found.message
    assert await run(healthy) == "well"
