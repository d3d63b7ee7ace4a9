"""Subtasks: spawned once, joined with their typed result, ended with an unhappy parent."""

import asyncio
import logging
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from durable_sa import (
    ChildCancelled,
    ChildFailed,
    Durable,
    RetryStrategy,
    SyncTaskContext,
    TaskContext,
    TaskHandle,
    TaskNotFound,
    TaskRow,
    TaskStatus,
    TaskTimeout,
    UserError,
    task,
)
from tests.context.support import Crash, Rows, Runner, Tally, warnings
from tests.support import eventually


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    text: str
    certainty: float


@task
async def think(ctx: TaskContext, params: Question) -> Answer:
    return Answer(text=params.text.upper(), certainty=0.5)


@task
async def double(ctx: TaskContext, params: int) -> int:
    return params * 2


@pytest.fixture(autouse=True)
def children(durable: Durable) -> None:
    durable.register(think)
    durable.register(double)


async def test_join_gives_the_typed_result_in_every_attempt(run: Runner):
    seen: list[Any] = []

    @task
    async def work(ctx: TaskContext) -> None:
        handle = await ctx.spawn("think", think, Question(text="why"))
        seen.append(await ctx.join(handle))
        if ctx.attempt == 1:
            raise Crash

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert seen == [Answer(text="WHY", certainty=0.5)] * 2
    assert len(await Rows(run.durable, spawned).children()) == 1


async def test_child_is_one_task_on_the_parents_queue(run: Runner):
    await run.durable.create_queue("other")

    @task
    async def work(ctx: TaskContext) -> list[uuid.UUID]:
        handles = [
            await ctx.spawn("a", double, 1),
            await ctx.spawn("a", double, 2, queue_name=None),
            await ctx.spawn_by_name("b", "double", 3, priority=7, headers={"x": 1}),
        ]
        if ctx.attempt < 3:
            raise Crash
        return [handle.task_id for handle in handles]

    async with run.durable.worker(queue_names=["other"]):
        spawned = await run.spawn(work, queue_name="other")
        result = await run.wait(spawned)
    children = await Rows(run.durable, spawned).children()
    assert {row.task_id for row in children} == set(result.output)
    assert {(row.queue_name, row.task_name, row.priority) for row in children} == {
        ("other", "double", 0),
        ("other", "double", 7),
    }
    assert sorted(str(row.params) for row in children) == ["1", "2", "3"]


async def test_child_and_its_checkpoint_commit_together(run: Runner):
    """Whatever is visible, it is both or neither."""

    @task
    async def work(ctx: TaskContext) -> None:
        await asyncio.gather(*(ctx.spawn("child", double, number) for number in range(100)))

    spawned = await run.spawn(work)
    statement = text(
        "SELECT (SELECT count(*) FROM durable.tasks WHERE parent_task_id = :id),"
        " (SELECT count(*) FROM durable.checkpoints WHERE task_id = :id AND kind = 'spawn')"
    )

    async def counts() -> Any:
        async with run.durable.engine.connect() as connection:
            return (await connection.execute(statement, {"id": spawned.task_id})).one()

    while True:
        children, checkpoints = await counts()
        assert children == checkpoints
        if children == 100:
            break


async def test_spawn_that_was_cut_off_is_not_repeated(run: Runner):
    """A crash right after the child was committed, before the task has seen it."""
    spawned_twice: list[uuid.UUID] = []

    @task
    async def work(ctx: TaskContext) -> list[int]:
        first = ctx.spawn("one", double, 1)
        if ctx.attempt == 1:
            asyncio.get_running_loop().call_later(0.3, lambda: gone.set())
            doing = asyncio.create_task(first)
            await gone.wait()
            assert (await Rows(run.durable, ctx.task_id).children()) != []
            doing.cancel()
            raise Crash
        handle = await first
        spawned_twice.append(handle.task_id)
        return [await ctx.join(handle)]

    gone = asyncio.Event()
    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == [2]
    assert [row.task_id for row in await Rows(run.durable, spawned).children()] == spawned_twice


async def test_other_params_on_replay_give_the_first_child_and_warn(run: Runner, caplog: pytest.LogCaptureFixture):
    @task
    async def work(ctx: TaskContext) -> int:
        handle = await ctx.spawn("child", double, 1000 * ctx.attempt)
        if ctx.attempt == 1:
            raise Crash
        return await ctx.join(handle)

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        spawned = await run.spawn(work)
        assert (await run.wait(spawned)).output == 2000
    assert len(await Rows(run.durable, spawned).children()) == 1
    # Once for each replay: a child that is slow to end suspends the attempt.
    [warning] = set(warnings(caplog))
    assert "'child'" in warning
    assert "other params" in warning
    assert "1000" not in warning
    assert "2000" not in warning


