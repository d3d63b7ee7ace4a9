"""Rows that somebody has changed by hand: they fail by themselves, once, and stop nobody else."""

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from durable_sa import Durable, RetryStrategy, SerializationError, StreamItem, TaskContext, TaskStatus

from ..support import eventually

HOSTILE = {
    "params of another type": "params = '\"garbage\"'",
    "params that are not there": "params = NULL",
    "numbers beyond all limits": "params = (repeat('9', 6000))::json",
    "depth without end": "params = (repeat('[', 3000) || repeat(']', 3000))::json",
    "half a surrogate": """params = '{"number": 1, "text": "\\ud800"}'""",
    "an attempt beyond all limits": "attempt = 2147483647",
    "a fence beyond all limits": "fence = 9223372036854775807",
    "headers that are none": "headers = '[1]'",
    "a name that nobody knows": "task_name = 'unknown'",
}
NEVER_CLAIMED = {"an attempt beyond all limits", "a fence beyond all limits", "a name that nobody knows"}
HARMLESS = {"headers that are none"}


async def test_rows_that_cannot_be_read_fail_alone(durable: Durable, engine: AsyncEngine) -> None:
    executed = 0

    @durable.task
    async def work(ctx: TaskContext, params: dict[str, int | str]) -> int:
        nonlocal executed
        executed += 1
        return executed

    good = [await durable.spawn(work, {"number": number}) for number in range(5)]
    bad = {what: await durable.spawn(work, {"number": 0}) for what in HOSTILE}
    good += [await durable.spawn(work, {"number": number}) for number in range(5)]
    async with engine.begin() as connection:
        for what, change in HOSTILE.items():
            statement = text(f"UPDATE durable.tasks SET {change.replace(':', chr(92) + ':')} WHERE task_id = :task_id")
            await connection.execute(statement, {"task_id": bad[what].task_id})

    async with durable.worker(concurrency=20):
        for spawned in good:
            assert (await durable.wait_for_result(spawned, timeout=10)).error is None
        for what, spawned in bad.items():
            if what in NEVER_CLAIMED:
                continue
            result = await durable.wait_for_result(spawned, timeout=10)
            if what not in HARMLESS:
                assert result.error is not None, what
                assert result.error.name in ("InvalidTaskParams", "SerializationError"), (what, result.error)
                assert "999" not in result.error.message
    async with engine.connect() as connection:
        rows = (await connection.execute(text("SELECT task_id, state, failures FROM durable.tasks"))).all()
    found = {row.task_id: (row.state, row.failures) for row in rows}
    for what, spawned in bad.items():
        expected: Any = ("failed", 1)
        if what in NEVER_CLAIMED:
            expected = ("pending", 0)
        elif what in HARMLESS:
            expected = ("completed", 0)
        assert found[spawned.task_id] == expected, what


@pytest.mark.parametrize(
    "change", ["state = 'garbage'", "available_at = 'infinity'", "cancel_at = '-infinity'", "finished_at = now()"]
)
async def test_rows_that_would_stop_a_worker_or_hide_from_all_cannot_be_written(
    durable: Durable, engine: AsyncEngine, change: str
) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None: ...

    await durable.spawn(work)
    async with engine.begin() as connection:
        with pytest.raises(IntegrityError):
            await connection.execute(text(f"UPDATE durable.tasks SET {change}"))


NONSENSE = {
    "retry_base_delay = 'NaN', retry_kind = 'exponential'": 1,
    "retry_base_delay = '-Infinity', retry_kind = 'exponential'": 2,
    "retry_factor = 'Infinity', retry_kind = 'exponential', retry_max_backoff = 0": 2,
    "retry_factor = 'NaN', retry_kind = 'exponential', retry_max_backoff = 0": 2,
    "retry_factor = -1, retry_kind = 'exponential', retry_max_backoff = 0": 2,
    "retry_max_backoff = 'NaN', retry_kind = 'fixed', retry_base_delay = 0": 2,
    "retry_max_backoff = -1, retry_kind = 'fixed'": 2,
    "retry_jitter = 'NaN', retry_kind = 'fixed', retry_max_backoff = 0": 2,
    "retry_jitter = -1e300, retry_kind = 'fixed', retry_max_backoff = 0": 2,
    "retry_kind = 'linear', retry_max_backoff = 0": 2,
    "max_attempts = 0": 1,
    "max_attempts = -2147483648": 1,
    "max_running_time = '1000000 years', retry_max_backoff = 0": 2,
    "max_running_time = '-1000000 years'": None,
    "max_pending_time = '1000000 years', retry_max_backoff = 0": 2,
    "task_name = ''": None,
    "idempotency_key = ''": 2,
}
"""Changes to the policy of a task that fails, and its attempts within a moment; None of one that is not to be run."""


