"""Events: delivered exactly once to every wait for them, however emit and wait meet; timeouts are remembered."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from durable_sa import Durable, SyncTaskContext, TaskContext, TaskRow, TaskTimeout, task
from durable_sa.models import Event, Wait
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


class Payment(BaseModel):
    amount: Decimal
    at: datetime


async def test_event_that_came_before_is_delivered(run: Runner):
    @task
    async def work(ctx: TaskContext) -> Any:
        found = await ctx.await_event("paid")
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run.durable.emit_event("paid", {"amount": 5})
    assert await run(work) == {"amount": 5}


async def test_event_that_comes_later_is_delivered(run: Runner, tally: Tally):
    @task
    async def work(ctx: TaskContext) -> Any:
        tally.add("entered")
        found = await ctx.await_event("paid")
        if ctx.attempt == 1:
            raise Crash
        return found

    spawned = await run.spawn(work)
    row = await Rows(run.durable, spawned).until("sleeping")
    assert row.available_at is None
    assert row.claimed_by is None
    [wait] = await Rows(run.durable, spawned).waits()
    assert wait.event_name == "paid"
    assert wait.due_at is None
    assert await run.durable.emit_event("paid", [1, None])
    assert (await run.wait(spawned)).output == [1, None]
    assert tally == ["entered"] * 3
    assert await Rows(run.durable, spawned).waits() == []


@pytest.mark.slow
async def test_first_emit_of_a_name_wins(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found = [await ctx.emit_event("done", 3), await ctx.emit_event("other", 4), await ctx.emit_event("other", 5)]
        if ctx.attempt == 1:
            raise Crash
        return [*found, await ctx.await_event("done"), await ctx.await_event("other")]

    assert await run.durable.emit_event("done", 1) is True
    assert await run.durable.emit_event("done", 2) is False
    # What the first attempt was told is what the second one is told.
    assert await run(work) == [False, True, False, 1, 4]


async def test_event_that_was_cleaned_up_is_awaited_anew_and_what_was_delivered_stays(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found = [await ctx.await_event("order")]
        if ctx.attempt == 1:
            # Not in a step: the event is gone when the second attempt begins.
            assert await run.durable.cleanup_events(0) == 1
            raise Crash
        try:
            found.append(await ctx.await_event("order", timeout=0.05))
        except TaskTimeout:
            found.append("timeout")
        return found

    assert await run.durable.emit_event("order", 1)
    assert await run(work) == [1, "timeout"]
    # Its name is free again.
    assert await run.durable.emit_event("order", 2)


async def test_payload_that_is_null_is_not_a_timeout(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found = [await ctx.await_event("null", timeout=20), await ctx.await_event("bare", timeout=20)]
        if ctx.attempt == 1:
            raise Crash
        return found

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.emit_event("null", None)
    await run.durable.emit_event("bare")
    assert (await run.wait(spawned)).output == [None, None]


async def test_payload_is_of_the_type_asked_for(run: Runner):
    payment = Payment(amount=Decimal("1.10"), at=datetime(2026, 1, 1, tzinfo=UTC))
    seen: list[Any] = []

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append(await ctx.await_event("paid", type=Payment))
        seen.append(await ctx.await_event("paid"))
        seen.append(await ctx.await_event("dates", type=dict[int, datetime]))
        if ctx.attempt == 1:
            raise Crash

    await run.durable.emit_event("paid", payment)
    await run.durable.emit_event("dates", {"1": payment.at})
    await run(work)
    assert seen == [payment, {"amount": "1.10", "at": "2026-01-01T00:00:00Z"}, {1: payment.at}] * 2


async def test_payload_that_does_not_fit_fails_the_task_at_once(run: Runner):
    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.await_event("paid", type=Payment)

    await run.durable.emit_event("paid", {"amount": "secret"})
    error = await run.failure(work)
    assert error.name == "SerializationError"
    assert "'paid'" in error.message
    assert "secret" not in error.message


async def test_same_event_may_be_awaited_again_and_by_many(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        return [await ctx.await_event("go"), await ctx.await_event("go"), await ctx.await_event("go", timeout=0)]

    spawned = [await run.spawn(work) for _ in range(30)]
    for each in spawned:
        await Rows(run.durable, each).until("sleeping")
    await run.durable.emit_event("go", 1)
    for each in spawned:
        assert (await run.wait(each)).output == [1, 1, 1]
    assert await run(work) == [1, 1, 1]


@pytest.mark.slow
async def test_thousand_waiters_of_one_event_wake_once_each(engine: Any, tally: Tally):
    async with Durable(engine) as durable:

        @durable.task
        async def work(ctx: TaskContext, number: int) -> int:
            tally.add(number)
            return number + await ctx.await_event("go")

        spawned = await durable.spawn_many([(work, number) for number in range(1200)])
        async with durable.worker(concurrency=100):

            async def waits() -> bool:
                async with engine.connect() as connection:
                    return len((await connection.execute(select(Wait.task_id))).all()) == 1200

            await eventually(waits, within=40)
            await durable.emit_event("go", 10_000)
            results = [await durable.wait_for_result(each, timeout=40) for each in spawned]
    assert [result.output for result in results] == [10_000 + number for number in range(1200)]
    assert sorted(tally) == sorted([*range(1200)] * 2)


@pytest.mark.slow
async def test_queues_have_events_of_their_own(run: Runner):
    await run.durable.create_queue("other")

    @task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.await_event("go", timeout=0.3)

    assert await run.durable.emit_event("go", 1, queue_name="other")
    assert (await run.failure(work, max_attempts=1)).name == "TaskTimeout"
    assert await run.durable.emit_event("go", 2)
    assert await run(work) == 2


async def test_emit_from_a_task_reaches_others_and_itself(run: Runner):
    @task
    async def listen(ctx: TaskContext) -> Any:
        return await ctx.await_event("news")

    @task
    async def work(ctx: TaskContext) -> Any:
        await ctx.emit_event("news", {"from": str(ctx.task_name)})
        return await ctx.await_event("news")

    spawned = await run.spawn(listen)
    await Rows(run.durable, spawned).until("sleeping")
    assert await run(work) == {"from": "work"}
    assert (await run.wait(spawned)).output == {"from": "work"}


@pytest.mark.parametrize("name", ["", "$child:1", "a\x00", "x" * 201])
async def test_names_that_break_the_rules_are_refused(run: Runner, name: str):
    @task
    async def work(ctx: TaskContext) -> list[str]:
        found = []
        for call in (ctx.await_event, ctx.emit_event):
            try:
                await call(name)
            except ValueError as error:
                found.append(type(error).__name__)
        return found

    assert await run(work) == ["InvalidName", "InvalidName"]


async def test_timeout_raises_task_timeout(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        try:
            await ctx.await_event("never", timeout=timedelta(milliseconds=150))
        except TimeoutError as error:
            assert isinstance(error, TaskTimeout)
            raise

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "TaskTimeout"
    assert "'never'" in error.message
    row = await Rows(run.durable, spawned).task()
    assert row.finished_at - row.started_at >= timedelta(milliseconds=150)


async def test_timeout_is_remembered_and_a_late_event_does_not_change_it(run: Runner, tally: Tally):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        tally.add("entered")
        found: list[Any] = []
        try:
            found.append(await ctx.await_event("late", timeout=0.1))
        except TaskTimeout:
            found.append("timeout")
        await ctx.emit_event("late", "came")
        await ctx.sleep_for("nap", 0.05)
        if ctx.attempt == 1:
            raise Crash
        return [*found, await ctx.await_event("late")]

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == ["timeout", "came"]
    statuses = [row.status for row in await Rows(run.durable, spawned).checkpoints("late") if row.kind == "event"]
    assert statuses == ["timeout", "completed"]


@pytest.mark.slow
async def test_ten_caught_timeouts_take_the_sum_of_the_timeouts(run: Runner, tally: Tally):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        tally.add("entered")
        timeouts = 0
        for number in range(10):
            try:
                await ctx.await_event(f"never-{number}" if number % 2 else "never", timeout=0.15)
            except TaskTimeout:
                timeouts += 1
        return timeouts

    started = time.monotonic()
    assert await run(work) == 10
    assert 1.5 <= time.monotonic() - started < 6
    assert len(tally) == 11


@pytest.mark.slow
async def test_time_of_a_wait_goes_on_through_failures_of_other_branches(run: Runner):
    """Its end is fixed the first time, as that of a sleep."""

    async def fail() -> None:
        await asyncio.sleep(0.3)
        raise ConnectionError

    @task(max_attempts=4)
    async def work(ctx: TaskContext) -> str:
        async def wait() -> str:
            try:
                await ctx.await_event("never", timeout=0.7)
            except TaskTimeout:
                return "timeout"
            return "came"

        if ctx.attempt < 3:
            await asyncio.gather(wait(), ctx.step("fail", fail))
        return (await asyncio.gather(wait()))[0]

    spawned = await run.spawn(work)
    due: set[datetime] = set()

    async def ended() -> bool:
        due.update(row.due_at for row in await Rows(run.durable, spawned).waits())
        return (await Rows(run.durable, spawned).task()).finished_at is not None

    await eventually(ended)
    assert (await run.wait(spawned)).output == "timeout"
    assert len(due) == 1


async def test_timeout_of_zero_takes_what_is_there(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found: list[Any] = [await ctx.await_event("there", timeout=0)]
        try:
            await ctx.await_event("not there", timeout=0)
        except TaskTimeout:
            found.append("timeout")
        return found

    await run.durable.emit_event("there", 1)
    assert await run(work) == [1, "timeout"]


async def test_timeouts_beyond_the_range_are_refused_and_the_longest_is_not(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> Any:
        for timeout in (-1, float("nan"), float("inf"), 1e10):
            with pytest.raises(ValueError, match="timeout"):
                await ctx.await_event("go", timeout=timeout)
        return await ctx.await_event("go", timeout=3e9)

    spawned = await run.spawn(work)
    row = await Rows(run.durable, spawned).until("sleeping")
    assert row.available_at.year > 2100
    await run.durable.emit_event("go", 1)
    assert (await run.wait(spawned)).output == 1


@pytest.mark.slow
async def test_event_that_came_in_time_counts_although_nobody_looked_until_later(durable: Durable):
    """No worker was there when it came, nor when the wait's time was over."""

    @durable.task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.await_event("go", timeout=0.4)

    async with durable.worker():
        spawned = await durable.spawn(work)
        await Rows(durable, spawned).until("sleeping")
    await durable.emit_event("go", "in time")
    await asyncio.sleep(0.5)
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "in time"


