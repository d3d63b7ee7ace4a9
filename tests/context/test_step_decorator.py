"""The `step` decorator: a plain function outside of tasks, a step with tries and a timeout of its own inside."""

import asyncio
import threading
import time

import pytest

from durable_sa import RetryStrategy, SyncTaskContext, TaskContext, TaskTimeout, UserError, current_context, step, task
from tests.context.support import Crash, Rows, Runner, Tally


async def test_outside_a_task_it_is_the_plain_function():
    @step
    async def charge(order: int) -> int:
        return order + 1

    @step("other-name", max_attempts=3)
    def cancel(order: int) -> int:
        return order - 1

    assert await charge(1) == 2
    assert cancel(1) == 0


async def test_inside_a_task_a_call_is_remembered_under_the_functions_name(run: Runner, tally: Tally):
    @step
    async def charge(order: int) -> int:
        tally.add(order)
        return order + 1

    @step("named")
    def cancel(order: int) -> int:
        tally.add(-order)
        return order - 1

    @task
    async def work(ctx: TaskContext) -> list[int]:
        found = [await charge(1), await charge(2), await cancel(5)]
        if ctx.attempt == 1:
            raise Crash
        return found

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == [2, 3, 4]
    assert tally == [1, 2, -5]
    assert {row.name for row in await Rows(run.durable, spawned).checkpoints()} == {"charge", "named"}


async def test_call_and_ctx_step_by_the_same_name_are_the_same(run: Runner, tally: Tally):
    @step
    async def charge(order: int) -> int:
        tally.add(order)
        return order + 1

    @task
    async def work(ctx: TaskContext) -> int:
        if ctx.attempt == 1:
            await charge(1)
            raise Crash
        return await ctx.step("charge", charge, 1)

    assert await run(work) == 2
    assert tally == [1]


async def test_tries_of_a_step_spend_no_attempt_of_the_task(run: Runner, tally: Tally):
    @step(max_attempts=4, retry_strategy=RetryStrategy.fixed(0.001))
    async def flaky() -> str:
        tally.add("try")
        if len(tally) < 4:
            raise ConnectionError
        return "done"

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        return await flaky()

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == "done"
    assert len(tally) == 4
    [only] = await Rows(run.durable, spawned).runs()
    assert only.state == "completed"


async def test_error_of_the_last_try_reaches_the_task(run: Runner, tally: Tally):
    @step(max_attempts=3, retry_strategy=RetryStrategy.fixed(0))
    async def broken() -> None:
        tally.add("try")
        raise ConnectionError(f"try {len(tally)}")

    @task
    async def work(ctx: TaskContext) -> str:
        try:
            await broken()
        except ConnectionError as error:
            return str(error)
        return "not raised"

    assert await run(work) == "try 3"
    assert len(tally) == 3


