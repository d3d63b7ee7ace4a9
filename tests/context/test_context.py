"""What a context tells, draws and reports: the same in every attempt where it has to be."""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

import durable_sa
from durable_sa import Durable, InvalidState, SyncTaskContext, TaskContext, TaskHandle, current_context, step, task
from durable_sa.signals import ControlFlow
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


async def test_it_tells_who_runs(run: Runner):
    await run.durable.create_queue("other")
    seen: list[Any] = []

    @task("named")
    async def work(ctx: TaskContext) -> None:
        seen.append((ctx.task_id, ctx.run_id, ctx.attempt, ctx.task_name, ctx.queue_name))
        if ctx.attempt == 1:
            raise Crash

    async with run.durable.worker(queue_names=["other"]):
        spawned = await run.spawn(work, queue_name="other")
        await run.wait(spawned)
    first, second = seen
    assert first == (spawned.task_id, spawned.run_id, 1, "named", "other")
    assert second[0] == spawned.task_id
    assert second[1] != spawned.run_id
    assert second[2:] == (2, "named", "other")
    assert [row.run_id for row in await Rows(run.durable, spawned).runs()] == [first[1], second[1]]


async def test_headers_are_those_of_the_spawn(run: Runner):
    @task
    async def work(ctx: TaskContext) -> Any:
        return dict(ctx.headers)

    assert await run(work) == {}
    assert await run(work, headers={"tenant": "a", "trace": {"id": [1, None]}}) == {
        "tenant": "a",
        "trace": {"id": [1, None]},
    }


async def test_state_is_the_clients_or_what_the_lifespan_yields(engine: Any, tally: Tally):
    @task
    async def work(ctx: TaskContext[Any]) -> str:
        return type(ctx.state).__name__

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[Tally]:
        tally.add("begins")
        yield tally
        tally.add("ends")

    async with Durable(engine, tasks=[work]) as durable, durable.worker():
        assert await Runner(durable)(work) == "NoneType"
    async with Durable(engine, tasks=[work], state=datetime.now(UTC)) as durable, durable.worker():
        assert await Runner(durable)(work) == "datetime"
    async with Durable(engine, tasks=[work], lifespan=lifespan) as durable, durable.worker():
        assert await Runner(durable)(work) == "Tally"
        assert await Runner(durable)(work) == "Tally"
        assert tally == ["begins"]
    assert tally == ["begins", "ends"]


async def test_what_is_drawn_is_the_same_in_every_attempt_and_another_each_time(run: Runner):
    seen: list[list[Any]] = []

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append(
            [await ctx.rand(), await ctx.rand(), await ctx.now(), await ctx.now(), await ctx.uuid7(), await ctx.uuid7()]
        )
        await ctx.sleep_for("nap", 0.05)
        if ctx.attempt == 1:
            raise Crash

    async with run.durable.engine.connect() as connection:
        before = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
    await run(work)
    assert len(seen) == 3
    assert all(each == seen[0] for each in seen)
    rand, other_rand, now, other_now, drawn, other_drawn = seen[0]
    assert rand != other_rand
    assert 0 <= rand < 1
    assert now.utcoffset() == timedelta(0)
    assert timedelta(seconds=-0.5) < now - before < timedelta(seconds=10)
    assert other_now > now
    assert isinstance(drawn, uuid.UUID)
    assert drawn.version == 7
    assert drawn != other_drawn


async def test_branches_draw_for_themselves(run: Runner):
    seen: list[Any] = []

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append(await asyncio.gather(*(ctx.rand() for _ in range(5))))
        if ctx.attempt == 1:
            raise Crash

    await run(work)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 5


async def test_plain_tasks_draw_as_well(run: Runner):
    seen: list[Any] = []

    @task
    def work(ctx: SyncTaskContext) -> None:
        seen.append([ctx.rand(), ctx.now(), ctx.uuid7()])
        if ctx.attempt == 1:
            raise Crash

    await run(work)
    assert seen[0] == seen[1]


async def test_current_context_is_there_in_all_that_a_task_calls(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[bool]:
        async def below() -> bool:
            return current_context() is ctx

        def in_a_thread() -> bool:
            return current_context() is ctx

        async with asyncio.TaskGroup() as group:
            grouped = group.create_task(below())
        return [
            await below(),
            grouped.result(),
            await ctx.step("below", below),
            await ctx.step("thread", in_a_thread),
            await asyncio.to_thread(in_a_thread),
        ]

    with pytest.raises(RuntimeError, match="no task runs"):
        current_context()
    assert await run(work) == [True] * 5


async def test_tasks_side_by_side_have_contexts_of_their_own(run: Runner):
    @task
    async def work(ctx: TaskContext, number: int) -> bool:
        for _ in range(5):
            await asyncio.sleep(0.001)
            if current_context() is not ctx:
                return False
        return True

    spawned = [await run.spawn(work, number) for number in range(20)]
    assert all([(await run.wait(each)).output for each in spawned])


async def test_heartbeat_of_a_run_that_goes_on_does_nothing(run: Runner):
    @task
    async def work(ctx: TaskContext) -> str:
        await ctx.heartbeat()
        await ctx.heartbeat(timedelta(seconds=5))
        await durable_sa.heartbeat()
        return "done"

    @task
    def plain(ctx: SyncTaskContext) -> str:
        ctx.heartbeat()
        ctx.heartbeat(5)
        durable_sa.heartbeat()
        return "done"

    await durable_sa.heartbeat()
    durable_sa.heartbeat()
    assert await run(work) == "done"
    assert await run(plain) == "done"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["context", "module", "step"])