@pytest.mark.slow
async def test_event_that_came_after_the_time_was_over_does_not_count(durable: Durable):
    @durable.task
    async def work(ctx: TaskContext) -> Any:
        try:
            return await ctx.await_event("go", timeout=0.2)
        except TaskTimeout:
            return "timeout"

    async with durable.worker():
        spawned = await durable.spawn(work)
        await Rows(durable, spawned).until("sleeping")
    await asyncio.sleep(0.3)
    await durable.emit_event("go", "too late")
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "timeout"


async def test_event_in_an_open_transaction_is_delivered_on_its_commit_and_holds_nobody_up(run: Runner):
    @task
    async def wait(ctx: TaskContext, name: str) -> Any:
        return await ctx.await_event(name)

    waiting = await run.spawn(wait, "slow")
    await Rows(run.durable, waiting).until("sleeping")
    async with AsyncSession(run.durable.engine) as session:
        assert await run.durable.emit_event_with(session, "slow", 1)
        # Others go on meanwhile, those that wait for the same name included.
        other = await run.spawn(wait, "quick")
        late = await run.spawn(wait, "slow")
        await Rows(run.durable, late).until("sleeping")
        await run.durable.emit_event("quick", 2)
        assert (await run.wait(other)).output == 2
        assert (await run.durable.get_task_result(waiting)).status == "sleeping"
        await session.commit()
    assert (await run.wait(waiting)).output == 1
    assert (await run.wait(late)).output == 1


