"""Suspension, cancellation and loss of a run, whatever its code does: catch, swallow, clean up."""

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest

from durable_sa import Durable, SyncTaskContext, TaskContext, TaskTimeout, task
from durable_sa.signals import ControlFlow
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


async def test_except_exception_around_a_wait_catches_no_suspension(run: Runner, tally: Tally):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        for wait in (lambda: ctx.sleep_for("nap", 0.1), lambda: ctx.await_event("go")):
            try:
                await wait()
            except Exception as error:  # noqa: BLE001 - the point of the test
                tally.add(error)
        return "done"

    spawned = await run.spawn(work)
    await eventually(Rows(run.durable, spawned).waits)
    await run.durable.emit_event("go")
    assert (await run.wait(spawned)).output == "done"
    assert tally == []
    [only] = await Rows(run.durable, spawned).runs()
    assert only.state == "completed"


async def test_except_base_exception_that_goes_on_writes_nothing_and_does_not_end_the_task(run: Runner, tally: Tally):
    async def step(name: str) -> str:
        tally.add(name)
        return name

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        suspended = False
        try:
            await ctx.sleep_for("nap", 0.3)
        except BaseException:  # noqa: BLE001 - the point of the test
            suspended = True
        if suspended:
            for call in (
                lambda: ctx.step("after", step, "swallowed"),
                lambda: ctx.emit_event("after"),
                lambda: ctx.spawn("after", work),
                lambda: ctx.rand(),
                lambda: ctx.heartbeat(),
            ):
                try:
                    await call()
                except BaseException as error:  # noqa: BLE001
                    tally.add(type(error).__name__)
            return "swallowed"
        return await ctx.step("after", step, "awake")

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == "awake"
    assert tally == ["Suspended"] * 5 + ["awake"]
    assert {row.name for row in await Rows(run.durable, spawned).checkpoints()} == {"nap", "after"}
    assert await Rows(run.durable, spawned).children() == []


@pytest.mark.parametrize("how", ["asynchronous", "plain"])
@pytest.mark.slow
async def test_code_that_swallows_everything_for_ever_does_not_spin_and_gives_its_slot_back(
    engine: Any, how: str, caplog: pytest.LogCaptureFixture
):
    counts = [0]

    @task("stubborn")
    async def stubborn(ctx: TaskContext) -> None:
        while counts[0] >= 0:
            try:
                await ctx.sleep_for("nap", 3600)
            except GeneratorExit:
                raise
            except BaseException:  # noqa: BLE001
                counts[0] += 1

    @task("stubborn")
    def stubborn_thread(ctx: SyncTaskContext) -> None:
        while counts[0] >= 0:
            try:
                ctx.sleep_for("nap", 3600)
            except BaseException:  # noqa: BLE001
                counts[0] += 1

    async with Durable(engine) as durable, durable.worker(concurrency=1, shutdown_timeout=0.1):
        run = Runner(durable)
        spawned = await run.spawn(stubborn if how == "asynchronous" else stubborn_thread)

        @durable.task
        async def other(ctx: TaskContext) -> str:
            return "done"

        assert await run(other) == "done"
        await Rows(durable, spawned).until("sleeping")
        seen = counts[0]
        await asyncio.sleep(0.3)
        assert counts[0] == seen < 100
        counts[0] = -1000
    assert "left behind" in caplog.text


async def test_finally_blocks_run_at_every_suspension_and_cannot_write(run: Runner, tally: Tally):
    async def step() -> str:
        return "cleaned"

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        try:
            await ctx.sleep_for("nap", 0.1)
            return "done"
        finally:
            tally.add("finally")
            await asyncio.sleep(0)
            await ctx.step("cleanup", step)
            tally.add("cleaned")

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == "done"
    assert tally == ["finally", "finally", "cleaned"]


async def test_context_managers_around_a_wait_are_left_and_entered_again(run: Runner, tally: Tally):
    @contextlib.asynccontextmanager
    async def resource() -> Any:
        tally.add("open")
        try:
            yield
        finally:
            await asyncio.sleep(0)
            tally.add("close")

    @task
    async def work(ctx: TaskContext) -> None:
        async with resource():
            await ctx.sleep_for("nap", 0.1)
            tally.add("awake")

    await run(work)
    assert tally == ["open", "close", "open", "awake", "close"]