@pytest.mark.parametrize("why", ["cancelled", "lost"])
async def test_heartbeat_raises_at_once_if_the_task_was_cancelled_or_lost(
    run: Runner, tally: Tally, where: str, why: str, monkeypatch: pytest.MonkeyPatch
):
    async def nothing() -> None: ...

    # The worker would find out by itself sooner or later.
    for worker in run.durable._workers:
        monkeypatch.setattr(worker._executor, "check", nothing)

    @task
    async def work(ctx: TaskContext) -> None:
        if ctx.attempt > 1:
            return
        await ready.wait()

        async def beat() -> None:
            if why == "cancelled":
                await run.durable.cancel_task(ctx.task_id)
            else:
                await Rows(run.durable, ctx.task_id).take_over()
            try:
                await (ctx.heartbeat() if where == "context" else durable_sa.heartbeat())
            except Exception:  # noqa: BLE001
                tally.add("caught as an error")
            except ControlFlow as error:
                tally.add(type(error).__name__)
                raise
            tally.add("went on")

        await (ctx.step("beat", beat) if where == "step" else beat())

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    ready.set()
    result = await run.wait(spawned)
    await eventually(lambda: bool(tally))
    if why == "cancelled":
        assert result.status == "cancelled"
        assert tally in (["TaskCancelled"], [])
    else:
        assert tally == ["LeaseLost"]
        assert (await Rows(run.durable, spawned).task()).failures == 0


@pytest.mark.parametrize(
    "where", ["plain task", "plain step of an asynchronous task", "step with a timeout", "async step"]
)
async def test_heartbeat_ends_code_in_threads_once_the_task_is_cancelled(run: Runner, tally: Tally, where: str):
    began = threading.Event()

    def beat_on() -> None:
        began.set()
        deadline = time.monotonic() + 15
        try:
            while time.monotonic() < deadline:
                durable_sa.heartbeat()
                time.sleep(0.01)
        except ControlFlow as error:
            tally.add(type(error).__name__)
            raise
        tally.add("went on")

    async def beat_on_the_loop() -> None:
        began.set()
        try:
            while True:
                await durable_sa.heartbeat()
                await asyncio.sleep(0.01)
        except BaseException as error:
            tally.add(type(error).__name__)
            raise

    limited = step("limited", timeout=20)(beat_on)

    @task("work")
    def plain(ctx: SyncTaskContext) -> None:
        if where == "plain task":
            beat_on()
        elif where == "async step":
            ctx.step("beat", beat_on_the_loop)
        else:
            limited()

    @task("work")
    async def asynchronous(ctx: TaskContext) -> None:
        await ctx.step("beat", beat_on)

    spawned = await run.spawn(asynchronous if where == "plain step of an asynchronous task" else plain)
    await asyncio.to_thread(began.wait)
    await run.durable.cancel_task(spawned)
    await eventually(lambda: bool(tally), within=5)
    assert tally in (["TaskCancelled"], ["CancelledError"])
    assert (await run.wait(spawned)).status == "cancelled"


async def test_heartbeat_refuses_a_duration_that_is_none(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.heartbeat(-1)

    assert (await run.failure(work)).name == "InvalidConfiguration"


CALLS: dict[str, Callable[[TaskContext], Any]] = {
    "step": lambda ctx: ctx.step("step", asyncio.sleep, 0),
    "transaction": lambda ctx: ctx.transaction("transaction", asyncio.sleep),
    "sleep": lambda ctx: ctx.sleep_for("sleep", 3600),
    "event": lambda ctx: ctx.await_event("event", timeout=3600),
    "emit": lambda ctx: ctx.emit_event("emit"),
    "spawn": lambda ctx: ctx.spawn_by_name("spawn", "nobody"),
    "join": lambda ctx: ctx.join(TaskHandle(ctx.task_id)),
    "now": lambda ctx: ctx.now(),
    "rand": lambda ctx: ctx.rand(),
}


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "running"])
@pytest.mark.parametrize("call", CALLS)
async def test_context_of_another_run_is_refused_and_nothing_is_written_there(run: Runner, call: str, ended: bool):
    contexts: list[TaskContext] = []
    release = asyncio.Event()

    @task
    async def owner(ctx: TaskContext) -> None:
        contexts.append(ctx)
        await release.wait()

    @task
    async def stranger(ctx: TaskContext) -> None:
        try:
            await CALLS[call](contexts[0])
        finally:
            release.set()

    spawned = await run.spawn(owner)
    await eventually(lambda: bool(contexts))
    if ended:
        release.set()
        await run.wait(spawned)
    error = await run.failure(stranger)
    assert error.name == "InvalidState"
    assert str(spawned.task_id) in error.message
    assert (await run.wait(spawned)).status == "completed"
    assert await Rows(run.durable, spawned).checkpoints() == []
    with pytest.raises(InvalidState, match="after the end of its run"):
        await CALLS[call](contexts[0])
    with pytest.raises(InvalidState, match="after the end of its run"):
        await contexts[0].heartbeat()


async def test_event_loop_of_a_steps_own_gets_plain_functions_and_cannot_use_the_context(run: Runner, tally: Tally):
    @step
    async def double(number: int) -> int:
        return 2 * number

    async def main(ctx: TaskContext) -> int:
        await durable_sa.heartbeat()
        await ctx.heartbeat()
        for call in ("step", "now", "rand", "emit"):
            with pytest.raises(InvalidState, match="outside of its run"):
                await CALLS[call](ctx)
        return await double(4)

    def own_loop() -> int:
        return asyncio.run(main(current_context()))

    @task
    async def work(ctx: TaskContext) -> int:
        found = await ctx.step("own loop", own_loop)
        await ctx.heartbeat()
        return found

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == 8
    assert [row.name for row in await Rows(run.durable, spawned).checkpoints()] == ["own loop"]
