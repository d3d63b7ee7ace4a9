"""Follow-ups: one for each end of a task that names one, whatever ends it; and the hook for final failures."""

import logging
import uuid
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from durable_sa import (
    CancellationPolicy,
    Durable,
    Hooks,
    InvalidName,
    Limit,
    RetryStrategy,
    SyncTaskContext,
    Task,
    TaskContext,
    TaskEnded,
    TaskErrorInfo,
    TaskFilter,
    TaskRow,
    TaskStatus,
    UserError,
    task,
)
from durable_sa.database.channel import DedicatedConnection
from durable_sa.statements import outcomes
from durable_sa.testing import run_until_idle, time_travel
from tests.context.support import Crash, Rows, Runner
from tests.support import eventually

ended: list[TaskEnded] = []


@pytest.fixture(autouse=True)
def no_follow_ups_yet() -> None:
    ended.clear()


@task
async def alert(ctx: TaskContext, failure: TaskEnded) -> None:
    ended.append(failure)


@task
def compensate(ctx: SyncTaskContext, failure: TaskEnded) -> None:
    ended.append(failure)


@task(on_failure=alert, on_cancel=compensate, max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
async def work(ctx: TaskContext, number: int) -> int:
    if number < 0:
        raise UserError({"number": number})
    if number == 0:
        raise Crash
    await ctx.sleep_for("long", 3600)
    return number


@pytest.fixture
async def client(durable: Durable) -> AsyncGenerator[Durable]:
    for each in (alert, compensate, work):
        durable.register(each)
    yield durable


async def follow_ups(durable: Durable) -> list[Any]:
    statement = select(TaskRow.__table__).where(TaskRow.task_name.in_(["alert", "compensate"]))
    async with durable.engine.connect() as connection:
        return list((await connection.execute(statement.order_by(TaskRow.created_at))).all())


async def test_a_failure_spawns_its_follow_up_once_there_are_no_more_attempts(client: Durable, run: Runner) -> None:
    refused, failed = await client.spawn(work, -1), await client.spawn(work, 0)
    await eventually(lambda: len(ended) == 2)
    by_id = {failure.task_id: failure for failure in ended}
    failure = by_id[refused.task_id]
    assert (failure.task_name, failure.queue_name, failure.params, failure.status, failure.truncated) == (
        "work",
        "default",
        -1,
        TaskStatus.FAILED,
        False,
    )
    assert isinstance(failure.error, TaskErrorInfo)
    assert (failure.error.name, failure.error.raw) == ("UserError", {"number": -1})
    assert by_id[failed.task_id].error.name == "Crash"  # type: ignore[union-attr]
    assert len(await Rows(client, failed).runs()) == 2
    for row in await follow_ups(client):
        assert (row.task_name, row.queue_name, row.parent_task_id) == ("alert", "default", None)
        assert row.task_id.version == 7
        assert row.max_attempts == 5
    # Both ended in their worker, which was told of the new tasks: none of them waits for a poll.
    assert len(await follow_ups(client)) == 2


async def test_a_task_that_completes_has_no_follow_up(client: Durable) -> None:
    async with time_travel(client) as clock:
        spawned = await client.spawn(work, 1)
        await run_until_idle(client)
        await clock.advance(7200)
        await run_until_idle(client)
        assert (await client.wait_for_result(spawned)).output == 1
    assert await follow_ups(client) == []


async def test_params_that_do_not_fit_fail_with_a_follow_up(client: Durable) -> None:
    spawned = await client.spawn_by_name("work", "no number", unchecked=True)
    await run_until_idle(client)
    [failure] = ended
    assert (failure.task_id, failure.params, failure.error and failure.error.name) == (
        spawned.task_id,
        "no number",
        "InvalidTaskParams",
    )


async def test_a_cancelled_task_has_one_follow_up(client: Durable, sync_engine: Engine) -> None:
    pending, sleeping, third = [await client.spawn(work, number) for number in (1, 2, 3)]
    await client.cancel_task(pending)
    await client.cancel_task(pending)
    await run_until_idle(client)
    with Session(sync_engine) as session:
        client.cancel_task_with(session, third)
        session.rollback()
        client.cancel_task_with(session, sleeping)
        session.commit()
    await run_until_idle(client)
    assert {(failure.task_id, failure.status, failure.params, failure.error) for failure in ended} == {
        (pending.task_id, TaskStatus.CANCELLED, 1, None),
        (sleeping.task_id, TaskStatus.CANCELLED, 2, None),
    }
    assert {row.task_name for row in await follow_ups(client)} == {"compensate"}


async def test_tasks_that_are_cancelled_together_have_a_follow_up_each(client: Durable) -> None:
    spawned = [await client.spawn(work, number) for number in range(3)]
    assert (await client.cancel_tasks(TaskFilter(task_name="work"))).done == 3
    await run_until_idle(client)
    assert {failure.task_id for failure in ended} == {each.task_id for each in spawned}
    assert len(ended) == 3


async def test_a_queue_with_limits_runs_its_follow_ups_and_what_waits_for_messages(client: Durable) -> None:
    @client.task
    async def talk(ctx: TaskContext) -> str:
        first = await ctx.receive("note")
        race = await ctx.race("second", note=ctx.receive("note"), late=ctx.sleep_for("late", 3600))
        return f"{first} {race.value}"

    await client.set_limit("default", Limit(concurrency=1))
    spawned = [await client.spawn(work, number) for number in (-1, -1, 5)]
    talking = await client.spawn(talk)
    async with client.worker(concurrency=3):
        rows = Rows[Any](client, talking)
        await rows.until("sleeping")
        await client.send(talking, "note", "hello")
        await eventually(lambda: rows.checkpoints("note"))
        await rows.until("sleeping")
        await client.send(talking, "note", "there")
        assert (await client.wait_for_result(talking, timeout=10)).output == "hello there"
        await Rows[Any](client, spawned[2]).until("sleeping")
        await client.cancel_task(spawned[2])
        # Each slot was given back, or the one that there is would be taken.
        await eventually(lambda: len(ended) == 3)
    assert {failure.task_id for failure in ended} == {each.task_id for each in spawned}
    async with client.engine.connect() as connection:
        keys = select(TaskRow.limit_key).where(TaskRow.task_name.in_(["alert", "compensate"]))
        assert (await connection.scalars(keys)).all() == [""] * 3


async def test_a_follow_up_has_the_limit_key_of_its_task(durable: Durable) -> None:
    @durable.task(limit_key="acme")
    async def follow(ctx: TaskContext, failure: TaskEnded) -> None: ...

    @durable.task(limit_key=lambda failure: "acme")
    async def compute(ctx: TaskContext, failure: TaskEnded) -> None: ...

    @durable.task(on_failure=follow, on_cancel=compute, max_attempts=1)
    async def broken(ctx: TaskContext) -> None:
        raise Crash

    await durable.set_limit("default", Limit(concurrency=1), per_key=True)
    await durable.spawn(broken)
    await durable.cancel_task(await durable.spawn(broken))
    await run_until_idle(durable)
    async with durable.engine.connect() as connection:
        rows = await connection.execute(
            select(TaskRow.task_name, TaskRow.limit_key, TaskRow.state).where(TaskRow.task_name != "broken")
        )
        assert sorted(rows.all()) == [("compute", "", "completed"), ("follow", "acme", "completed")]


async def test_a_time_limit_and_a_cascade_have_follow_ups(client: Durable) -> None:
    @client.task(on_failure="alert")
    async def parent(ctx: TaskContext) -> None:
        await ctx.spawn("child", work, 5)
        await ctx.receive("go on")
        raise Crash

    async with time_travel(client) as clock:
        late = await client.spawn(work, 1, cancellation=CancellationPolicy(max_running_time=timedelta(minutes=1)))
        spawned = await client.spawn(parent, max_attempts=1)
        await run_until_idle(client)
        await clock.advance(120)
        await client.send(spawned, "go on")
        await run_until_idle(client)

        async def all_three() -> bool:
            await run_until_idle(client)
            return len(ended) == 3

        await eventually(all_three)
    found = {failure.task_name + failure.status: failure for failure in ended}
    assert found["parentfailed"].task_id == spawned.task_id
    statuses = sorted((failure.params, failure.status) for failure in ended if failure.task_name == "work")
    assert statuses == [(1, "cancelled"), (5, "cancelled")]
    [limit] = [failure.error for failure in ended if failure.task_id == late.task_id]
    assert limit is not None
    assert limit.message == "max_running_time was over"


async def test_a_task_that_is_given_up_with_its_workers_has_a_follow_up(client: Durable) -> None:
    spawned = await client.spawn(work, 1)
    lost = uuid.uuid4()
    async with client.engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE durable.tasks SET state = 'running', claimed_by = :lost, lease_losses = 100, fence = 7,"
                " attempt = 1 WHERE task_id = :task_id"
            ),
            {"lost": lost, "task_id": spawned.task_id},
        )
    parameters = {"task_ids": [spawned.task_id], "next_run_ids": [uuid.uuid4()], "worker_ids": [lost]}
    [row] = await client.database.execute(outcomes.take_over(), parameters)
    assert (row.state, row.follow_up_queue) == ("failed", "default")
    assert await client.database.execute(outcomes.take_over(), parameters) == []
    await run_until_idle(client)
    [failure] = ended
    assert failure.error is not None
    assert failure.error.name == "LeaseLost"