@pytest.mark.parametrize("call", ["sleep_for", "await_event", "join"])
async def test_wait_for_around_a_wait_is_refused_with_the_way_out(run: Runner, call: str):
    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        if call == "sleep_for":
            await asyncio.wait_for(ctx.sleep_for("nap", 3600), 10)
        elif call == "await_event":
            await asyncio.wait_for(ctx.await_event("never"), 10)
        else:
            await asyncio.wait_for(ctx.join(await ctx.spawn("child", child)), 10)

    error = await run.failure(work)
    assert error.name == "InvalidState"
    assert "wait_for" in error.message
    assert "timeout=" in error.message


async def test_wait_for_around_a_step_works(run: Runner):
    async def step() -> int:
        return 1

    async def slow() -> None:
        await asyncio.sleep(30)

    @task
    async def work(ctx: TaskContext) -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ctx.step("slow", slow), 0.05)
        return await asyncio.wait_for(ctx.step("step", step), 10)

    assert await run(work) == 1


async def test_gather_that_returns_exceptions_gets_no_signals(run: Runner, tally: Tally):
    """It would otherwise return the suspension as if it were a result."""

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found = await asyncio.gather(
            ctx.sleep_for("nap", 0.2), ctx.await_event("never", timeout=0.1), return_exceptions=True
        )
        tally.add([type(each).__name__ for each in found])
        return [type(each).__name__ for each in found]

    assert await run(work) == ["NoneType", "TaskTimeout"]
    assert tally == [["NoneType", "TaskTimeout"]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gather", "group"])
async def test_all_branches_run_until_each_is_done_or_waits_then_the_task_suspends_for_all(
    run: Runner, tally: Tally, how: str
):
    async def step(name: str, seconds: float) -> str:
        await asyncio.sleep(seconds)
        tally.add(name)
        return name

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> list[Any]:
        tally.add("entered")

        async def first() -> Any:
            await ctx.step("first", step, "first", 0.2)
            return await ctx.await_event("one")

        async def second() -> Any:
            found = await ctx.await_event("two")
            await ctx.step("second", step, "second", 0.0)
            return found

        branches = [first(), second(), ctx.step("third", step, "third", 0.3)]
        if how == "gather":
            return await asyncio.gather(*branches)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch) for branch in branches]
        return [done.result() for done in tasks]

    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    await rows.until("sleeping")
    assert tally == ["entered", "first", "third"]
    assert {wait.event_name for wait in await rows.waits()} == {"one", "two"}
    await run.durable.emit_event("two", 2)

    async def second_waits_no_more() -> bool:
        return [wait.event_name for wait in await rows.waits()] == ["one"] and "second" in tally

    await eventually(second_waits_no_more)
    await rows.until("sleeping")
    await run.durable.emit_event("one", 1)
    assert (await run.wait(spawned)).output == [1, 2, "third"]
    assert [entry for entry in tally if entry != "entered"] == ["first", "third", "second"]


async def test_error_of_one_branch_while_another_waits_fails_the_attempt(run: Runner, tally: Tally):
    async def fail() -> None:
        raise ConnectionError

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> None:
        tally.add("entered")
        await asyncio.gather(ctx.await_event("never"), ctx.step("fail", fail))

    assert (await run.failure(work)).name == "ConnectionError"
    assert tally == ["entered"] * 2


async def test_branches_that_wait_for_each_other_do_not_keep_the_run(run: Runner):
    """Locks, events and queues between branches are no work: the run suspends although some branches wait for those."""

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        lock, ready, items = asyncio.Lock(), asyncio.Event(), asyncio.Queue[int]()

        async def holder() -> Any:
            async with lock:
                found = await ctx.await_event("go")
            ready.set()
            await items.put(3)
            return found

        async def locked() -> int:
            async with lock:
                return 1

        async def told() -> int:
            await ready.wait()
            return 2

        return await asyncio.gather(holder(), locked(), told(), items.get())

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping", within=5)
    await run.durable.emit_event("go", 0)
    assert (await run.wait(spawned)).output == [0, 1, 2, 3]