async def test_failed_child_raises_child_failed_with_its_error(run: Runner, tally: Tally):
    @run.durable.task(max_attempts=2)
    async def child(ctx: TaskContext) -> None:
        tally.add("child")
        raise ValueError("no such thing")

    @task
    async def work(ctx: TaskContext) -> list[str]:
        handle = await ctx.spawn("child", child)
        for _ in range(2):
            try:
                await ctx.join(handle)
            except ChildFailed as error:
                found = [error.name, error.message, str(error.task_id == handle.task_id)]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == ["ValueError", "no such thing", "True"]
    assert tally == ["child", "child"]


async def test_childs_failure_that_is_not_caught_fails_the_parent_at_once_with_its_message_and_data(run: Runner):
    @run.durable.task
    async def grandchild(ctx: TaskContext) -> None:
        raise UserError({"message": "out of stock", "code": 7})

    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("grandchild", grandchild))

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("child", child))

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "ChildFailed"
    assert "out of stock" in error.message
    assert error.raw == {"message": "out of stock", "code": 7}
    assert len(await Rows(run.durable, spawned).runs()) == 1


async def test_cancelled_child_raises_child_cancelled(run: Runner):
    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.sleep_for("long", 3600)

    @task
    async def work(ctx: TaskContext) -> str:
        handle = await ctx.spawn("child", child)
        try:
            await ctx.join(handle)
        except ChildCancelled as error:
            if ctx.attempt == 1:
                raise Crash from None
            return str(error.task_id == handle.task_id)
        return "joined"

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    [row] = await Rows(run.durable, spawned).children()
    await Rows(run.durable, row.task_id).until("sleeping")
    await run.durable.cancel_task(row.task_id)
    assert (await run.wait(spawned)).output == "True"


async def test_child_that_ended_before_the_join_is_joined_without_a_suspension(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[int]:
        handles = [await ctx.spawn("double", double, number) for number in range(3)]
        await ctx.step("until they have ended", ended)
        fence = (await Rows(run.durable, ctx.task_id).task()).fence
        found = [await ctx.join(handle) for handle in handles]
        assert (await Rows(run.durable, ctx.task_id).task()).fence == fence
        return found

    async def ended() -> None:
        async def all_ended() -> bool:
            children = await Rows(run.durable, spawned).children()
            return all(row.state == "completed" for row in children)

        await eventually(all_ended)

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == [0, 2, 4]


async def test_join_past_its_timeout_raises_and_the_outcome_is_remembered(run: Runner):
    release = asyncio.Event()

    @run.durable.task
    async def child(ctx: TaskContext) -> int:
        await release.wait()
        return 7

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        handle = await ctx.spawn("child", child)
        found: list[Any] = []
        try:
            found.append(await ctx.join(handle, timeout=0.2))
        except TaskTimeout:
            found.append("timeout")
        release.set()
        found.append(await ctx.join(handle))
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == ["timeout", 7]


async def test_join_within_its_timeout_gives_the_result(run: Runner):
    @task
    async def work(ctx: TaskContext) -> int:
        return await ctx.join(await ctx.spawn("double", double, 4), timeout=20)

    assert await run(work) == 8


@pytest.mark.parametrize("whose", ["nobody's", "another's", "its own", "a grandchild"])
async def test_handle_that_is_not_of_a_child_is_refused_at_once(run: Runner, whose: str):
    @run.durable.task
    async def parent(ctx: TaskContext) -> uuid.UUID:
        return (await ctx.spawn("double", double, 1)).task_id

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        task_id = uuid.uuid4()
        if whose == "another's":
            task_id = stranger.task_id
        elif whose == "its own":
            task_id = ctx.task_id
        elif whose == "a grandchild":
            task_id = await ctx.join(await ctx.spawn("parent", parent))
        try:
            await ctx.join(TaskHandle(task_id))
        except TaskNotFound as error:
            return str(error)
        return "joined"

    stranger = await run.spawn(double, 1)
    output = await run(work)
    assert "child" in output


async def test_join_of_a_child_that_was_deleted_does_not_wait_for_ever(run: Runner, monkeypatch: pytest.MonkeyPatch):
    """The search for what was lost, which runs every few seconds, finds it."""
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_AGE", 0.0)

    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        try:
            await ctx.join(await ctx.spawn("child", child))
        except (ChildCancelled, TaskNotFound) as error:
            return type(error).__name__
        return "joined"

    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    await rows.until("sleeping")
    [row] = await rows.children()
    async with run.durable.engine.begin() as connection:
        await connection.execute(text("DELETE FROM durable.waits WHERE task_id = :id"), {"id": row.task_id})
        await connection.execute(text("DELETE FROM durable.tasks WHERE task_id = :id"), {"id": row.task_id})
    for worker in run.durable.workers:
        worker.maintenance.look_at_everything()
    assert (await run.wait(spawned)).output == "ChildCancelled"


async def test_unfinished_descendants_of_a_failed_task_are_cancelled(run: Runner):
    @run.durable.task
    async def grandchild(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("grandchild", grandchild))

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.spawn("child", child)
        await ctx.await_event("go")
        raise ValueError

    await assert_cascade(run, work, lambda spawned: run.durable.emit_event("go"), "failed")


async def test_unfinished_descendants_of_a_cancelled_task_are_cancelled(run: Runner):
    @run.durable.task
    async def grandchild(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @run.durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("grandchild", grandchild))

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("child", child))

    await assert_cascade(run, work, run.durable.cancel_task, "cancelled")