async def test_event_that_is_rolled_back_was_never_there(run: Runner):
    @task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.await_event("go")

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    async with AsyncSession(run.durable.engine) as session:
        await run.durable.emit_event_with(session, "go", "never")
        await session.rollback()
    assert await run.durable.emit_event("go", "really")
    assert (await run.wait(spawned)).output == "really"


async def test_emit_of_a_name_that_an_open_transaction_emits_holds_up_no_other_task(run: Runner):
    """Whether it is the first is known only when that transaction ends; only the task that asks has to wait."""

    async def step() -> int:
        return 1

    @task
    async def emits(ctx: TaskContext) -> bool:
        return await ctx.emit_event("contended", 2)

    @task
    async def others(ctx: TaskContext) -> int:
        total = sum([await ctx.step("step", step) for _ in range(3)])
        await ctx.emit_event(f"free-{ctx.task_id}")
        return total

    async with AsyncSession(run.durable.engine) as session:
        await run.durable.emit_event_with(session, "contended", 1)
        emitting = await run.spawn(emits)
        await Rows(run.durable, emitting).until("running")
        await asyncio.sleep(0.1)
        async with asyncio.timeout(8):
            for _ in range(3):
                assert await run(others) == 3
        assert (await run.durable.get_task_result(emitting)).status == "running"
        await session.commit()
    assert (await run.wait(emitting)).output is False