async def test_next_attempt_of_the_task_has_all_tries_again(run: Runner, tally: Tally):
    @step(max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
    async def broken() -> None:
        tally.add("try")
        raise ConnectionError

    @task(max_attempts=3)
    async def work(ctx: TaskContext) -> None:
        await broken()

    await run.failure(work)
    assert len(tally) == 6


async def test_what_would_fail_the_same_way_again_is_not_tried_again(run: Runner, tally: Tally):
    @step(max_attempts=5, retry_strategy=RetryStrategy.fixed(0))
    async def refuse() -> None:
        tally.add("try")
        raise UserError("no")

    @task
    async def work(ctx: TaskContext) -> None:
        await refuse()

    assert (await run.failure(work)).name == "UserError"
    assert len(tally) == 1


async def test_strategy_none_does_not_try_again(run: Runner, tally: Tally):
    @step(max_attempts=5, retry_strategy=RetryStrategy.none())
    async def broken() -> None:
        tally.add("try")
        raise ConnectionError

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await broken()

    await run.failure(work)
    assert len(tally) == 1


@pytest.mark.slow
async def test_tries_are_counted_on_after_the_run_was_taken_over(run: Runner, tally: Tally):
    @step(max_attempts=4, retry_strategy=RetryStrategy.fixed(0))
    async def broken() -> None:
        tally.add("try")
        if len(tally) == 3:
            await rows.take_over()
        raise ConnectionError

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ready.wait()
        await broken()

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    ready.set()
    assert (await run.wait(spawned)).error.name == "ConnectionError"
    # The third was cut off: its failure was not recorded, so there are two more.
    assert len(tally) == 5
    assert (await rows.task()).failures == 1


@pytest.mark.slow
async def test_long_pause_between_tries_suspends_the_run_and_is_not_begun_anew(run: Runner, tally: Tally):
    @step(max_attempts=2, retry_strategy=RetryStrategy.fixed(1.2))
    async def flaky() -> float:
        tally.add(time.monotonic())
        if len(tally) == 1:
            raise ConnectionError
        return 0.0

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> float:
        return await flaky()

    spawned = await run.spawn(work)
    row = await Rows(run.durable, spawned).until("sleeping")
    assert row.claimed_by is None
    assert (await run.wait(spawned)).output == 0.0
    assert 1.2 <= tally[1] - tally[0] < 4


@pytest.mark.slow
async def test_pause_between_tries_is_not_cut_short_by_what_else_wakes_the_run(run: Runner, tally: Tally):
    @step(max_attempts=2, retry_strategy=RetryStrategy.fixed(1.5))
    async def flaky() -> str:
        tally.add(time.monotonic())
        if len(tally) == 1:
            raise ConnectionError
        return "done"

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> list[object]:
        return await asyncio.gather(flaky(), ctx.await_event("go"))

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.emit_event("go", 1)
    assert (await run.wait(spawned)).output == ["done", 1]
    assert len(tally) == 2
    assert tally[1] - tally[0] >= 1.5


async def test_step_past_its_timeout_is_cancelled_and_raises_task_timeout(run: Runner, tally: Tally):
    @step(timeout=0.05)
    async def slow() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            tally.add("cancelled")
            raise

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        try:
            await slow()
        except TimeoutError as error:
            assert isinstance(error, TaskTimeout)
            raise

    error = await run.failure(work)
    assert error.name == "TaskTimeout"
    assert "'slow'" in error.message
    assert tally == ["cancelled"]


async def test_timeout_is_an_error_that_is_retried(run: Runner, tally: Tally):
    @step(timeout=0.05, max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
    async def slow() -> None:
        tally.add("try")
        await asyncio.sleep(30)

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> None:
        await slow()

    await run.failure(work)
    assert len(tally) == 4


async def test_timeout_of_a_plain_function_does_not_wait_for_its_thread(run: Runner):
    release = threading.Event()

    @step(timeout=0.05)
    def stuck() -> None:
        release.wait(20)

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await stuck()

    started = time.monotonic()
    assert (await run.failure(work)).name == "TaskTimeout"
    assert time.monotonic() - started < 5
    release.set()


async def test_steps_left_behind_in_their_threads_keep_no_others_waiting(run: Runner):
    release = threading.Event()

    @step(timeout=0.05)
    def stuck(number: int) -> None:
        release.wait(60)

    @task
    async def work(ctx: TaskContext) -> int:
        # The worker has threads for twenty.
        left = await asyncio.gather(*(stuck(number) for number in range(40)), return_exceptions=True)
        assert {type(error) for error in left} == {TaskTimeout}
        return await ctx.step("quick", len, "abc")

    try:
        assert await run(work) == 3
    finally:
        release.set()


async def test_timeout_that_the_steps_own_code_raises_is_not_taken_for_the_limit(run: Runner):
    @step(timeout=10)
    async def own() -> None:
        raise TimeoutError("own")

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await own()

    assert (await run.failure(work)).name == "TimeoutError"


async def test_result_in_time_is_not_touched_by_the_timeout(run: Runner):
    @step(timeout=20)
    async def quick(value: int) -> int:
        return value

    @task
    async def work(ctx: TaskContext) -> int:
        return await quick(7)

    assert await run(work) == 7


async def test_steps_that_call_steps_keep_what_those_gave(run: Runner, tally: Tally):
    @step
    async def inner(value: int) -> int:
        tally.add("inner")
        return value + 1

    @step(max_attempts=3, retry_strategy=RetryStrategy.fixed(0))
    async def outer() -> int:
        tally.add("outer")
        found = await inner(1)
        if tally.count("outer") < 3:
            raise ConnectionError
        return found

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        return await outer()

    assert await run(work) == 2
    assert tally == ["outer", "inner", "outer", "outer"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["step", "transaction"])
async def test_what_a_step_had_done_before_its_run_was_taken_over_is_kept_for_all_its_tries(
    run: Runner, tally: Tally, kind: str
):
    async def inner(*_: object) -> str:
        tally.add("inner")
        return "kept"

    @step(max_attempts=4, retry_strategy=RetryStrategy.fixed(0))
    async def outer() -> str:
        tally.add("outer")
        ctx: TaskContext = current_context()
        found = await (ctx.step("inner", inner) if kind == "step" else ctx.transaction("inner", inner))
        if tally.count("outer") == 2:
            await Rows(run.durable, ctx.task_id).take_over()
        if tally.count("outer") < 4:
            raise ConnectionError
        return found

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        return await outer()

    assert await run(work) == "kept"
    assert tally == ["outer", "inner", "outer", "outer", "outer"]


def test_options_that_cannot_work_are_refused_where_they_are_written():
    for options in ({"max_attempts": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"retry_strategy": "fixed"}):
        with pytest.raises(ValueError, match="|".join(options)):
            step("name", **options)


@pytest.mark.parametrize("timeout", [None, 20])
async def test_in_a_plain_task_it_gives_the_result_itself(run: Runner, tally: Tally, timeout: float | None):
    @step(max_attempts=3, retry_strategy=RetryStrategy.fixed(0), timeout=timeout)
    def flaky(order: int) -> int:
        tally.add(order)
        if len(tally) < 3:
            raise ConnectionError
        return order + 1

    @step
    async def on_the_loop(order: int) -> int:
        tally.add("loop")
        return order + 2

    @task(max_attempts=2)
    def work(ctx: SyncTaskContext) -> list[object]:
        found = [flaky(1), on_the_loop(1)]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == [2, 3]
    assert tally == [1, 1, 1, "loop"]


async def test_step_of_a_plain_task_past_its_timeout_raises_task_timeout(run: Runner):
    release = threading.Event()

    @step(timeout=0.05)
    def stuck() -> None:
        release.wait(20)

    @task(max_attempts=1)
    def work(ctx: SyncTaskContext) -> None:
        stuck()

    assert (await run.failure(work)).name == "TaskTimeout"
    release.set()