async def assert_cascade(run: Runner, work: Any, end: Any, state: str) -> None:
    spawned = await run.spawn(work)
    parent = Rows(run.durable, spawned)
    await eventually(parent.children)
    child = Rows(run.durable, (await parent.children())[0].task_id)
    await eventually(child.children)
    grandchild = Rows(run.durable, (await child.children())[0].task_id)
    await grandchild.until("sleeping")
    await child.until("sleeping")
    await parent.until("sleeping")
    await end(spawned)
    await parent.until(state)
    await child.until("cancelled")
    await grandchild.until("cancelled")


async def test_children_of_a_completed_task_go_on(run: Runner):
    @run.durable.task
    async def child(ctx: TaskContext) -> str:
        return await ctx.await_event("go")

    @task
    async def work(ctx: TaskContext) -> uuid.UUID:
        return (await ctx.spawn("child", child)).task_id

    task_id = await run(work)
    await Rows(run.durable, task_id).until("sleeping")
    await run.durable.emit_event("go", "gone")
    assert (await run.wait(task_id)).output == "gone"


async def test_attempt_that_is_retried_does_not_cancel_the_children(run: Runner):
    @run.durable.task
    async def child(ctx: TaskContext) -> str:
        return await ctx.await_event("go")

    @task
    async def work(ctx: TaskContext) -> str:
        handle = await ctx.spawn("child", child)
        if ctx.attempt == 1:
            raise Crash
        await ctx.emit_event("go", "ok")
        return await ctx.join(handle)

    assert await run(work) == "ok"


@pytest.mark.slow
async def test_thousand_children_on_one_slot(engine: Any, tally: Tally):
    """The parent holds no slot while it waits, and is not replayed for each of them."""
    async with Durable(engine, tasks=[double]) as durable, durable.worker(concurrency=1):
        run = Runner(durable)

        @task
        async def work(ctx: TaskContext) -> int:
            tally.add("entered")
            handles = await asyncio.gather(*(ctx.spawn("double", double, number) for number in range(1000)))
            return sum(await asyncio.gather(*(ctx.join(handle) for handle in handles)))

        assert await run(work) == 999_000
    assert len(tally) < 60


@pytest.mark.slow
async def test_chain_of_fifty_tasks_on_one_slot(engine: Any):
    async with Durable(engine) as durable, durable.worker(concurrency=1):
        run = Runner(durable)

        @durable.task
        async def nest(ctx: TaskContext, depth: int) -> int:
            if depth == 0:
                return 0
            return 1 + await ctx.join(await ctx.spawn("nest", nest, depth - 1))

        assert await run(nest, 50) == 50