async def test_policies_that_make_no_sense_stop_nobody(durable: Durable, engine: AsyncEngine) -> None:
    attempts: dict[int, int] = {}

    @durable.task(max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
    async def work(ctx: TaskContext, number: int) -> int:
        attempts[number] = attempts.get(number, 0) + 1
        if number < len(NONSENSE):
            raise ValueError(number)
        return number

    spawned = [await durable.spawn(work, number) for number in range(len(NONSENSE) + 3)]
    async with engine.begin() as connection:
        for task, change in zip(spawned, NONSENSE, strict=False):
            await connection.execute(
                text(f"UPDATE durable.tasks SET {change} WHERE task_id = :task_id"), {"task_id": task.task_id}
            )
    async with durable.worker(concurrency=20):
        for number, task in enumerate(spawned[len(NONSENSE) :], len(NONSENSE)):
            assert (await durable.wait_for_result(task, timeout=10)).output == number
        wanted = {number: count for number, count in enumerate(NONSENSE.values()) if count is not None}
        await eventually(lambda: {number: attempts.get(number) for number in wanted} == wanted)


async def test_a_task_with_a_limit_beyond_the_calendar_is_retried(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None: ...

    spawned = await durable.spawn(work)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE durable.tasks SET max_pending_time = '1000000 years'"))
    await durable.cancel_task(spawned)
    assert await durable.retry_task(spawned) is TaskStatus.PENDING


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE durable.queues SET retention = '300000 years'",
        "UPDATE durable.queues SET event_retention = '-1 s'",
        "INSERT INTO durable.workers VALUES (gen_random_uuid(), 'w', '{NULL}', '1 s', now(), now(), now())",
        "INSERT INTO durable.workers VALUES (gen_random_uuid(), 'w', '{{a},{b}}', '1 s', now(), now(), now())",
    ],
)
async def test_rows_that_would_stop_maintenance_cannot_be_written(
    durable: Durable, engine: AsyncEngine, change: str
) -> None:
    async with engine.begin() as connection:
        with pytest.raises(DBAPIError):
            await connection.exec_driver_sql(change)


BEYOND = "fence = 9223372036854775807"
FAMILIES = {
    "an overdue task": f"UPDATE durable.tasks SET {BEYOND}, cancel_at = now() WHERE task_id = '{{bad}}'",
    "a child of what has failed": f"UPDATE durable.tasks SET {BEYOND}, parent_task_id = '{{ended}}' WHERE task_id = '{{bad}}'",
    "a run of nobody": f"UPDATE durable.tasks SET {BEYOND}, state = 'running', claimed_by = task_id WHERE task_id = '{{bad}}'",
    "a waiter whose event came": f"""
        UPDATE durable.tasks SET {BEYOND}, state = 'sleeping', available_at = NULL WHERE task_id = '{{bad}}';
        INSERT INTO durable.waits (task_id, key, kind, name, queue_name, event_name)
            VALUES ('{{bad}}', gen_random_uuid(), 'event', 'bad', 'default', 'bad');
        INSERT INTO durable.events (queue_name, name, payload) VALUES ('default', 'bad', '1')
        """,
    "a fence below all": "UPDATE durable.tasks SET fence = -5, available_at = now() WHERE task_id = '{bad}'",
    "its own parent": "UPDATE durable.tasks SET parent_task_id = task_id WHERE task_id IN ('{bad}', '{ended}')",
    "parents of each other": """
        UPDATE durable.tasks SET parent_task_id = '{other}' WHERE task_id = '{ended}';
        UPDATE durable.tasks SET parent_task_id = '{ended}', state = 'completed', outcome = 'completed',
            finished_at = now() - interval '1 s' WHERE task_id = '{other}';
        UPDATE durable.tasks SET parent_task_id = '{other}' WHERE task_id = '{bad}'
        """,
    "parents of each other that have completed": """
        UPDATE durable.tasks SET state = 'completed', outcome = 'completed' WHERE task_id = '{ended}';
        UPDATE durable.tasks SET parent_task_id = '{other}' WHERE task_id = '{ended}';
        UPDATE durable.tasks SET parent_task_id = '{ended}', state = 'completed', outcome = 'completed',
            finished_at = now() - interval '1 s' WHERE task_id = '{other}';
        UPDATE durable.tasks SET parent_task_id = '{other}' WHERE task_id = '{bad}'
        """,
}


