"""Cancelling tasks with all their descendants, and putting back what has ended badly."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    CancellationPolicy,
    ChildFailed,
    Durable,
    InvalidConfiguration,
    InvalidState,
    RetryStrategy,
    TaskContext,
    TaskHandle,
    TaskNotFound,
    TaskRow,
    TaskStatus,
    UserError,
    task,
)
from durable_sa.ids import new_id
from durable_sa.models import Run
from tests.client.support import Application, Gate, count, read, with_some_callers
from tests.support import eventually


@task
async def ship(ctx: Any) -> None: ...


async def state(engine: AsyncEngine, task_id: uuid.UUID) -> str:
    return str((await read(engine, task_id)).state)


async def runs(engine: AsyncEngine, task_id: uuid.UUID) -> list[tuple[int, str]]:
    async with engine.connect() as connection:
        found = sa.select(Run.attempt, Run.state).where(Run.task_id == task_id).order_by(Run.attempt)
        return [(row.attempt, row.state) for row in await connection.execute(found)]


async def test_a_pending_task_is_cancelled_and_never_starts(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(ship)
    now = await durable.spawn(ship)
    later = await durable.spawn(ship, delay=3600)
    named: Any
    for named in (now.task_id, TaskHandle(later.task_id)):
        assert await durable.cancel_task(named) is TaskStatus.CANCELLED
        assert await durable.cancel_task(named) is TaskStatus.CANCELLED
    row = await read(engine, now.task_id)
    assert (row.state, row.outcome, row.attempt, row.first_started_at) == ("cancelled", "cancelled", 0, None)
    assert row.finished_at >= row.created_at
    assert await runs(engine, now.task_id) == []
    assert await durable.count_unclaimed_ready_tasks() == 0
    result = await durable.wait_for_result(now)
    assert (result.status, result.output, result.error) == (TaskStatus.CANCELLED, None, None)
    other = await durable.spawn(ship)
    async with durable.worker():
        await durable.wait_for_result(other, timeout=20)
    assert await state(engine, now.task_id) == "cancelled"


async def test_a_running_task_is_interrupted_and_writes_nothing_more(durable: Durable, engine: AsyncEngine) -> None:
    entered, left = asyncio.Event(), asyncio.Event()

    @durable.task("run")
    async def run(ctx: TaskContext) -> None:
        await ctx.step("before", lambda: 1)
        entered.set()
        try:
            await asyncio.sleep(3600)
        finally:
            left.set()
        await ctx.step("after", lambda: 2)

    async with durable.worker():
        spawned = await durable.spawn(run)
        await asyncio.wait_for(entered.wait(), 20)
        assert await durable.cancel_task(spawned) is TaskStatus.CANCELLED
        await asyncio.wait_for(left.wait(), 20)
    assert await runs(engine, spawned.task_id) == [(1, "cancelled")]
    assert await count(engine, "durable.checkpoints") == 1
    assert await state(engine, spawned.task_id) == "cancelled"


async def test_sleeping_and_waiting_tasks_are_cancelled_with_their_waits(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("sleep")
    async def sleep(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", 3600)

    @durable.task("listen")
    async def listen(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    async with durable.worker(concurrency=2):
        spawned = [await durable.spawn(sleep), await durable.spawn(listen)]
        for each in spawned:
            await eventually(partial(is_in, engine, each.task_id, "sleeping"))
            assert await durable.cancel_task(each) is TaskStatus.CANCELLED
            assert await runs(engine, each.task_id) == [(1, "cancelled")]
        assert await count(engine, "durable.waits") == 0
        await durable.emit_event("never")
    assert [await state(engine, each.task_id) for each in spawned] == ["cancelled", "cancelled"]


async def test_a_task_between_two_attempts_keeps_the_history_of_the_first(
    durable: Durable, engine: AsyncEngine
) -> None:
    @durable.task("fail", retry_strategy=RetryStrategy.fixed(3600))
    async def fail(ctx: Any) -> None:
        raise ValueError("broken")

    async with durable.worker():
        spawned = await durable.spawn(fail)
        await eventually(lambda: count(engine, "durable.runs"))
        assert await durable.cancel_task(spawned) is TaskStatus.CANCELLED
    assert await runs(engine, spawned.task_id) == [(1, "failed")]
    async with engine.connect() as connection:
        error: Any = await connection.scalar(sa.select(Run.error).where(Run.task_id == spawned.task_id))
    assert (error["name"], error["message"]) == ("ValueError", "broken")


async def test_what_has_ended_stays_as_it_ended(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("work")
    async def work(ctx: Any, params: bool) -> int:
        if not params:
            raise UserError("no")
        return 5

    async with durable.worker(concurrency=2):
        done, failed = await durable.spawn(work, True), await durable.spawn(work, False)
        for each in (done, failed):
            await durable.wait_for_result(each, timeout=20)
    before = [await read(engine, each.task_id) for each in (done, failed)]
    assert await durable.cancel_task(done) is TaskStatus.COMPLETED
    assert await durable.cancel_task(failed) is TaskStatus.FAILED
    assert [await read(engine, each.task_id) for each in (done, failed)] == before


async def test_an_unknown_task_is_named(durable: Durable) -> None:
    unknown = uuid.uuid4()
    with pytest.raises(TaskNotFound, match=f"no task {unknown}"):
        await durable.cancel_task(unknown)
    with pytest.raises(TaskNotFound, match=f"no task {unknown}"):
        await durable.retry_task(unknown)
    for wrong in ("somewhere", 5, None):
        with pytest.raises(TypeError, match="UUID, a SpawnResult or a TaskHandle"):
            await durable.cancel_task(wrong)  # type: ignore[arg-type]


async def is_in(engine: AsyncEngine, task_id: uuid.UUID, wanted: str) -> bool:
    return await state(engine, task_id) == wanted


async def family(engine: AsyncEngine, *generations: int, completed: int | None = None) -> list[list[uuid.UUID]]:
    """A tree of pending tasks, so many children to each task of the generation before; one generation has completed."""
    tree = [[new_id()]]
    parents: dict[uuid.UUID, uuid.UUID] = {}
    for children in generations:
        born = {new_id(): parent for parent in tree[-1] for _ in range(children)}
        parents |= born
        tree.append(list(born))
    now = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for depth, generation in enumerate(tree):
        outcome = "completed" if depth == completed else None
        rows += [
            {
                "task_id": task_id,
                "run_id": new_id(),
                "queue_name": "default",
                "task_name": "ship",
                "max_attempts": 1,
                "retry_kind": "none",
                "retry_base_delay": 0,
                "retry_factor": 1,
                "retry_max_backoff": 0,
                "retry_jitter": 0,
                "available_at": now,
                "parent_task_id": parents.get(task_id),
                "state": outcome or "pending",
                "outcome": outcome,
                "finished_at": now if outcome else None,
            }
            for task_id in generation
        ]
    async with engine.begin() as connection:
        await connection.execute(sa.insert(TaskRow), rows)
    return tree


async def states(engine: AsyncEngine) -> dict[uuid.UUID, str]:
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(TaskRow.task_id, TaskRow.state))
        return {row.task_id: row.state for row in rows}


async def test_descendants_are_cancelled_to_the_last(durable: Durable, engine: AsyncEngine) -> None:
    tree = await family(engine, 3, 40, 10)
    others = await family(engine, 2)
    assert await durable.cancel_task(tree[1][0]) is TaskStatus.CANCELLED
    found = await states(engine)
    inside = {tree[1][0], *tree[2][:40], *tree[3][:400]}
    assert {task_id for task_id, stands in found.items() if stands == "cancelled"} == inside
    assert await durable.cancel_task(tree[0][0]) is TaskStatus.CANCELLED
    found = await states(engine)
    assert {task_id for task_id, stands in found.items() if stands == "pending"} == {others[0][0], *others[1]}


async def test_descendants_below_a_completed_child_are_cancelled_as_well(durable: Durable, engine: AsyncEngine) -> None:
    tree = await family(engine, 2, 2, completed=1)
    await durable.cancel_task(tree[0][0])
    found = await states(engine)
    assert [found[task_id] for task_id in tree[1]] == ["completed"] * 2
    assert [found[task_id] for task_id in tree[2]] == ["cancelled"] * 4


async def test_a_chain_of_fifty_is_cancelled_and_put_back(durable: Durable, engine: AsyncEngine) -> None:
    tree = await family(engine, *[1] * 50)
    await durable.cancel_task(tree[0][0])
    assert set((await states(engine)).values()) == {"cancelled"}
    await durable.retry_task(tree[0][0])
    assert set((await states(engine)).values()) == {"pending"}


@with_some_callers
async def test_a_cancel_that_is_rolled_back_has_not_happened(
    application: Application, durable: Durable, engine: AsyncEngine
) -> None:
    tree = await family(engine, 3)
    async with application.caller() as caller:
        assert await caller.call(durable.cancel_task_with, tree[0][0]) is TaskStatus.CANCELLED
        assert set((await states(engine)).values()) == {"pending"}
        await caller.rollback()
        assert set((await states(engine)).values()) == {"pending"}
        assert await caller.call(durable.cancel_task_with, tree[0][0]) is TaskStatus.CANCELLED
        await caller.commit()
    assert set((await states(engine)).values()) == {"cancelled"}


@pytest.mark.slow
async def test_a_cancelled_child_wakes_the_parent_that_waits_for_it(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("child")
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @durable.task("parent")
    async def parent(ctx: TaskContext) -> str:
        handle = await ctx.spawn("child", child)
        try:
            await ctx.join(handle)
        except Exception as error:  # noqa: BLE001
            return type(error).__name__
        return "joined"

    async with durable.worker(concurrency=2):
        spawned = await durable.spawn(parent)
        await eventually(lambda: is_in(engine, spawned.task_id, "sleeping"))
        async with engine.connect() as connection:
            child_id = await connection.scalar(sa.select(TaskRow.task_id).where(TaskRow.parent_task_id.is_not(None)))
        assert child_id is not None
        async with engine.begin() as connection:
            await durable.cancel_task_with(connection, TaskHandle(child_id))
        assert (await durable.wait_for_result(spawned, timeout=20)).output == "ChildCancelled"


async def test_many_cancels_at_once_agree(durable: Durable, engine: AsyncEngine) -> None:
    tree = await family(engine, 4, 4)
    everyone = [task_id for generation in tree for task_id in generation]
    ends = await asyncio.gather(*(durable.cancel_task(task_id) for task_id in [*everyone, *reversed(everyone)]))
    assert set(ends) == {TaskStatus.CANCELLED}
    assert set((await states(engine)).values()) == {"cancelled"}


@pytest.mark.slow
async def test_cancelling_and_completing_at_once_gives_one_end(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(ship)
    async with durable.worker(concurrency=20):
        spawned = await durable.spawn_many([(ship, None)] * 300)
        said = await asyncio.gather(*(durable.cancel_task(each) for each in spawned))
        ends = [(await durable.wait_for_result(each, timeout=20)).status for each in spawned]
    assert said == ends
    async with engine.connect() as connection:
        ended = sa.select(Run.task_id, sa.func.count()).group_by(Run.task_id).having(sa.func.count() > 1)
        assert (await connection.execute(ended)).all() == []
        inconsistent = (
            sa.select(TaskRow.task_id).join(Run, Run.task_id == TaskRow.task_id).where(Run.state != TaskRow.state)
        )
        assert (await connection.execute(inconsistent)).all() == []


@pytest.mark.slow
async def test_a_failed_task_runs_again_from_its_checkpoints_with_fresh_counts(
    durable: Durable, engine: AsyncEngine
) -> None:
    calls: list[str] = []
    healed = False

    @durable.task("work", max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
    async def work(ctx: TaskContext) -> int:
        await ctx.step("once", calls.append, "once")
        calls.append("body")
        if not healed:
            raise ValueError("broken")
        return ctx.attempt

    async with durable.worker():
        spawned = await durable.spawn(work)
        failed = await durable.wait_for_result(spawned, timeout=20)
        assert failed.status is TaskStatus.FAILED
        assert failed.error is not None
        assert (failed.error.name, failed.error.message) == ("ValueError", "broken")
        assert calls == ["once", "body", "body"]
        assert await durable.retry_task(spawned) is TaskStatus.PENDING
        failed = await durable.wait_for_result(spawned, timeout=20)
        assert failed.status is TaskStatus.FAILED
        assert calls == ["once", *["body"] * 4]
        healed = True
        await durable.retry_task(spawned)
        done = await durable.wait_for_result(spawned, timeout=20)
    assert (done.status, done.output, done.error) == (TaskStatus.COMPLETED, 5, None)
    assert calls == ["once", *["body"] * 5]
    assert await runs(engine, spawned.task_id) == [*((n, "failed") for n in range(1, 5)), (5, "completed")]


@pytest.mark.slow
async def test_a_retried_tasks_row_is_as_new(durable: Durable, engine: AsyncEngine) -> None:
    policy = CancellationPolicy(max_pending_time=3600, max_running_time=7200)

    @durable.task("fail", max_attempts=1, cancellation=policy)
    async def fail(ctx: Any) -> None:
        raise UserError("no")

    async with durable.worker():
        spawned = await durable.spawn(fail)
        await durable.wait_for_result(spawned, timeout=20)
    before = await read(engine, spawned.task_id)
    assert before.first_started_at is not None
    await durable.retry_task(spawned, max_attempts=7)
    row = await read(engine, spawned.task_id)
    assert (row.state, row.outcome, row.failures, row.lease_losses, row.attempt) == ("pending", None, 0, 0, 1)
    assert row.finished_at is row.first_started_at is row.started_at is row.error is row.claimed_by is None
    assert (row.max_attempts, row.run_id == before.run_id, row.fence > before.fence) == (7, False, True)
    assert row.available_at > before.finished_at
    assert abs(row.cancel_at - row.available_at - timedelta(hours=1)) < timedelta(seconds=1)
    assert await durable.count_unclaimed_ready_tasks() == 1


@pytest.mark.slow
async def test_limits_on_time_count_anew_after_a_retry(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("slow", cancellation=CancellationPolicy(max_running_time=0.6))
    async def slow(ctx: TaskContext) -> None:
        await asyncio.sleep(3600 if ctx.attempt == 1 else 0.2)

    async with durable.worker():
        spawned = await durable.spawn(slow)
        cancelled = await durable.wait_for_result(spawned, timeout=20)
        assert cancelled.status is TaskStatus.CANCELLED
        assert cancelled.error is not None
        assert cancelled.error.message == "max_running_time was over"
        assert await runs(engine, spawned.task_id) == [(1, "cancelled")]
        await durable.retry_task(spawned)
        assert (await durable.wait_for_result(spawned, timeout=20)).status is TaskStatus.COMPLETED


async def test_only_what_ended_badly_is_retried(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(ship)
    pending = await durable.spawn(ship, delay=3600)
    with pytest.raises(InvalidState, match=f"Task {pending.task_id} is pending. Only failed and cancelled"):
        await durable.retry_task(pending)
    done = await durable.spawn(ship)
    async with durable.worker():
        await durable.wait_for_result(done, timeout=20)
    with pytest.raises(InvalidState, match="is completed"):
        await durable.retry_task(done)
    await durable.cancel_task(pending)
    for wrong in (0, -1, 2**31, 1.5, True):
        with pytest.raises(InvalidConfiguration, match="max_attempts"):
            await durable.retry_task(pending, max_attempts=wrong)  # type: ignore[arg-type]
    assert await state(engine, pending.task_id) == "cancelled"


async def test_a_retry_whose_commit_was_not_heard_of_is_no_error(
    durable: Durable, gate: Gate, engine: AsyncEngine
) -> None:
    (parent,), (child,) = await family(engine, 1)
    await durable.cancel_task(parent)
    async with Durable(gate.url) as client:
        await client.list_queues()
        gate.lose_reply_to = b"COMMIT"
        assert await client.retry_task(parent) is TaskStatus.PENDING
        assert gate.lose_reply_to is None
    assert await states(engine) == {parent: "pending", child: "pending"}
    with pytest.raises(InvalidState):
        await durable.retry_task(parent)


async def test_of_many_retries_at_once_one_counts(durable: Durable, engine: AsyncEngine) -> None:
    spawned = await durable.spawn(ship)
    await durable.cancel_task(spawned)
    ends = await asyncio.gather(*(durable.retry_task(spawned) for _ in range(10)), return_exceptions=True)
    assert ends.count(TaskStatus.PENDING) == 1
    assert sum(isinstance(end, InvalidState) for end in ends) == 9


async def test_a_retry_puts_back_what_the_cascade_cancelled_and_nothing_else(
    durable: Durable, engine: AsyncEngine
) -> None:
    tree = await family(engine, 3, 2)
    await durable.cancel_task(tree[1][0])
    await durable.cancel_task(tree[0][0])
    await durable.retry_task(tree[0][0])
    found = await states(engine)
    assert {task_id for task_id, stands in found.items() if stands == "cancelled"} == {tree[1][0], *tree[2][:2]}
    ids = set()
    for task_id in found:
        row = await read(engine, task_id)
        ids.add(row.run_id)
        assert row.cancelled_by == (tree[1][0] if task_id in tree[2][:2] else None)
    assert len(ids) == len(found)


@pytest.mark.slow
async def test_a_retried_parent_joins_its_child_again(durable: Durable, engine: AsyncEngine) -> None:
    """Whether the child was put back by hand before it, or by the same retry."""
    broken = True

    @durable.task("child", max_attempts=1)
    async def child(ctx: TaskContext) -> str:
        if broken:
            raise ValueError("broken")
        return "done"

    @durable.task("parent", max_attempts=1)
    async def parent(ctx: TaskContext) -> str:
        return await ctx.join(await ctx.spawn("child", child))

    async with durable.worker(concurrency=2):
        spawned = await durable.spawn(parent)
        failed = await durable.wait_for_result(spawned, timeout=20)
        assert failed.error is not None
        assert failed.error.name == ChildFailed.__name__
        async with engine.connect() as connection:
            child_id = await connection.scalar(sa.select(TaskRow.task_id).where(TaskRow.parent_task_id.is_not(None)))
        assert child_id is not None
        broken = False
        await durable.retry_task(child_id)
        assert (await durable.wait_for_result(child_id, timeout=20)).output == "done"
        await durable.retry_task(spawned)
        done = await durable.wait_for_result(spawned, timeout=20)
        assert (done.status, done.output) == (TaskStatus.COMPLETED, "done")
    assert await count(engine) == 2


async def test_a_retry_puts_the_children_back_that_made_a_task_fail_and_no_others(
    durable: Durable, engine: AsyncEngine
) -> None:
    broken, ran = True, list[str]()

    @durable.task("leaf", max_attempts=1)
    async def leaf(ctx: TaskContext, name: str) -> str:
        ran.append(name)
        if broken:
            raise ValueError(name)
        return name

    @durable.task("middle", max_attempts=1)
    async def middle(ctx: TaskContext) -> str:
        return await ctx.join(await ctx.spawn("leaf", leaf, "deep"))

    @durable.task("root", max_attempts=1)
    async def root(ctx: TaskContext) -> list[str]:
        handled = await ctx.spawn("handled", leaf, "handled")
        try:
            await ctx.join(handled)
        except ChildFailed:
            await ctx.step("compensate", lambda: None)
        one = await ctx.spawn("middle", middle)
        async with asyncio.TaskGroup() as group:
            joined = group.create_task(ctx.join(one))
        return [joined.result(), await ctx.join(await ctx.spawn("direct", leaf, "direct"))]

    async with durable.worker():
        spawned = await durable.spawn(root)
        failed = await durable.wait_for_result(spawned, timeout=20)
        assert failed.error is not None
        assert failed.error.name == "ExceptionGroup"
        broken = False
        await durable.retry_task(spawned)
        done = await durable.wait_for_result(spawned, timeout=20)
        assert (done.status, done.output) == (TaskStatus.COMPLETED, ["deep", "direct"])
    assert sorted(ran) == ["deep", "deep", "direct", "handled"]
    assert await count(engine) == 5


async def test_a_child_that_is_put_back_by_hand_outlives_its_cancelled_parent(
    durable: Durable, engine: AsyncEngine
) -> None:
    """Also the search for what a crash has left of a cascade passes it over, and only until its parent ends again."""
    tree = await family(engine, 3, 1)
    await durable.cancel_task(tree[0][0])
    await durable.retry_task(tree[1][0])
    back = {tree[1][0], tree[2][0]}
    # Two more are left as by a crash of the process that had cancelled their parent.
    async with engine.begin() as connection:
        left = {"state": "pending", "outcome": None, "finished_at": None, "cancelled_by": None}
        await connection.execute(sa.update(TaskRow).where(TaskRow.task_id.in_(tree[1][1:])).values(left))
    async with durable.worker() as worker:
        worker.maintenance.look_at_everything()
        await eventually(partial(all_are, engine, tree[1][1:], "cancelled"))
    found = await states(engine)
    assert {task_id for task_id, stands in found.items() if stands == "pending"} == back
    await durable.retry_task(tree[0][0])
    assert set((await states(engine)).values()) == {"pending"}
    await durable.cancel_task(tree[0][0])
    assert set((await states(engine)).values()) == {"cancelled"}


async def all_are(engine: AsyncEngine, task_ids: list[uuid.UUID], wanted: str) -> bool:
    found = await states(engine)
    return all(found[task_id] == wanted for task_id in task_ids)