async def test_wait_that_was_left_behind_is_forgotten_with_its_task(run: Runner):
    """The loser of a race that the task has held is no wait any more, and keeps no event from being delivered."""
    registered = asyncio.Event()

    async def until_registered() -> None:
        await registered.wait()

    @task
    async def work(ctx: TaskContext) -> str:
        waiting = asyncio.create_task(ctx.await_event("abandoned"))
        await ctx.step("until registered", until_registered)
        waiting.cancel()
        return "done"

    spawned = await run.spawn(work)
    await eventually(Rows(run.durable, spawned).waits)
    registered.set()
    assert (await run.wait(spawned)).output == "done"
    assert await Rows(run.durable, spawned).waits() == []
    await run.durable.emit_event("abandoned")

    async def delivered() -> bool:
        async with run.durable.engine.connect() as connection:
            return (await connection.execute(select(Event.delivered_at))).scalar_one() is not None

    await eventually(delivered)


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
async def test_waits_of_a_task_that_ends_unhappily_are_forgotten(run: Runner, end: str):
    async def until_registered() -> None:
        await registered.wait()
        raise ValueError

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await asyncio.gather(ctx.await_event("abandoned"), ctx.step("until registered", until_registered))

    registered = asyncio.Event()
    spawned = await run.spawn(work)
    await eventually(Rows(run.durable, spawned).waits)
    if end == "fails":
        registered.set()
    else:
        await run.durable.cancel_task(spawned)
    await run.wait(spawned)
    assert await Rows(run.durable, spawned).waits() == []


@pytest.mark.slow
async def test_wait_that_is_given_up_does_not_wake_the_task(run: Runner, tally: Tally):
    async def until_registered() -> None:
        await registered.wait()

    @task
    async def work(ctx: TaskContext) -> Any:
        tally.add("entered")
        if not registered.is_set():
            waiting = asyncio.create_task(ctx.await_event("abandoned"))
            await ctx.step("until registered", until_registered)
            waiting.cancel()
        else:
            await ctx.step("until registered", until_registered)
        return await ctx.await_event("wanted")

    registered = asyncio.Event()
    spawned = await run.spawn(work)
    await eventually(Rows(run.durable, spawned).waits)
    registered.set()
    row = await Rows(run.durable, spawned).until("sleeping")
    assert [wait.event_name for wait in await Rows(run.durable, spawned).waits()] == ["wanted"]
    await run.durable.emit_event("abandoned")
    await run.durable.emit_event("later")
    await asyncio.sleep(0.3)
    assert (await Rows(run.durable, spawned).task()).fence == row.fence
    await run.durable.emit_event("wanted", 1)
    assert (await run.wait(spawned)).output == 1
    assert tally == ["entered", "entered"]
    assert await Rows(run.durable, spawned).checkpoints("abandoned") == []


async def test_wait_row_of_something_else_does_not_answer(run: Runner):
    """A row that does not belong there, such as a bug or a person would leave, concerns nobody."""

    @task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.await_event("wanted")

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    statement = text(
        "INSERT INTO durable.waits (task_id, key, kind, name, queue_name, event_name)"
        " VALUES (:id, gen_random_uuid(), 'event', 'stray', 'default', 'stray')"
    )
    async with run.durable.engine.begin() as connection:
        await connection.execute(statement, {"id": spawned.task_id})
    await run.durable.emit_event("stray", "wrong")

    async def only_the_own_one() -> bool:
        return [wait.event_name for wait in await Rows(run.durable, spawned).waits()] == ["wanted"]

    await eventually(only_the_own_one)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.emit_event("wanted", "right")
    assert (await run.wait(spawned)).output == "right"


async def test_waits_side_by_side_each_get_their_own(run: Runner):
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        async def wait(number: int) -> Any:
            try:
                return await ctx.await_event(f"event-{number}", timeout=None if number else 0.2)
            except TaskTimeout:
                return "timeout"

        return await asyncio.gather(*(wait(number) for number in range(4)))

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    for number in (3, 1, 2):
        await run.durable.emit_event(f"event-{number}", number)
    assert (await run.wait(spawned)).output == ["timeout", 1, 2, 3]