@pytest.mark.parametrize("change", FAMILIES.values(), ids=FAMILIES)
async def test_what_a_worker_does_besides_running_tasks_goes_on(
    durable: Durable, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Limits, events, cascades, runs of the dead, schedules and what is past its retention."""
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_INTERVAL", 0.2)
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_PAUSE_RATIO", 0)
    monkeypatch.setattr("durable_sa.worker.maintenance.RETENTION_INTERVAL", 0.2)

    @durable.task
    async def work(ctx: TaskContext) -> None:
        await ctx.step("one", str)

    @durable.task
    async def waiter(ctx: TaskContext) -> int:
        return await ctx.await_event("signal", type=int)

    await durable.create_queue("old", retention=0)
    names = ("bad", "ended", "other", "overdue", "child", "left", "old")
    ids = {name: (await durable.spawn(work, delay=3600)).task_id for name in names}
    running = "state = 'running', attempt = 1, fence = 1, available_at = now(), claimed_by = gen_random_uuid()"
    columns = "name, queue_name, task_name, cron_expression, next_tick_at"
    ended = "state = 'failed', outcome = 'failed', finished_at = now() - interval '1 s'"
    async with engine.begin() as connection:
        for statement in (
            f"UPDATE durable.tasks SET {ended} WHERE task_id = '{ids['ended']}'",
            *change.format_map(ids).split(";"),
            f"UPDATE durable.tasks SET cancel_at = now() WHERE task_id = '{ids['overdue']}'",
            f"UPDATE durable.tasks SET {running} WHERE task_id = '{ids['left']}'",
            f"UPDATE durable.tasks SET {ended}, queue_name = 'old' WHERE task_id = '{ids['old']}'",
            f"UPDATE durable.tasks SET parent_task_id = '{ids['old']}' WHERE task_id = '{ids['child']}'",
            f"INSERT INTO durable.schedules ({columns}) VALUES ('due', 'default', 'work', '0 0 1 1 *', now())",
        ):
            await connection.exec_driver_sql(statement)

    async with durable.worker(concurrency=5):
        waiting = await durable.spawn(waiter)
        await durable.emit_event("signal", 7)
        assert (await durable.wait_for_result(waiting, timeout=10)).output == 7
        assert (await durable.wait_for_result(ids["overdue"], timeout=10)).status is TaskStatus.CANCELLED
        assert (await durable.wait_for_result(ids["child"], timeout=10)).status is TaskStatus.CANCELLED
        assert (await durable.wait_for_result(ids["left"], timeout=10)).status is TaskStatus.COMPLETED

        async def fired() -> bool:
            async with engine.connect() as connection:
                ticks = text("SELECT 1 FROM durable.schedules WHERE last_tick_at IS NOT NULL")
                return (await connection.execute(ticks)).first() is not None

        await eventually(fired)
        await durable.cancel_task(ids["bad"])
        await durable.cleanup_tasks(0)


@pytest.mark.parametrize("failures", [2**31 - 1, -(2**31)])
async def test_a_count_of_failures_beyond_all_limits_is_no_reason_not_to_fail(
    durable: Durable, engine: AsyncEngine, failures: int
) -> None:
    @durable.task(max_attempts=5, retry_strategy=RetryStrategy.exponential(1e-3, factor=1000, max_backoff=0.01))
    async def fail(ctx: TaskContext) -> None:
        if ctx.attempt < 3:
            raise ValueError("no")

    spawned = await durable.spawn(fail)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(f"UPDATE durable.tasks SET failures = {failures}")
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status is (TaskStatus.FAILED if failures > 0 else TaskStatus.COMPLETED)


async def test_orphaned_waits_and_lost_runs_are_no_obstacle(durable: Durable, engine: AsyncEngine) -> None:
    """A wait whose task is gone, and an ended attempt that is missing."""

    @durable.task
    async def waiter(ctx: TaskContext) -> int:
        return await ctx.await_event("signal", type=int)

    async with durable.worker():
        gone, stays = await durable.spawn(waiter), await durable.spawn(waiter)

        async def waiting() -> bool:
            async with engine.connect() as connection:
                return (await connection.execute(text("SELECT count(*) FROM durable.waits"))).scalar() == 2

        await eventually(waiting)
        async with engine.begin() as connection:
            for table in ("tasks", "runs"):
                await connection.execute(
                    text(f"DELETE FROM durable.{table} WHERE task_id = :task_id"), {"task_id": gone.task_id}
                )
        await durable.emit_event("signal", 7)
        assert (await durable.wait_for_result(stays, timeout=10)).output == 7


HOSTILE_MESSAGES = {
    "a number beyond all limits": "payload = (repeat('9', 6000))::json",
    "depth without end": "payload = (repeat('[', 3000) || repeat(']', 3000))::json",
    "half a surrogate": """payload = '"\\ud800"'""",
    "of all time": "sent_at = '-infinity'",
    "of the end of time": "sent_at = 'infinity', delivered_at = '-infinity'",
    "nothing at all": "payload = NULL",
}
READABLE_MESSAGES = {"of all time", "of the end of time", "nothing at all"}


@pytest.mark.parametrize("racing", [False, True])
async def test_messages_that_cannot_be_read_fail_their_receivers_alone(
    durable: Durable, engine: AsyncEngine, racing: bool
) -> None:
    @durable.task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        await ctx.publish("state", "waiting")
        message = ctx.receive("note", type=str | None)
        if racing:
            await ctx.race("note", note=message, late=ctx.sleep_for("late", 60))
        else:
            await message
        return "received"

    good = [await durable.spawn(work) for _ in range(5)]
    bad = {what: await durable.spawn(work) for what in HOSTILE_MESSAGES}
    for each in (*good, *bad.values()):
        await durable.send(each, "note", "hello")
    async with engine.begin() as connection:
        for what, change in HOSTILE_MESSAGES.items():
            statement = text(
                f"UPDATE durable.messages SET {change.replace(':', chr(92) + ':')} WHERE task_id = :task_id"
            )
            await connection.execute(statement, {"task_id": bad[what].task_id})
    async with durable.worker(concurrency=20):
        for each in good:
            assert (await durable.wait_for_result(each, timeout=10)).output == "received"
        for what, each in bad.items():
            result = await durable.wait_for_result(each, timeout=10)
            if what in READABLE_MESSAGES:
                assert result.output == "received", what
            else:
                assert result.error is not None, what
                assert result.error.name == "SerializationError", (what, result.error)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE durable.task_values SET version = 9223372036854775807, value = '[1]'"))
    with pytest.raises(SerializationError):
        await durable.get_value(good[0], "state", type=str)
    assert await durable.get_value(good[0], "state") == [1]


HOSTILE_STREAMS = {
    "all positions reserved": "reserved = 9223372036854775807, last_position = 9223372036854775807",
    "positions before the first": "reserved = -9223372036854775808, last_position = -9223372036854775808",
    "begun after the end": "began_after = 9223372036854775807",
    "restarts without an end": "restarts_after = '{1,null,3}', restarts_through = '{}'",
    "restarts to nowhere": "restarts_after = NULL, restarts_through = '{-1,9223372036854775807}'",
    "of the end of time": "opened_at = 'infinity', closed_at = NULL",
    "of another block": "block_id = gen_random_uuid()",
}


async def test_rows_of_streams_that_make_no_sense_stop_no_others(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None:
        for part in ("first", "second"):
            await ctx.step(part, lambda: write(ctx))
            await ctx.receive("go on")
        async with ctx.stream("stream") as stream:
            await stream.write("last")

    async def write(ctx: TaskContext) -> None:
        async with ctx.stream("stream", keep_open=True) as stream:
            await stream.write("item")

    good = [await durable.spawn(work) for _ in range(5)]
    bad = {what: await durable.spawn(work) for what in HOSTILE_STREAMS}
    async with durable.worker(concurrency=20):
        for step in range(2):
            async with engine.connect() as connection:

                async def waiting(connection: AsyncConnection = connection, step: int = step) -> bool:
                    statement = text(
                        "SELECT count(*) FROM durable.checkpoints WHERE kind = 'step' AND status = 'completed'"
                    )
                    return await connection.scalar(statement) == (step + 1) * (len(good) + len(bad))

                await eventually(waiting)
            async with engine.begin() as connection:
                for what, change in HOSTILE_STREAMS.items():
                    statement = text(f"UPDATE durable.streams SET {change} WHERE task_id = :task_id")
                    await connection.execute(statement, {"task_id": bad[what].task_id})
            for each in (*good, *bad.values()):
                await durable.send(each, "go on")
        for each in good:
            assert (await durable.wait_for_result(each, timeout=10)).status is TaskStatus.COMPLETED
            items = [entry async for entry in durable.read_stream(each, "stream")]
            assert items == [StreamItem(1, "item"), StreamItem(2, "item"), StreamItem(3, "last")]
        for what, each in bad.items():
            assert (await durable.wait_for_result(each, timeout=10)).status is TaskStatus.COMPLETED, what