async def test_cancelled_task_is_interrupted_at_once_and_may_clean_up(run: Runner, tally: Tally):
    async def step() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            tally.add("step cancelled")
            raise

    @task
    async def work(ctx: TaskContext) -> None:
        try:
            await ctx.step("long", step)
        except Exception:  # noqa: BLE001
            tally.add("caught as an error")
        finally:
            tally.add("finally")

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("running")
    await asyncio.sleep(0.05)
    started = time.monotonic()
    assert await run.durable.cancel_task(spawned) == "cancelled"
    await eventually(lambda: tally == ["step cancelled", "finally"])
    assert time.monotonic() - started < 4
    rows = Rows(run.durable, spawned)
    assert [row.state for row in await rows.runs()] == ["cancelled"]
    assert await rows.checkpoints() == []


async def test_cancelled_task_that_goes_on_regardless_records_nothing(run: Runner, tally: Tally):
    release = asyncio.Event()

    async def step(name: str) -> str:
        tally.add(name)
        return name

    async def transaction(session: Any) -> None:
        tally.add("transaction")

    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        tally.add("child")

    @task
    async def work(ctx: TaskContext) -> str:
        await release.wait()
        for call in (
            lambda: ctx.step("late", step, "late"),
            lambda: ctx.transaction("late", transaction),
            lambda: ctx.spawn("late", child),
            lambda: ctx.emit_event("late"),
            lambda: ctx.sleep_for("late", 1),
        ):
            try:
                await call()
            except BaseException as error:  # noqa: BLE001
                tally.add(isinstance(error, ControlFlow | asyncio.CancelledError))
        return "done"

    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    await rows.until("running")
    # Set first, so that the task does not learn of it before it writes.
    await run.durable.cancel_task(spawned)
    release.set()
    await eventually(lambda: len(tally) >= 5)
    assert "child" not in tally
    assert (await run.wait(spawned)).status == "cancelled"
    assert await rows.checkpoints() == []
    assert await rows.children() == []
    assert await run.durable.emit_event("late") is True


async def test_task_that_answers_its_cancellation_with_a_result_stays_cancelled(run: Runner):
    began = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> str:
        try:
            began.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "I refuse"
        return "done"

    spawned = await run.spawn(work)
    await began.wait()
    await run.durable.cancel_task(spawned)
    result = await run.wait(spawned)
    assert result.status == "cancelled"
    assert result.output is None
    await asyncio.sleep(0.2)
    assert (await Rows(run.durable, spawned).task()).state == "cancelled"


async def test_run_that_was_taken_over_is_stopped_and_can_write_nothing(run: Runner, tally: Tally):
    async def step(name: str) -> str:
        tally.add(name)
        return name

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        if ctx.attempt == 1:
            try:
                at_work.set()
                await taken_over.wait()
                return await ctx.step("stale", step, "stale")
            except Exception:  # noqa: BLE001
                tally.add("caught as an error")
            except BaseException as error:
                tally.add(type(error).__name__)
                raise
        return await ctx.step("fresh", step, "fresh")

    at_work, taken_over = asyncio.Event(), asyncio.Event()
    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    await at_work.wait()
    await rows.take_over()
    taken_over.set()
    assert (await run.wait(spawned)).output == "fresh"
    # It may have been told before the step was refused.
    await eventually(lambda: "LeaseLost" in tally or "CancelledError" in tally)
    assert "caught as an error" not in tally
    assert [row.name for row in await rows.checkpoints()] == ["fresh"]
    assert (await rows.task()).failures == 0
    assert (await rows.task()).attempt == 2


async def test_task_that_cancels_itself_has_failed(run: Runner):
    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> None:
        raise asyncio.CancelledError

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).error.name == "CancelledError"
    assert len(await Rows(run.durable, spawned).runs()) == 2


async def test_suspended_run_holds_no_slot_while_others_work(engine: Any):
    async with Durable(engine) as durable, durable.worker(concurrency=1):
        run = Runner(durable)

        @durable.task
        async def waits(ctx: TaskContext) -> Any:
            return await ctx.await_event("go")

        @durable.task
        async def emits(ctx: TaskContext) -> bool:
            return await ctx.emit_event("go", 1)

        waiting = [await run.spawn(waits) for _ in range(5)]
        assert await run(emits) is True
        for each in waiting:
            assert (await run.wait(each)).output == 1