async def test_event_that_comes_during_a_step_of_another_branch_is_delivered_at_once(run: Runner, tally: Tally):
    release = asyncio.Event()

    async def long() -> str:
        await release.wait()
        return "long"

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        tally.add("entered")

        async def other() -> Any:
            found = await ctx.await_event("go")
            tally.add("delivered")
            release.set()
            return found

        return await asyncio.gather(ctx.step("long", long), other())

    spawned = await run.spawn(work)
    await eventually(Rows(run.durable, spawned).waits)
    await run.durable.emit_event("go", 1)
    assert (await run.wait(spawned)).output == ["long", 1]
    assert tally == ["entered", "delivered"]


async def test_timeout_during_a_step_of_another_branch_is_raised_in_time(run: Runner, tally: Tally):
    release = asyncio.Event()

    async def long() -> str:
        await release.wait()
        return "long"

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        tally.add("entered")

        async def other() -> Any:
            try:
                return await ctx.await_event("never", timeout=0.3)
            except TaskTimeout:
                release.set()
                return "timeout"

        found = await asyncio.gather(ctx.step("long", long), other())
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == ["long", "timeout"]
    assert tally == ["entered", "entered"]


async def test_plain_tasks_await_and_emit(run: Runner):
    @task
    def work(ctx: SyncTaskContext) -> list[Any]:
        found = [ctx.emit_event("mine", 1), ctx.await_event("mine"), ctx.await_event("theirs", type=Decimal)]
        try:
            ctx.await_event("never", timeout=0.1)
        except TaskTimeout:
            found.append("timeout")
        return [*found[:2], str(found[2]), found[3]]

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    await run.durable.emit_event("theirs", "1.50")
    assert (await run.wait(spawned)).output == [True, 1, "1.50", "timeout"]


async def test_emits_of_several_tasks_at_once_have_one_winner(run: Runner):
    @task
    async def work(ctx: TaskContext, number: int) -> bool:
        return await ctx.emit_event("race", number)

    spawned = [await run.spawn(work, number) for number in range(40)]
    results = [(await run.wait(each)).output for each in spawned]
    assert results.count(True) == 1
    async with run.durable.engine.connect() as connection:
        assert (await connection.execute(select(Event.payload))).scalar_one() == results.index(True)


async def test_row_that_somebody_holds_locked_is_woken_once_it_is_free(run: Runner):
    @task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.await_event("go")

    locked, free = await run.spawn(work), await run.spawn(work)
    for each in (locked, free):
        await Rows(run.durable, each).until("sleeping")
    async with run.durable.engine.connect() as connection, connection.begin():
        await connection.execute(update(TaskRow).where(TaskRow.task_id == locked.task_id).values(priority=0))
        await run.durable.emit_event("go", 1)
        assert (await run.wait(free)).output == 1
        assert (await run.durable.get_task_result(locked)).status == "sleeping"
    assert (await run.wait(locked)).output == 1


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.slow
async def test_thousands_of_races_between_emit_and_wait_lose_nothing(
    engine: Any, caplog: pytest.LogCaptureFixture, listen: bool
):
    """Each task waits for an event that is emitted at about that time, by clients and by other tasks."""
    count = 1500
    async with Durable(engine) as durable:

        @durable.task
        async def wait(ctx: TaskContext, number: int) -> Any:
            return await ctx.await_event(f"event-{number}")

        @durable.task
        async def emit(ctx: TaskContext, number: int) -> bool:
            return await ctx.emit_event(f"event-{number}", number)

        with caplog.at_level(logging.INFO, logger="durable_sa"):
            async with durable.worker(concurrency=60, listen=listen) as worker:
                spawned = []
                for start in range(0, count, 50):
                    numbers = range(start, start + 50)
                    batch = await durable.spawn_many([(wait, number) for number in numbers])
                    spawned += batch
                    await durable.spawn_many([(emit, number) for number in numbers if number % 2])
                    await asyncio.gather(
                        *(durable.emit_event(f"event-{number}", number) for number in numbers if number % 2 == 0)
                    )
                results = [await durable.wait_for_result(each, timeout=60) for each in spawned]
                repaired = worker.maintenance.repaired
    assert [result.output for result in results] == list(range(count))
    assert repaired == 0