async def test_a_second_end_has_a_second_follow_up(client: Durable) -> None:
    spawned = await client.spawn(work, -1)
    await run_until_idle(client)
    await client.retry_task(spawned)
    await run_until_idle(client)
    assert [failure.task_id for failure in ended] == [spawned.task_id] * 2


async def test_a_failure_whose_reply_was_lost_has_one_follow_up(
    client: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = DedicatedConnection.execute
    lost: list[bool] = []

    async def silent(self: DedicatedConnection, statement: Any, parameters: Any = None) -> Any:
        rows = await execute(self, statement, parameters)
        if statement is outcomes.fail(limited=False) and not lost:
            lost.append(True)
            raise ConnectionError
        return rows

    monkeypatch.setattr(DedicatedConnection, "execute", silent)
    await client.spawn(work, -1)
    await run_until_idle(client)
    assert lost
    await eventually(lambda: len(ended) == 1)
    assert len(await follow_ups(client)) == 1


async def test_the_clients_follow_ups_are_for_tasks_without_their_own(engine: AsyncEngine) -> None:
    @task
    async def plain(ctx: TaskContext) -> None:
        raise Crash

    @task(queue_name="alerts", max_attempts=3, on_cancel="alert")
    async def own(ctx: TaskContext, failure: TaskEnded) -> None:
        ended.append(failure)
        raise Crash

    @task(on_failure=own)
    async def other(ctx: TaskContext) -> None:
        raise Crash

    tasks: list[Task[Any, Any]] = [alert, plain, own, other]
    options: Any = {"default_max_attempts": 1, "default_retry_strategy": RetryStrategy.none()}
    async with Durable(engine, tasks=tasks, on_failure=alert, **options) as durable:
        await durable.create_queue("alerts")
        for each in (plain, other):
            await durable.spawn(each)
        await run_until_idle(durable)
        rows = {row.task_name: row for row in [*await follow_ups(durable), *await _rows(durable, "own")]}
    # `own` failed, too, and has no follow-up by default of the client.
    assert sorted(failure.task_name for failure in ended) == ["other", "plain"]
    assert (rows["own"].queue_name, rows["own"].max_attempts, rows["own"].state) == ("alerts", 3, "failed")
    assert list(rows["own"].follow_ups) == ["cancelled"]
    assert rows["alert"].follow_ups is None


async def _rows(durable: Durable, name: str) -> list[Any]:
    async with durable.engine.connect() as connection:
        return list((await connection.execute(select(TaskRow.__table__).where(TaskRow.task_name == name))).all())


async def test_follow_ups_that_name_each_other_come_to_an_end(client: Durable) -> None:
    @client.task(on_failure="second", max_attempts=1)
    async def first(ctx: TaskContext, failure: TaskEnded) -> None:
        raise Crash

    @client.task(on_failure="first", max_attempts=1)
    async def second(ctx: TaskContext, failure: TaskEnded) -> None:
        raise Crash

    @client.task(on_failure=first, max_attempts=1)
    async def begin(ctx: TaskContext) -> None:
        raise Crash

    await client.spawn(begin)
    await run_until_idle(client)
    assert [len(await _rows(client, name)) for name in ("begin", "first", "second")] == [1, 1, 1]


async def test_params_that_do_not_fit_beside_the_error_are_left_out(engine: AsyncEngine) -> None:
    @task(on_failure=alert, max_attempts=1)
    async def large(ctx: TaskContext, params: str) -> None:
        raise UserError("x" * 300)

    async with Durable(engine, tasks=[alert, large], max_payload_bytes=1000) as durable:
        await durable.spawn(large, "y" * 900)
        await run_until_idle(durable)
        await durable.spawn(large, "y" * 100)
        await run_until_idle(durable)
    assert [(failure.params, failure.truncated) for failure in ended] == [(None, True), ("y" * 100, False)]


async def test_a_follow_up_goes_to_the_queue_of_its_task_if_its_own_does_not_exist(durable: Durable) -> None:
    @durable.task(queue_name="gone")
    async def follow(ctx: TaskContext, failure: TaskEnded) -> None:
        ended.append(failure)

    @durable.task(on_failure=follow, max_attempts=1)
    async def broken(ctx: TaskContext) -> None:
        raise Crash

    await durable.spawn(broken)
    await durable.spawn_many([(broken, None)] * 2)
    await run_until_idle(durable)
    assert len(ended) == 3


async def test_what_is_stored_by_hand_is_passed_over(client: Durable) -> None:
    spawned = []
    named = '"task_name": "failed_task", "max_attempts"'
    keyed = f'{{"cancelled": {{"limit_key": "{"x" * 100_000}"}}}}'
    for stored in (
        "[]",
        "5",
        '{"cancelled": 5}',
        '{"cancelled": {}}',
        "null",
        f'{{"cancelled": {{{named}: "many"}}}}',
        keyed,
    ):
        spawned.append(await client.spawn(work, 1))
        async with client.engine.begin() as connection:
            await connection.execute(
                text("UPDATE durable.tasks SET follow_ups = CAST(:stored AS json) WHERE task_id = :task_id"),
                {"stored": stored, "task_id": spawned[-1].task_id},
            )
    for each in spawned:
        assert await client.cancel_task(each) is TaskStatus.CANCELLED
    assert await follow_ups(client) == []


def test_what_is_no_follow_up_is_refused() -> None:
    with pytest.raises(TypeError, match="on_failure is a task, made by @task, or its name, not function"):
        task("name", on_failure=lambda: None)  # type: ignore[call-overload]
    with pytest.raises(InvalidName):
        task("name", on_cancel="")
    with pytest.raises(TypeError, match="on_cancel is a task"):
        Durable(on_cancel=5)  # type: ignore[arg-type]


async def test_the_hook_is_called_after_the_final_failure(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    stored: list[TaskEnded] = []

    class Note(Hooks):
        def on_failed(self, ended: TaskEnded) -> None:
            stored.append(ended)

    class Broken(Hooks):
        def on_failed(self, ended: TaskEnded) -> None:
            raise Crash

    async with Durable(engine, tasks=[alert, compensate, work], hooks=[Broken(), Note()]) as durable:
        spawned = await durable.spawn(work, 0)
        await run_until_idle(durable)
        await durable.cancel_task(await durable.spawn(work, 1))
    [failure] = stored
    [followed] = [each for each in ended if each.task_id == spawned.task_id]
    assert failure == followed
    assert failure.error is not None
    assert failure.error.name == "Crash"
    [line] = [record for record in caplog.records if "the hook on_failed has failed" in record.getMessage()]
    assert line.levelno == logging.ERROR
