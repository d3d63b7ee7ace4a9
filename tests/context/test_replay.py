"""Recorded steps that are met with other arguments: a warning, or the end of the task before anything runs."""

import asyncio
import itertools
import logging
from datetime import datetime
from typing import Any

import pytest
from pydantic import BaseModel, create_model
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import Durable, InvalidConfiguration, RetryStrategy, SyncTaskContext, TaskContext, task
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


async def test_new_field_with_a_default_leaves_the_keys_of_finished_steps(run: Runner, tally: Tally):
    before = create_model("Order", id=(int, ...), note=(str | None, None))
    after = create_model(
        "Order", id=(int, ...), note=(str | None, None), tags=(list[str], []), currency=(str, "EUR"), __base__=BaseModel
    )

    async def charge(order: Any) -> int:
        tally.add(order.id)
        return order.id

    @task
    async def work(ctx: TaskContext, params: int) -> int:
        order = before(id=params) if ctx.attempt == 1 else after(id=params)
        found = await ctx.step("charge", charge, order) + await ctx.step("nested", charge, order)
        if ctx.attempt == 1:
            raise Crash
        return found + await ctx.step("changed", charge, after(id=params, currency="USD"))

    assert await run(work, 7) == 21
    assert tally == [7, 7, 7]


@pytest.mark.parametrize("kind", ["step", "transaction", "def"])
async def test_strict_task_fails_before_anything_runs_and_goes_on_once_its_code_is_mended(
    run: Runner, tally: Tally, kind: str
):
    mended = asyncio.Event()

    async def charge(*arguments: Any) -> str:
        tally.add(arguments[-1])
        return f"charged {arguments[-1]}"

    def plain_charge(amount: str) -> str:
        tally.add(amount)
        return f"charged {amount}"

    def amount(attempt: int) -> str:
        return "first" if attempt == 1 or mended.is_set() else f"other-{attempt}"

    async def body(ctx: TaskContext) -> str:
        await ctx.step("before", charge, "before")
        try:
            call = ctx.step if kind == "step" else ctx.transaction
            found = await call("charge", charge, amount(ctx.attempt))
        except Exception as error:
            # Even if the code catches it, nothing more runs.
            await ctx.step("fallback", charge, "fallback")
            raise AssertionError from error
        if ctx.attempt == 1:
            raise Crash
        return found

    def plain(ctx: SyncTaskContext) -> str:
        ctx.step("before", plain_charge, "before")
        found = ctx.step("charge", plain_charge, amount(ctx.attempt))
        if ctx.attempt == 1:
            raise Crash
        return found

    work = task("work", max_attempts=5, replay="strict")(plain if kind == "def" else body)
    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert (error.name, error.step) == ("ReplayMismatch", "charge")
    assert "'charge' is recorded with other arguments" in error.message
    assert "other-2" not in error.message
    assert tally == ["before", "first"]
    assert len(await Rows(run.durable, spawned).runs()) == 2
    mended.set()
    await run.durable.retry_task(spawned.task_id)
    assert (await run.wait(spawned)).output == "charged first"
    assert tally == ["before", "first"]


async def test_mismatch_that_the_code_swallows_fails_the_task(run: Runner, tally: Tally):
    async def charge(amount: int) -> None:
        tally.add(amount)

    @task(replay="strict")
    async def work(ctx: TaskContext) -> str:
        try:
            await ctx.step("charge", charge, ctx.attempt)
        except Exception:  # noqa: BLE001 - what is tested
            return "swallowed"
        raise Crash

    assert (await run.failure(work)).name == "ReplayMismatch"
    assert tally == [1]


async def test_the_client_says_what_tasks_leave_open(engine: AsyncEngine, tally: Tally):
    async def charge(amount: int) -> int:
        tally.add(amount)
        return amount

    async def body(ctx: TaskContext) -> int:
        found = await ctx.step("charge", charge, ctx.attempt)
        if ctx.attempt == 1:
            raise Crash
        return found

    strict, lenient = task("strict")(body), task("lenient", replay="warn")(body)
    retries = RetryStrategy.fixed(0)
    async with (
        Durable(engine, replay="strict", tasks=[strict, lenient], default_retry_strategy=retries) as durable,
        durable.worker(),
    ):
        run = Runner(durable)
        assert (await run.failure(strict)).name == "ReplayMismatch"
        assert await run(lenient) == 2
    with pytest.raises(InvalidConfiguration, match="'never' is neither 'warn' nor 'strict'"):
        Durable(engine, replay="never")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="replay"):
        task("x", replay="never")  # type: ignore[arg-type]


