"""A call of the context that is never awaited fails its run: without that, it would silently do nothing."""

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from durable_sa import RetryStrategy, TaskContext, TaskStatus, task
from tests.context.support import Rows, Runner, Tally

REMEDY = "Await the coroutine that each method of the context returns, or pass it to asyncio.gather."


@task
async def child(ctx: TaskContext) -> None: ...


CALLS: list[tuple[str, Callable[[TaskContext], Coroutine[Any, Any, Any]]]] = [
    ("step 'charge'", lambda ctx: ctx.step("charge", int)),
    ("transaction 'pay'", lambda ctx: ctx.transaction("pay", lambda session: None)),
    ("spawn 'child'", lambda ctx: ctx.spawn("child", child)),
    ("sleep 'nap'", lambda ctx: ctx.sleep_for("nap", 1)),
    ("event 'paid'", lambda ctx: ctx.await_event("paid")),
    ("emit 'paid'", lambda ctx: ctx.emit_event("paid")),
    ("value '$now'", lambda ctx: ctx.now()),
    ("value '$rand'", lambda ctx: ctx.rand()),
]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
async def test_the_run_fails_and_the_error_names_the_call(
    run: Runner, name: str, call: Callable[[TaskContext], Coroutine[Any, Any, Any]]
) -> None:
    @task(max_attempts=5, retry_strategy=RetryStrategy.fixed(0))
    async def forgets(ctx: TaskContext) -> None:
        await ctx.step("first", int)
        call(ctx)
        await asyncio.sleep(0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spawned = await run.spawn(forgets)
        result = await run.wait(spawned)
    assert result.status is TaskStatus.FAILED
    assert result.error is not None
    assert (result.error.name, result.error.message) == (
        "InvalidState",
        f"The call of {name} is made and never awaited, so it had no effect. {REMEDY}",
    )
    assert len(await Rows(run.durable, spawned).runs()) == 1


async def test_calls_that_are_awaited_later_cancelled_or_closed_are_none_of_these(run: Runner, tally: Tally) -> None:
    @task
    async def careful(ctx: TaskContext) -> int:
        later = ctx.step("later", lambda: 5)
        await ctx.sleep_for("nap", 0.01)
        with pytest.raises(TypeError):
            ctx.step("wrong", 7)  # type: ignore[call-overload]
        ctx.step("closed", tally.add, 1).close()
        never = asyncio.ensure_future(ctx.step("cancelled", tally.add, 2))
        never.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.step("grouped", int))
        return await later

    assert await run(careful) == 5
    assert tally == []


async def test_the_error_of_the_task_itself_comes_first(run: Runner) -> None:
    @task(max_attempts=1)
    async def fails(ctx: TaskContext) -> None:
        coroutine = ctx.step("charge", int)
        try:
            raise ValueError("mine")
        finally:
            coroutine.close()

    assert (await run.failure(fails)).message == "mine"