async def test_children_of_gathered_branches_are_their_own(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[int]:
        async def branch(number: int) -> int:
            handle = await ctx.spawn("double", double, number)
            return await ctx.join(handle)

        found = await asyncio.gather(*(branch(number) for number in range(10)))
        if ctx.attempt == 1:
            raise Crash
        return found

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == [number * 2 for number in range(10)]
    assert len(await Rows(run.durable, spawned).children()) == 10


async def test_first_failed_join_of_a_gather_decides_and_the_other_children_are_cancelled_with_the_parent(run: Runner):
    @run.durable.task
    async def bad(ctx: TaskContext) -> None:
        raise UserError("bad")

    @run.durable.task
    async def endless(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @task
    async def work(ctx: TaskContext) -> None:
        handles = [await ctx.spawn("endless", endless), await ctx.spawn("bad", bad)]
        await asyncio.gather(*(ctx.join(handle) for handle in handles))

    spawned = await run.spawn(work)
    result = await run.wait(spawned)
    assert result.error.name == "ChildFailed"
    children = {row.task_name: row for row in await Rows(run.durable, spawned).children()}
    await Rows(run.durable, children["endless"].task_id).until("cancelled")
    assert (await run.durable.get_task_result(children["bad"].task_id)).status is TaskStatus.FAILED


async def test_params_that_do_not_fit_fail_the_parent_at_once(run: Runner):
    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.spawn("think", think, {"wrong": 1})

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).error.name == "InvalidTaskParams"
    assert len(await Rows(run.durable, spawned).runs()) == 1
    assert await Rows(run.durable, spawned).children() == []


async def test_params_that_do_not_fit_a_task_known_by_its_name_do_so_too(run: Runner):
    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.spawn_by_name("think", "think", {"wrong": 1})

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).error.name == "InvalidTaskParams"
    assert await Rows(run.durable, spawned).children() == []


