"""A worker that ends when there is nothing to do."""

import asyncio
from datetime import timedelta

import pytest

from durable_sa import Durable, RetryStrategy, TaskContext, TaskStatus
from durable_sa.testing import run_until_idle


async def status(durable: Durable, spawned: object) -> TaskStatus:
    result = await durable.get_task_result(spawned)  # type: ignore[call-overload]
    assert result is not None
    return result.status  # type: ignore[no-any-return]


async def test_it_runs_all_there_is_and_leaves_what_is_due_later(durable: Durable) -> None:
    @durable.task
    async def leaf(ctx: TaskContext, number: int) -> int:
        await ctx.emit_event(f"leaf {number}")
        return number

    @durable.task
    async def tree(ctx: TaskContext) -> int:
        children = [await ctx.spawn("leaf", leaf, number) for number in range(5)]
        await ctx.await_event("leaf 3")
        return sum(await asyncio.gather(*(ctx.join(child) for child in children)))

    @durable.task
    async def napper(ctx: TaskContext) -> None:
        await ctx.sleep_for("nap", 3600)

    @durable.task(max_attempts=3, retry_strategy=RetryStrategy.fixed(0))
    async def flaky(ctx: TaskContext) -> int:
        if ctx.attempt < 3:
            raise ConnectionError
        return ctx.attempt

    spawned = [
        await durable.spawn(tree),
        await durable.spawn(flaky),
        await durable.spawn(napper),
        await durable.spawn(leaf, 9, delay=timedelta(hours=1)),
        await durable.spawn_by_name("unknown here", unchecked=True),
    ]
    await run_until_idle(durable)
    expected = ["completed", "completed", "sleeping", "pending", "pending"]
    assert [await status(durable, item) for item in spawned] == expected
    assert not durable.workers


@pytest.mark.slow
async def test_descendants_of_what_failed_are_cancelled(durable: Durable) -> None:
    @durable.task
    async def sleeper(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", 3600)

    @durable.task(max_attempts=1)
    async def parent(ctx: TaskContext) -> None:
        ids.append(await ctx.spawn("child", sleeper))
        await ctx.sleep_for("a moment, for the child to fall asleep", 0.2)
        raise ConnectionError

    ids: list[object] = []
    spawned = await durable.spawn(parent)
    await run_until_idle(durable)
    while await status(durable, spawned) is not TaskStatus.FAILED:
        await asyncio.sleep(0.05)
        await run_until_idle(durable)
    assert await status(durable, ids[0]) is TaskStatus.CANCELLED


async def test_events_are_delivered_also_those_that_nobody_awaits(durable: Durable) -> None:
    @durable.task
    async def waiter(ctx: TaskContext) -> str:
        return await ctx.await_event("go", type=str)

    spawned = await durable.spawn(waiter)
    await run_until_idle(durable)
    assert await status(durable, spawned) is TaskStatus.SLEEPING
    await durable.emit_event("go", "gone")
    await durable.emit_event("unheard")
    await run_until_idle(durable)
    assert await status(durable, spawned) is TaskStatus.COMPLETED
    assert await durable.cleanup_events(0) == 2


async def test_it_serves_the_queues_it_is_given(durable: Durable) -> None:
    @durable.task
    async def noop(ctx: TaskContext) -> None: ...

    await durable.create_queue("other")
    here, there = await durable.spawn(noop), await durable.spawn(noop, queue_name="other")
    await run_until_idle(durable, queue_names=["other"])
    assert [await status(durable, here), await status(durable, there)] == ["pending", "completed"]
    await durable.pause_queue()
    await run_until_idle(durable)
    assert await status(durable, here) is TaskStatus.PENDING


@pytest.mark.slow
async def test_what_does_not_come_to_an_end_is_named_and_given_back(durable: Durable) -> None:
    @durable.task
    async def endless(ctx: TaskContext) -> None:
        await asyncio.Event().wait()

    spawned = await durable.spawn(endless)
    began = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError, match=rf"'endless' \(task {spawned.task_id}\) is running"):
        await run_until_idle(durable, timeout=0.3)
    assert asyncio.get_running_loop().time() - began < 10
    assert await status(durable, spawned) is TaskStatus.PENDING


async def test_it_serves_all_queues_unless_told_which(durable: Durable) -> None:
    @durable.task
    async def nothing(ctx: TaskContext) -> str:
        return ctx.queue_name

    await durable.create_queue("east")
    await durable.create_queue("west")
    here, east, west = [await durable.spawn(nothing, queue_name=name) for name in ("default", "east", "west")]
    await run_until_idle(durable, ["east"])
    assert [await status(durable, each) for each in (here, east, west)] == ["pending", "completed", "pending"]
    await run_until_idle(durable, queue_names=["west"])
    assert await status(durable, here) == "pending"
    await run_until_idle(durable)
    assert await status(durable, here) == await status(durable, west) == "completed"


async def test_declared_schedules_are_stored(durable: Durable) -> None:
    @durable.task(schedule="0 3 * * *")
    async def nightly(ctx: TaskContext) -> None:
        pass

    for _ in range(10):
        await run_until_idle(durable)
        (found,) = await durable.list_schedules()
        await durable.delete_schedule(found.name)
