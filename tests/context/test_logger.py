"""`ctx.logger` logs each line of a task's own code once, however often the code is replayed."""

import asyncio
import logging
from typing import Any

import pytest

from durable_sa import SyncTaskContext, TaskContext, step, task
from durable_sa.testing import task_context
from tests.context.support import Crash, Rows, Runner


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "durable_sa.tasks")


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "durable_sa.tasks"]


async def test_lines_before_what_is_recorded_are_not_repeated(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    @task
    async def sleeper(ctx: TaskContext) -> None:
        ctx.logger.info("begins in attempt %d", ctx.attempt)
        await ctx.step("one", int)
        ctx.logger.info("one is done")
        try:
            await ctx.sleep_for("nap", 0.01)
        finally:
            ctx.logger.info("awake")
        for number in range(2):
            await ctx.await_event(f"event {number}", timeout=0.01) if number else await ctx.sleep_for("again", 0.01)
            ctx.logger.warning("round %d", number, extra={"mine": 5})

    spawned = await run.spawn(sleeper)
    result = await run.wait(spawned)
    assert result.error is not None  # the event never comes
    first = "TaskTimeout"
    assert result.error.name == first
    lines = logged(caplog)
    assert lines[:4] == ["begins in attempt 1", "one is done", "awake", "round 0"]
    assert lines.count("begins in attempt 1") == lines.count("one is done") == lines.count("awake") == 1
    record = next(record for record in caplog.records if record.getMessage() == "round 0")
    assert (record.__dict__["task_id"], record.__dict__["mine"]) == (str(spawned.task_id), 5)
    assert (record.levelname, record.filename, record.funcName) == ("WARNING", "test_logger.py", "sleeper")


@pytest.mark.slow
async def test_branches_are_told_apart(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def nap(ctx: TaskContext, name: str, seconds: float) -> None:
        ctx.logger.info("%s begins", name)
        await ctx.sleep_for(name, seconds)
        ctx.logger.info("%s ends", name)

    @task
    async def branching(ctx: TaskContext) -> None:
        ctx.logger.info("begins")
        await asyncio.gather(nap(ctx, "long", 1.5), nap(ctx, "short", 0.01))
        ctx.logger.info("both have ended")

    await run(branching)
    lines = logged(caplog)
    # The branch that has ended makes no further call, so nothing shows that it was there before.
    assert lines == [
        "begins", "long begins", "short begins", "short ends", "long ends", "short ends", "both have ended"
    ]  # fmt: skip


async def test_steps_log_whenever_they_run_and_records_left_over_silence_nothing(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    @step
    async def inner() -> None:
        from durable_sa import current_context

        current_context().logger.info("in the step")

    @task(max_attempts=3)
    async def changed(ctx: TaskContext) -> None:
        if ctx.attempt == 1:
            await ctx.step("removed", int)
            await ctx.step("kept", int)
            raise Crash
        ctx.logger.info("before what is new")
        await ctx.step("added", int)
        ctx.logger.info("attempt %d", ctx.attempt)
        await inner()
        await ctx.step("thread", lambda: ctx.logger.info("in a thread"))

    await run(changed)
    assert logged(caplog) == ["before what is new", "attempt 2", "in the step", "in a thread"]


async def test_def_tasks_have_one_too(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    @task
    def plain(ctx: SyncTaskContext) -> None:
        ctx.logger.info("begins")
        ctx.step("first", int)
        ctx.sleep_for("nap", 0.01)
        ctx.logger.info("awake")
        ctx.step("second", lambda: ctx.logger.info("in the step"))

    await run(plain)
    assert logged(caplog) == ["begins", "awake", "in the step"]


async def test_a_context_in_memory_logs_everything(caplog: pytest.LogCaptureFixture) -> None:
    context: Any = task_context(task_name="named")
    context.logger.info("a line")
    (record,) = caplog.records
    assert (record.getMessage(), record.__dict__["task_name"]) == ("a line", "named")


@pytest.mark.slow
async def test_a_run_that_another_worker_goes_on_with_logs_what_is_behind_its_records(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    gate = asyncio.Event()

    @task
    async def taken(ctx: TaskContext) -> None:
        ctx.logger.info("before, in attempt %d", ctx.attempt)
        await ctx.step("recorded", int)
        ctx.logger.info("after, in attempt %d", ctx.attempt)
        await ctx.step("held", gate.wait)

    spawned = await run.spawn(taken)
    while len(logged(caplog)) < 2:
        await asyncio.sleep(0.01)
    await Rows(run.durable, spawned).take_over()
    gate.set()
    await run.wait(spawned)
    assert logged(caplog) == ["before, in attempt 1", "after, in attempt 1", "after, in attempt 2"]