async def test_queue_that_does_not_exist_is_refused_and_nothing_is_spawned(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.spawn("double", double, 1, queue_name="nowhere")

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "QueueNotFound"
    assert "'nowhere'" in error.message
    async with run.durable.engine.connect() as connection:
        statement = select(TaskRow.task_id).where(TaskRow.queue_name == "nowhere")
        assert (await connection.execute(statement)).all() == []


async def test_child_on_another_queue_is_joined_all_the_same(run: Runner):
    await run.durable.create_queue("other")

    @task
    async def work(ctx: TaskContext) -> int:
        return await ctx.join(await ctx.spawn("double", double, 21, queue_name="other"))

    async with run.durable.worker(queue_names=["other"]):
        assert await run(work) == 42


async def test_idempotency_key_of_a_strangers_task_is_a_conflict_and_is_not_tried_again(run: Runner):
    stranger = await run.spawn(double, 1, idempotency_key="taken")

    @task(retry_strategy=RetryStrategy.fixed(0))
    async def work(ctx: TaskContext) -> None:
        await ctx.spawn("double", double, 1, idempotency_key="taken")

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "IdempotencyConflict"
    assert "'taken'" in error.message
    assert len(await Rows(run.durable, spawned).runs()) == 1
    assert await Rows(run.durable, spawned).children() == []
    assert (await run.wait(stranger)).output == 2


async def test_spawn_by_a_name_that_nobody_knows_here_waits_for_a_worker_that_does(run: Runner):
    @task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.join(await ctx.spawn_by_name("unknown", "defined-later", {"a": 1}))

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")

    @run.durable.task("defined-later")
    async def later(ctx: TaskContext, params: Any) -> Any:
        return params

    await run.spawn(double, 1)
    assert (await run.wait(spawned)).output == {"a": 1}


@pytest.mark.slow
async def test_spawn_is_refused_for_a_parent_that_was_cancelled_or_taken_over(run: Runner):
    reached = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        if ctx.attempt > 1:
            return
        await ready.wait()
        await rows.take_over()
        reached.set()
        await ctx.spawn("double", double, 1)

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    ready.set()
    await run.wait(spawned)
    assert reached.is_set()
    assert await rows.children() == []


async def test_delayed_child_and_delayed_parent(run: Runner):
    @task
    async def work(ctx: TaskContext) -> int:
        return await ctx.join(await ctx.spawn("double", double, 1, delay=0.3))

    assert await run(work) == 2


async def test_plain_tasks_spawn_and_join(run: Runner):
    @task
    def work(ctx: SyncTaskContext) -> list[Any]:
        handle = ctx.spawn("think", think, Question(text="why"))
        other = ctx.spawn_by_name("double", "double", 4)
        found = [ctx.join(handle).text, ctx.join(other)]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == ["WHY", 8]


@pytest.mark.slow
async def test_child_that_finishes_while_the_parent_begins_to_wait_is_never_missed(engine: Any):
    """Many at once, so that the end of a child and the parent's wait for it meet in every possible way."""
    async with Durable(engine, tasks=[double]) as durable, durable.worker(concurrency=50):
        run = Runner(durable)

        @durable.task
        async def work(ctx: TaskContext, number: int) -> int:
            return await ctx.join(await ctx.spawn("double", double, number))

        spawned = await durable.spawn_many([(work, number) for number in range(500)])
        results = [await run.wait(each) for each in spawned]
        assert [result.output for result in results] == [number * 2 for number in range(500)]
        # By being told, not by the search for what was missed.
        assert all(worker.maintenance.repaired == 0 for worker in durable._workers)


@pytest.mark.slow
async def test_parent_whose_row_is_locked_spawns_once_it_is_free(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        await ready.wait()
        return await ctx.join(await ctx.spawn("double", double, 21, idempotency_key="once"))

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("running")
    async with run.durable.engine.connect() as connection, connection.begin():
        locking = select(TaskRow.task_id).where(TaskRow.task_id == spawned.task_id).with_for_update()
        await connection.execute(locking)
        ready.set()
        await asyncio.sleep(1)
    assert (await run.wait(spawned)).output == 42


@pytest.mark.slow
async def test_spawn_whose_key_is_in_an_open_transaction_holds_up_no_other_task(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext, key: str) -> int:
        return await ctx.join(await ctx.spawn("double", double, 21, idempotency_key=key))

    async with AsyncSession(run.durable.engine) as session:
        await run.durable.spawn_with(session, double, 1, idempotency_key="contended")
        waiting = await run.spawn(work, "contended")
        await Rows(run.durable, waiting).until("running")
        await asyncio.sleep(0.2)
        async with asyncio.timeout(8):
            for number in range(3):
                assert await run(work, f"free-{number}") == 42
        await session.rollback()
    assert (await run.wait(waiting)).output == 42


async def test_what_is_no_handle_cannot_be_joined(run: Runner):
    @task
    async def child(ctx: TaskContext) -> None: ...

    @task(max_attempts=1)
    async def by_id(ctx: TaskContext) -> None:
        await ctx.join((await ctx.spawn("child", child)).task_id)  # type: ignore[arg-type]

    @task(max_attempts=1)
    async def somebody_elses(ctx: TaskContext) -> None:
        await ctx.join(await run.durable.spawn(child))  # type: ignore[arg-type]

    error = await run.failure(by_id)
    assert error.message == "join takes the TaskHandle of `await ctx.spawn(...)`, not UUID"
    assert (await run.failure(somebody_elses)).name == "TaskNotFound"


async def test_join_that_timed_out_is_joined_anew_by_the_next_attempt(run: Runner):
    release = asyncio.Event()

    @task("slow")
    async def slow(ctx: TaskContext) -> str:
        await release.wait()
        return "late"

    @task("parent", max_attempts=2)
    async def parent(ctx: TaskContext) -> str:
        child = await ctx.spawn("child", slow)
        if ctx.attempt == 2:
            release.set()
        return await ctx.join(child, timeout=0.05 if ctx.attempt == 1 else 30)

    run.durable.register(slow)
    spawned = await run.spawn(parent)
    assert (await run.wait(spawned)).output == "late"
    assert len(await Rows(run.durable, spawned).runs()) == 2


@pytest.mark.slow
async def test_queue_or_child_that_does_not_exist_is_not_tried_again(run: Runner):
    @task("child")
    async def child(ctx: TaskContext) -> None: ...

    @task("spawns", max_attempts=5)
    async def spawns(ctx: TaskContext) -> None:
        await ctx.spawn("child", child, queue_name="missing")

    @task("joins", max_attempts=5)
    async def joins(ctx: TaskContext) -> None:
        await ctx.join(TaskHandle(uuid.uuid4()))

    @task("calls", max_attempts=2)
    async def calls(ctx: TaskContext) -> None:
        # The client's own call may meet a queue that is created a moment later.
        await run.durable.spawn(child, queue_name="missing")

    for work, name, attempts in ((spawns, "QueueNotFound", 1), (joins, "TaskNotFound", 1), (calls, "QueueNotFound", 2)):
        spawned = await run.spawn(work)
        assert (await run.wait(spawned)).error.name == name
        assert len(await Rows(run.durable, spawned).runs()) == attempts