@pytest.mark.parametrize("replay", ["warn", "strict"])
async def test_arguments_that_differ_in_every_run_are_found_at_the_first_replay(
    run: Runner, replay: Any, caplog: pytest.LogCaptureFixture
):
    async def charge(at: datetime) -> None: ...

    @task(replay=replay)
    async def work(ctx: TaskContext) -> None:
        await ctx.step("charge", charge, datetime.now())
        await ctx.sleep_for("pause", 0.01)

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        result = await run.result(work)
    if replay == "strict":
        assert result.error is not None
        assert result.error.name == "ReplayMismatch"
    else:
        [warning] = [record.getMessage() for record in caplog.records if "other arguments" in record.getMessage()]
        assert "'charge'" in warning


@pytest.mark.parametrize("shape", ["gather", "group", "semaphore", "loops"])
async def test_strict_task_takes_no_branch_for_another(run: Runner, tally: Tally, shape: str):
    """In the first run some branches end and some do not, in any order: what is missing then simply runs."""
    hanging = {0, 3, 4}

    async def fetch(page: int, part: int) -> int:
        if page in hanging and current == 1 and (shape != "semaphore" or page != 4):
            await asyncio.sleep(30)
        tally.add((page, part))
        return page

    current = 0

    @task(replay="strict")
    async def work(ctx: TaskContext) -> list[int]:
        nonlocal current
        current = ctx.attempt
        limit = asyncio.Semaphore(3 if shape == "semaphore" else 100)

        async def one(page: int) -> int:
            async with limit:
                found = await ctx.step("fetch", fetch, page, 0)
                return found if shape != "loops" else await ctx.step("fetch", fetch, page, 1)

        async def fail() -> None:
            await eventually(lambda: len(tally) >= 3)
            raise Crash

        if shape == "gather":
            calls = [ctx.step("fetch", fetch, page, 0) for page in range(6)]
            return (await asyncio.gather(*calls, *([fail()] if ctx.attempt == 1 else ())))[:6]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(page)) for page in range(6)]
            if ctx.attempt == 1:
                group.create_task(fail())
        return [done.result() for done in tasks]

    assert await run(work) == list(range(6))
    assert len(tally) == len(set(tally)) == (12 if shape == "loops" else 6)


@pytest.mark.parametrize("how", ["failed", "cancelled", "transaction"])
async def test_strict_task_runs_what_failed_before_and_was_passed_over(run: Runner, how: str):
    async def fetch(*arguments: Any) -> str:
        page = arguments[-1]
        if page == "bad" and how == "cancelled":
            await asyncio.sleep(30)
        if page == "bad":
            raise ValueError
        return page

    @task(replay="strict")
    async def work(ctx: TaskContext) -> list[str]:
        found: list[str] = []
        for page in ("good", "bad", "better"):
            try:
                if how == "transaction":
                    found.append(await ctx.transaction("fetch", fetch, page))
                else:
                    async with asyncio.timeout(0.05):
                        found.append(await ctx.step("fetch", fetch, page))
            except (ValueError, TimeoutError):
                continue
        if ctx.attempt < 3:
            raise Crash
        return found

    assert await run(work) == ["good", "better"]


async def test_steps_recorded_before_keys_had_families_are_found(run: Runner, tally: Tally):
    numbers = itertools.count(1)

    async def count(*arguments: Any) -> int:
        tally.add(arguments[-1])
        return next(numbers)

    async def save(session: AsyncSession) -> int:
        return next(numbers)

    @task(replay="strict")
    async def work(ctx: TaskContext) -> list[int]:
        found = [await ctx.step("count", count, page) for page in range(2)] + [await ctx.transaction("save", save)]
        if ctx.attempt == 1:
            async with run.durable.engine.begin() as connection:
                await connection.execute(
                    text(
                        "UPDATE durable.checkpoints SET key = overlay(key::text placing"
                        " lpad(to_hex((random() * 10000)::int), 8, '0') from 1 for 8)::uuid"
                    )
                )
            raise Crash
        return found

    assert await run(work) == [1, 2, 3]
    assert tally == [0, 1]