@pytest.mark.slow
async def test_races_between_emit_and_timeout_end_in_one_of_the_two_for_good(engine: Any):
    count = 300
    async with Durable(engine) as durable, durable.worker(concurrency=100):

        @durable.task
        async def work(ctx: TaskContext, number: int) -> list[Any]:
            found: list[Any] = []
            for _ in range(2):
                try:
                    found.append(await ctx.await_event(f"event-{number}", timeout=0.2 if not found else 30))
                except TaskTimeout:
                    found.append("timeout")
            await ctx.sleep_for("nap", 0.01)
            return found

        spawned = await durable.spawn_many([(work, number) for number in range(count)])
        await asyncio.sleep(0.1)
        for number in range(count):
            await durable.emit_event(f"event-{number}", number)
        results = [(await durable.wait_for_result(each, timeout=30)).output for each in spawned]
    for number, found in enumerate(results):
        assert found in ([number, number], ["timeout", number])


@pytest.mark.slow
async def test_of_many_that_emit_a_name_at_the_same_time_one_is_the_first(engine: Any):
    everybody = asyncio.Barrier(20)

    async def meet() -> None:
        await everybody.wait()

    async with Durable(engine) as durable, durable.worker(concurrency=20):

        @durable.task
        async def emit(ctx: TaskContext, number: int) -> list[list[int]]:
            await ctx.step("meet", meet)
            won = await asyncio.gather(*(ctx.emit_event("race", [number, attempt]) for attempt in range(2)))
            return [[number, attempt] for attempt, first in enumerate(won) if first]

        spawned = await durable.spawn_many([(emit, number) for number in range(20)])
        winners = [(await durable.wait_for_result(each, timeout=30)).output for each in spawned]
        async with durable.engine.connect() as connection:
            stored = await connection.scalar(select(Event.payload))
    assert [winner for winner in winners if winner] == [[stored]]


@pytest.mark.parametrize("group", [False, True])
async def test_timeout_that_fails_an_attempt_is_waited_for_anew(run: Runner, group: bool):
    started = asyncio.Event()

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> Any:
        if ctx.attempt == 2:
            started.set()
        if not group:
            return await ctx.await_event("paid", timeout=0.05 if ctx.attempt == 1 else 30)
        async with asyncio.TaskGroup() as tasks:
            paid = tasks.create_task(ctx.await_event("paid", timeout=0.05 if ctx.attempt == 1 else 30))
        return await paid

    spawned = await run.spawn(work)
    await started.wait()
    assert await Rows(run.durable, spawned).checkpoints("paid") == []
    await run.durable.emit_event("paid", 5)
    assert (await run.wait(spawned)).output == 5


async def test_waits_that_time_out_together_fail_one_attempt(run: Runner):
    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> Any:
        timeout = 0.05 if ctx.attempt == 1 else 30
        return await asyncio.gather(*(ctx.await_event(name, timeout=timeout) for name in ("a", "b", "c")))

    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    await eventually(rows.runs)
    for name in ("a", "b", "c"):
        await run.durable.emit_event(name, name)
    assert (await run.wait(spawned)).output == ["a", "b", "c"]


async def test_timeout_of_a_failed_task_is_waited_for_anew_when_it_is_retried(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> Any:
        return await ctx.await_event("paid", timeout=0.05)

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).error.name == "TaskTimeout"
    await run.durable.emit_event("paid", 5)
    await run.durable.retry_task(spawned.task_id)
    assert (await run.wait(spawned)).output == 5


@pytest.mark.parametrize("synchronous", [False, True])
async def test_timeout_that_was_caught_stays(run: Runner, tally: Tally, synchronous: bool):
    @task("asynchronous", max_attempts=4)
    async def work(ctx: TaskContext) -> Any:
        try:
            await ctx.await_event("caught", timeout=0.05)
        except TaskTimeout as error:
            tally.add(ctx.attempt)
            if ctx.attempt == 1:
                raise Crash from error
        if ctx.attempt == 2:
            return await ctx.await_event("uncaught", timeout=0.05)
        return None

    @task("synchronous", max_attempts=4)
    def plain(ctx: SyncTaskContext) -> Any:
        try:
            ctx.await_event("caught", timeout=0.05)
        except TaskTimeout as error:
            tally.add(ctx.attempt)
            if ctx.attempt == 1:
                raise Crash from error
        if ctx.attempt == 2:
            return ctx.await_event("uncaught", timeout=0.05)
        return None

    spawned = await run.spawn(plain if synchronous else work)
    await eventually(lambda: 2 in tally)
    await run.durable.emit_event("caught", 5)
    await run.wait(spawned)
    assert set(tally) == {1, 2, 3}
    [row] = await Rows(run.durable, spawned).checkpoints("caught")
    assert row.status == "timeout"
    assert await Rows(run.durable, spawned).checkpoints("uncaught") == []