async def test_suspension_keeps_run_and_attempt_and_is_no_failure(run: Runner):
    seen: set[Any] = set()

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        seen.add((ctx.run_id, ctx.attempt))
        for _ in range(5):
            await ctx.sleep_for("nap", 0.02)

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert seen == {(spawned.run_id, 1)}
    row = await Rows(run.durable, spawned).task()
    assert (row.attempt, row.failures, row.lease_losses) == (1, 0, 0)


async def test_plain_task_unwinds_its_thread_at_a_suspension(run: Runner, tally: Tally):
    @task(max_attempts=1)
    def work(ctx: SyncTaskContext) -> str:
        threads.add(threading.current_thread())
        try:
            ctx.sleep_for("nap", 0.1)
        except Exception:  # noqa: BLE001
            tally.add("caught as an error")
        finally:
            tally.add("finally")
        return "done"

    threads: set[threading.Thread] = set()
    assert await run(work) == "done"
    assert tally == ["finally", "finally"]
    await eventually(lambda: not any(thread.is_alive() for thread in threads))


async def test_plain_task_that_is_cancelled_stops_at_its_next_call(run: Runner, tally: Tally):
    began, release = threading.Event(), threading.Event()

    @task
    def work(ctx: SyncTaskContext) -> None:
        began.set()
        release.wait(20)
        try:
            ctx.step("late", lambda: tally.add("late"))
        except Exception:  # noqa: BLE001
            tally.add("caught as an error")
        except BaseException as error:
            tally.add(type(error).__name__)
            raise

    spawned = await run.spawn(work)
    await asyncio.to_thread(began.wait)
    await run.durable.cancel_task(spawned)
    await asyncio.sleep(0.1)
    release.set()
    await eventually(lambda: tally == ["TaskCancelled"])
    assert (await run.wait(spawned)).status == "cancelled"
    assert await Rows(run.durable, spawned).checkpoints() == []


async def test_task_that_is_put_back_while_its_cancelled_code_still_unwinds_is_not_stopped_with_that(
    run: Runner, tally: Tally
):
    """Its worker holds the task twice then, and nobody else would ever run what it stops by mistake."""
    release, go_on = threading.Event(), threading.Event()

    @task
    def work(ctx: SyncTaskContext) -> int:
        tally.add(ctx.attempt)
        (release if ctx.attempt == 1 else go_on).wait(20)
        ctx.heartbeat()
        return ctx.attempt

    @task
    async def other(ctx: TaskContext) -> None:
        try:
            tally.add("other")
            await asyncio.sleep(60)
        finally:
            tally.add("stopped")

    spawned = await run.spawn(work)
    await eventually(lambda: tally == [1])
    await run.durable.cancel_task(spawned)
    await run.durable.retry_task(spawned)
    await eventually(lambda: tally == [1, 2])
    another = await run.spawn(other)
    await eventually(lambda: tally == [1, 2, "other"])
    # The worker looks which of its runs are gone.
    await run.durable.cancel_task(another)
    await eventually(lambda: tally == [1, 2, "other", "stopped"])
    go_on.set()
    try:
        assert (await run.wait(spawned)).output == 2
    finally:
        release.set()


async def test_timeout_of_an_event_is_not_raised_in_a_run_that_is_suspended(run: Runner, tally: Tally):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        try:
            await ctx.await_event("never", timeout=0.3)
        except TaskTimeout:
            tally.add("timeout")
            if ctx.attempt == 1 and len(tally) == 1:
                await ctx.sleep_for("nap", 0.05)
            else:
                await ctx.sleep_for("nap", 0.05)
            return "done"
        return "came"

    assert await run(work) == "done"
    assert tally == ["timeout"] * 2


async def test_replay_after_a_crash_finds_the_waits_of_all_branches(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        async def branch(number: int) -> Any:
            await ctx.sleep_for("nap", 0.05 * number)
            return await ctx.await_event(f"event-{number}")

        found = await asyncio.gather(*(branch(number) for number in range(3)))
        if ctx.attempt == 1:
            raise Crash
        return found

    spawned = await run.spawn(work)

    async def all_wait() -> bool:
        return len(await Rows(run.durable, spawned).waits()) == 3

    await eventually(all_wait)
    for number in range(3):
        await run.durable.emit_event(f"event-{number}", number)
    assert (await run.wait(spawned)).output == [0, 1, 2]
