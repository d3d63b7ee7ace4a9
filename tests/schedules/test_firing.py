"""Schedules that workers fire: each tick once, whoever is there and whatever happens."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import (
    CancellationPolicy,
    Durable,
    Hooks,
    InvalidConfiguration,
    InvalidCron,
    OutgoingSpawn,
    QueueNotFound,
    RetryStrategy,
    ScheduleFilter,
    ScheduleNotFound,
    SerializationError,
    TaskContext,
    TaskNotRegistered,
    TaskRow,
    TaskStatus,
    task,
)
from durable_sa.models import Schedule
from durable_sa.schedules import firing
from durable_sa.schedules.firing import Firing
from durable_sa.statements import queues, scheduling
from durable_sa.testing import time_travel
from tests.support import eventually

Sql = Callable[..., Awaitable[list[Any]]]


@task("report", max_attempts=3, retry_strategy=RetryStrategy.exponential(0.5, jitter=0.2))
async def report(ctx: TaskContext, day: str) -> dict[str, Any]:
    return dict(ctx.headers)


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    async with Durable(engine, tasks=[report]) as durable:
        yield durable


@pytest.fixture
def sql(engine: AsyncEngine) -> Sql:
    async def run(statement: Any, **parameters: Any) -> list[Any]:
        async with engine.begin() as connection:
            result = await connection.execute(
                sa.text(statement) if isinstance(statement, str) else statement, parameters
            )
            return list(result.all()) if result.returns_rows else []

    return run


async def create(durable: Durable, name: str = "s", **options: Any) -> None:
    chosen: dict[str, Any] = {"task": report, "params": "Monday", "cron_expression": "* * * * *", **options}
    await durable.create_schedule(name, **chosen)


async def make_due(sql: Sql, ago: timedelta = timedelta(), name: str = "s") -> datetime:
    """Let the next tick be the current minute, or so long before."""
    statement = (
        "UPDATE durable.schedules SET next_tick_at = date_trunc('minute', now()) - CAST(:ago AS interval)"
        " WHERE name = :name RETURNING next_tick_at"
    )
    row, *_ = await sql(statement, ago=ago, name=name)
    tick: datetime = row.next_tick_at
    return tick


async def fire_due(durable: Durable) -> tuple[list[Any], bool]:
    return await Firing(durable, durable.database).fire_due()


async def fired(durable: Durable) -> int:
    return len((await fire_due(durable))[0])


async def ticks(sql: Sql) -> list[datetime]:
    rows = await sql("SELECT idempotency_key FROM durable.tasks WHERE idempotency_key LIKE 'durable::s:%'")
    return sorted(datetime.fromisoformat(row.idempotency_key.removeprefix("durable::s:")) for row in rows)


@pytest.mark.slow
async def test_each_tick_has_one_task_however_many_workers_there_are(
    durable: Durable, database_url: URL, sql: Sql
) -> None:
    await create(durable, misfire="run_all")
    # The minute may end at any time from now on.
    (first,) = [row.next_tick_at for row in await sql("SELECT next_tick_at FROM durable.schedules")]
    others = [Durable(database_url, tasks=[report]) for _ in range(3)]
    async with time_travel(durable) as clock:
        workers = [await each.start_worker(listen=False, poll_interval=0.05) for each in (durable, *others)]
        for minute in range(5):
            await clock.move_to(first + timedelta(minutes=minute, seconds=30))
            for worker in workers:
                worker.clock_moved(worker._clock.now(), timedelta())

            async def enough(wanted: int = minute + 1) -> bool:
                return len(await ticks(sql)) >= wanted

            await eventually(enough)
        for worker in workers:
            await worker.shutdown()
    for each in others:
        await each.close()
    assert await ticks(sql) == [first + timedelta(minutes=minute) for minute in range(5)]
    assert [row.n for row in await sql("SELECT count(*) AS n FROM durable.tasks")] == [5]


@pytest.mark.slow
async def test_of_many_that_fire_the_same_tick_one_spawns(durable: Durable, database_url: URL, sql: Sql) -> None:
    await create(durable)
    engines = [create_async_engine(database_url) for _ in range(4)]
    clients = [Durable(engine, tasks=[report]) for engine in engines]
    for round_ in range(5):
        await make_due(sql, timedelta(minutes=round_))
        await sql("UPDATE durable.tasks SET idempotency_key = NULL")
        numbers = await asyncio.gather(*(fired(client) for client in clients * 2))
        assert sorted(numbers) == [0] * 7 + [1]
    for engine in engines:
        await engine.dispose()


async def test_a_task_says_what_it_was_spawned_by(durable: Durable, sql: Sql) -> None:
    await create(durable, headers={"mine": 1})
    tick = await make_due(sql)
    assert await fired(durable) == 1
    (row,) = await sql(sa.select(TaskRow.task_id, TaskRow.headers, TaskRow.queue_name))
    assert row.headers == {"mine": 1, "durable::scheduled_by": "s", "durable::cron": "* * * * *"}
    (schedule,) = await sql(sa.select(Schedule.last_tick_at, Schedule.last_task_id, Schedule.next_tick_at))
    assert schedule.last_tick_at == tick
    assert schedule.last_task_id == row.task_id
    assert schedule.next_tick_at > tick


@pytest.mark.parametrize(("misfire", "expected"), [("skip", 0), ("run_once", 1), ("run_all", 100)])
async def test_what_an_outage_of_three_hours_leaves_behind(
    durable: Durable, sql: Sql, misfire: Any, expected: int
) -> None:
    await create(durable, misfire=misfire, cron_expression="* * * * *" if misfire == "run_all" else "0 0 1 1 *")
    first = await make_due(sql, timedelta(hours=3))
    assert await fired(durable) == expected
    assert all(tick >= first for tick in await ticks(sql))
    assert await fired(durable) == 0
    (schedule,) = await sql(sa.select(Schedule.next_tick_at))
    assert schedule.next_tick_at is not None
    assert schedule.next_tick_at > datetime.now(UTC) - timedelta(minutes=1)


@pytest.mark.parametrize(("overlap", "expected"), [("allow", 2), ("skip", 1)])
async def test_a_tick_while_the_last_task_goes_on(durable: Durable, sql: Sql, overlap: Any, expected: int) -> None:
    await create(durable, overlap=overlap)
    await make_due(sql, timedelta(minutes=2))
    assert await fired(durable) == 1
    await sql("UPDATE durable.tasks SET idempotency_key = NULL")
    await make_due(sql)
    assert await fired(durable) == expected - 1
    async with durable.worker():
        for row in await sql(sa.select(TaskRow.task_id)):
            await durable.wait_for_result(row.task_id, timeout=10)
    await sql("UPDATE durable.tasks SET idempotency_key = NULL")
    await make_due(sql)
    assert await fired(durable) == 1


async def test_ticks_are_left_out_for_as_long_as_the_last_task_goes_on(durable: Durable, sql: Sql) -> None:
    await create(durable, overlap="skip")
    numbers = []
    for ago in range(4, -1, -1):
        await make_due(sql, timedelta(minutes=ago))
        numbers.append(await fired(durable))
    assert numbers == [1, 0, 0, 0, 0]
    (first,) = await sql(sa.select(TaskRow.task_id))
    (schedule,) = await sql(sa.select(Schedule.last_task_id))
    assert schedule.last_task_id == first.task_id


async def test_ticks_that_are_made_up_for_do_not_overlap_either(durable: Durable, sql: Sql) -> None:
    await create(durable, overlap="skip", misfire="run_all")
    latest = await make_due(sql)
    await make_due(sql, timedelta(minutes=30))
    assert await fired(durable) == 1
    assert await ticks(sql) == [latest]


class Shout(Hooks):
    def on_spawn(self, spawn: OutgoingSpawn) -> None:
        spawn.headers["fired-by"] = "another"


async def test_whoever_fires_it_spawns_what_its_author_defined(engine: AsyncEngine, sql: Sql) -> None:
    author = Durable(engine, tasks=[report], default_cancellation=CancellationPolicy(max_running_time=60))
    stranger = Durable(
        engine,
        hooks=[Shout()],
        default_max_attempts=99,
        default_retry_strategy=RetryStrategy.none(),
        default_cancellation=CancellationPolicy(max_pending_time=1),
    )

    @stranger.task("report", max_attempts=77, retry_strategy=RetryStrategy.fixed(1))
    async def another(ctx: TaskContext, day: int) -> None:
        pass

    by_hand = await author.spawn(report, "Monday", priority=4, delay=7)
    await create(author, priority=4, delay=7)
    await make_due(sql)
    assert await fired(stranger) == 1
    await stranger.trigger_schedule("s")
    columns = (
        "queue_name, task_name, params::text, priority, max_attempts, retry_kind, retry_base_delay, retry_factor,"
        " retry_max_backoff, retry_jitter, max_pending_time, max_running_time, available_at - created_at AS delay"
    )
    rows = await sql(f"SELECT task_id, headers, {columns} FROM durable.tasks ORDER BY task_id")
    assert rows[0].task_id == by_hand.task_id
    assert [tuple(row)[2:] for row in rows[1:]] == [tuple(rows[0])[2:]] * 2
    assert [row.headers["fired-by"] for row in rows[1:]] == ["another"] * 2
    (info,) = await author.list_schedules()
    assert {**info.spawn_options, "retry_strategy": None, "cancellation": None} == {
        "queue_name": "default",
        "max_attempts": 3,
        "priority": 4,
        "delay": 7,
        "retry_strategy": None,
        "cancellation": None,
    }


class Interrupted:
    """Does something between two statements, or loses the reply to one."""

    def __init__(self, durable: Durable, before: Callable[[], Awaitable[object]] | None = None) -> None:
        self._durable = durable
        self._before = before

    async def execute(self, statement: Any, parameters: Mapping[str, Any] | None = None) -> Any:
        if statement is not scheduling.FIRE:
            return await self._durable.database.execute(statement, parameters)
        if self._before is not None:
            await self._before()
            return await self._durable.database.execute(statement, parameters)
        await self._durable.database.execute(statement, parameters)
        raise ConnectionError("the reply is lost")


async def test_a_worker_that_dies_after_firing_neither_doubles_nor_misses_a_tick(durable: Durable, sql: Sql) -> None:
    await create(durable)
    tick = await make_due(sql)
    with pytest.raises(ConnectionError):
        await Firing(durable, Interrupted(durable)).fire_due()
    assert await ticks(sql) == [tick]
    assert await fired(durable) == 0


async def test_a_tick_is_compared_with_what_became_of_the_schedule_meanwhile(durable: Durable, sql: Sql) -> None:
    async def pause_and_resume() -> None:
        await durable.pause_schedule("s")
        await durable.resume_schedule("s")

    for interfere in (
        lambda: durable.pause_schedule("s"),
        lambda: durable.delete_schedule("s"),
        lambda: fire_due(durable),
        lambda: create(durable, cron_expression="0 0 1 1 *"),
        lambda: create(durable, params="Tuesday"),
        pause_and_resume,
    ):
        await create(durable)
        await durable.resume_schedule("s")
        await make_due(sql)
        await sql("DELETE FROM durable.tasks")
        spawned, _ = await Firing(durable, Interrupted(durable, interfere)).fire_due()
        assert spawned == []


async def test_a_pause_is_not_made_up_for(durable: Durable, sql: Sql) -> None:
    await create(durable, misfire="run_all")
    await make_due(sql, timedelta(hours=1))
    await durable.pause_schedule("s")
    assert await fired(durable) == 0
    await durable.resume_schedule("s")
    assert await fired(durable) == 0
    assert await ticks(sql) == []


async def test_to_resume_what_is_not_paused_leaves_out_no_tick(durable: Durable, sql: Sql) -> None:
    await create(durable)
    tick = await make_due(sql)
    await durable.resume_schedule("s")
    assert await fired(durable) == 1
    assert await ticks(sql) == [tick]


async def test_it_is_resumed_with_the_ticks_that_it_has_by_then(
    durable: Durable, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(durable)
    await durable.pause_schedule("s")
    redefined = asyncio.Event()
    execute = durable.database.execute

    async def interrupted(statement: Any, parameters: Any = None) -> Any:
        rows = await execute(statement, parameters)
        if statement is scheduling.LIST_SCHEDULES and not redefined.is_set():
            redefined.set()
            await create(durable, cron_expression="0 0 1 1 *")
        return rows

    monkeypatch.setattr(durable.database, "execute", interrupted)
    await durable.resume_schedule("s")
    (schedule,) = await sql(sa.select(Schedule.next_tick_at, Schedule.paused_at))
    assert (schedule.next_tick_at.month, schedule.next_tick_at.day, schedule.paused_at) == (1, 1, None)


async def test_a_schedule_goes_with_its_queue_also_if_they_cross(durable: Durable, sql: Sql) -> None:
    await durable.create_queue("mail")
    async with durable.database.transaction() as connection:
        # What a definition does, while another process drops the queue.
        await connection.execute(queues.LOCK_QUEUE, {"queue_name": "mail"})
        dropping = asyncio.create_task(durable.drop_queue("mail"))

        async def waiting() -> bool:
            return bool(await sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

        await eventually(waiting)
        await connection.execute(
            sa.text(
                "INSERT INTO durable.schedules (name, queue_name, task_name, cron_expression)"
                " VALUES ('s', 'mail', 'report', '* * * * *')"
            )
        )
    await dropping
    assert await durable.list_schedules() == []
    with pytest.raises(QueueNotFound):
        await create(durable, queue_name="mail")


async def test_a_deploy_that_defines_it_again_misses_no_tick(durable: Durable, sql: Sql) -> None:
    await create(durable)
    tick = await make_due(sql)
    await create(durable, params="Tuesday")
    assert await fired(durable) == 1
    assert await ticks(sql) == [tick]
    assert [row.params for row in await sql("SELECT params FROM durable.tasks")] == ["Tuesday"]
    await make_due(sql)
    await create(durable, cron_expression="0 0 1 1 *")
    assert await fired(durable) == 0


async def test_one_that_cannot_be_fired_keeps_none_of_the_others(
    durable: Durable, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    await create(durable, "bad")
    await create(durable)
    await make_due(sql, timedelta(minutes=1), name="bad")
    await make_due(sql)
    await sql("UPDATE durable.schedules SET timezone = 'Mars/Base' WHERE name = 'bad'")
    rows, moved = await fire_due(durable)
    assert (len(rows), moved) == (1, True)
    assert (await fire_due(durable)) == ([], False)
    assert "schedule bad of queue default cannot be fired by this worker" in caplog.text


@pytest.mark.slow
async def test_any_number_that_cannot_be_fired_holds_up_no_tick_of_the_others(
    durable: Durable, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    await create(durable, cron_expression="* * * * * *", misfire="run_all")
    await sql(
        "INSERT INTO durable.schedules (name, queue_name, task_name, cron_expression, next_tick_at)"
        " SELECT 'bad-' || n, 'default', 'report', 'garbage', now() - interval '1 hour' FROM generate_series(1, 250) n"
    )
    async with durable.worker() as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)

        async def four() -> bool:
            return len(await ticks(sql)) >= 4

        await eventually(four, within=8)
    # Each in its time, as if there were no others.
    rows = await sql("SELECT created_at, idempotency_key FROM durable.tasks ORDER BY created_at")
    for row in rows[1:]:
        tick = datetime.fromisoformat(row.idempotency_key.removeprefix("durable::s:"))
        assert row.created_at - tick < timedelta(seconds=2)
    # And each is said once.
    assert caplog.text.count("cannot be fired by this worker") == 250


async def test_queues_may_have_schedules_of_the_same_name(durable: Durable, engine: AsyncEngine, sql: Sql) -> None:
    await durable.create_queue("east")
    await durable.create_queue("west")
    async with (
        Durable(engine, tasks=[report], queue_name="east") as east,
        Durable(engine, tasks=[report], queue_name="west") as west,
    ):
        await create(east, "nightly", cron_expression="0 3 * * *")
        await create(west, "nightly", cron_expression="0 4 * * *", params="Friday")
        await create(durable, "hourly", queue_name="west", cron_expression="0 * * * *")

        async def found(client: Durable, *chosen: ScheduleFilter) -> list[tuple[str, str, str]]:
            return [(i.queue_name, i.name, i.cron_expression) for i in await client.list_schedules(*chosen)]

        assert await found(east) == [("east", "nightly", "0 3 * * *")]
        assert await found(durable) == []
        everything = [
            ("west", "hourly", "0 * * * *"),
            ("east", "nightly", "0 3 * * *"),
            ("west", "nightly", "0 4 * * *"),
        ]
        assert await found(east, ScheduleFilter(queue_name=None)) == everything
        assert await found(east, ScheduleFilter(queue_name="west")) == [everything[0], everything[2]]

        # Each has ticks of its own, also at the same moment and on two pages.
        assert await make_due(sql, name="nightly") == (await make_due(sql, name="hourly"))
        assert await fired(durable) == 3
        rows = await sql("SELECT queue_name, params::text FROM durable.tasks ORDER BY 1, 2")
        assert [tuple(row) for row in rows] == [("east", '"Monday"'), ("west", '"Friday"'), ("west", '"Monday"')]

        # What is done to one leaves the other as it is.
        await west.pause_schedule("nightly")
        await make_due(sql, timedelta(minutes=1), name="nightly")
        assert await fired(durable) == 1
        await durable.resume_schedule("nightly", queue_name="west")
        await create(west, "nightly", cron_expression="0 5 * * *")
        triggered = await durable.trigger_schedule("nightly", queue_name="west")
        (row,) = await sql(sa.select(TaskRow.queue_name).where(TaskRow.task_id == triggered.task_id))
        assert row.queue_name == "west"
        for call in (durable.delete_schedule, durable.pause_schedule, durable.trigger_schedule):
            with pytest.raises(ScheduleNotFound, match=r"in queue 'default'. Queues that have one: 'east', 'west'"):
                await call("nightly")
        await east.delete_schedule("nightly")
        with pytest.raises(ScheduleNotFound, match="'east'"):
            await durable.delete_schedule("nightly", queue_name="east")
        assert await found(east, ScheduleFilter()) == [everything[0], ("west", "nightly", "0 5 * * *")]


async def test_schedules_of_the_same_name_fire_on_several_pages(
    durable: Durable, engine: AsyncEngine, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "PAGE", 2)
    for queue in ("a", "b", "c", "d", "e"):
        await durable.create_queue(queue)
        await create(durable, queue_name=queue)
    await make_due(sql)
    assert await fired(durable) == 5


async def test_a_schedule_that_somebody_holds_locked_holds_up_nothing(
    durable: Durable, engine: AsyncEngine, sql: Sql
) -> None:
    await create(durable, "held")
    await create(durable)
    held = await make_due(sql, timedelta(minutes=1), name="held")
    async with engine.connect() as connection, connection.begin():
        await connection.execute(sa.select(Schedule.name).where(Schedule.name == "held").with_for_update())
        tick = await make_due(sql)
        async with durable.worker():

            async def there() -> bool:
                return await ticks(sql) == [tick]

            await eventually(there, within=8)
            await connection.rollback()

            async def free() -> bool:
                (row,) = await sql("SELECT last_tick_at FROM durable.schedules WHERE name = 'held'")
                return row.last_tick_at is not None and row.last_tick_at >= held

            await eventually(free)


async def test_a_list_that_cannot_be_read_names_the_schedule(durable: Durable, sql: Sql) -> None:
    await create(durable, "good")
    await create(durable, "bad")
    await sql("UPDATE durable.schedules SET params = (repeat('[', 3000) || repeat(']', 3000))::json WHERE name = 'bad'")
    with pytest.raises(SerializationError, match="The params of schedule 'bad' cannot be read back"):
        await durable.list_schedules()


async def test_it_is_triggered_besides_its_ticks(durable: Durable) -> None:
    await create(durable, cron_expression="0 0 1 1 *")
    spawned = [await durable.trigger_schedule("s") for _ in range(2)]
    assert len({each.task_id for each in spawned}) == 2
    async with durable.worker():
        result = await durable.wait_for_result(spawned[1], timeout=10)
    assert result.status is TaskStatus.COMPLETED
    assert result.output == {"durable::scheduled_by": "s", "durable::cron": "0 0 1 1 *"}


@pytest.mark.slow
async def test_a_schedule_of_seconds_fires_every_second(durable: Durable, sql: Sql) -> None:
    await create(durable, cron_expression="* * * * * *")
    async with durable.worker():

        async def three() -> bool:
            return len(await ticks(sql)) >= 3

        await eventually(three)
    found = await ticks(sql)
    assert [later - earlier for earlier, later in zip(found, found[1:], strict=False)] == [timedelta(seconds=1)] * (
        len(found) - 1
    )


async def test_they_are_listed_by_what_they_are(durable: Durable) -> None:
    await create(durable, "b", metadata={"team": "mail", "tags": ["x", "y"]}, timezone="Europe/Berlin")
    await create(durable, "a")

    async def names(**chosen: Any) -> list[str]:
        return [info.name for info in await durable.list_schedules(ScheduleFilter(**chosen))]

    assert await names() == ["a", "b"]
    assert await names(metadata={"team": "mail"}) == ["b"]
    assert await names(metadata={"tags": ["y"]}) == ["b"]
    assert await names(metadata={"team": "web"}) == []
    assert await names(task_name="report") == ["a", "b"]
    assert await names(task_name="other") == []
    with pytest.raises(SerializationError, match="metadata to look for"):
        await names(metadata={"team": "\0"})
    (info,) = await durable.list_schedules(ScheduleFilter(metadata={"team": "mail"}))
    assert (info.timezone, info.params, info.backend, info.pgcron_job_name) == (
        "Europe/Berlin",
        "Monday",
        "worker",
        None,
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cron_expression": "nonsense"}, InvalidCron, "'nonsense'"),
        ({"cron_expression": "0 0 30 2 *"}, InvalidCron, "day-of-month"),
        ({"timezone": "Mars/Base"}, InvalidConfiguration, "there is no time zone 'Mars/Base'"),
        ({"misfire": "sometimes"}, InvalidConfiguration, "misfire: 'sometimes' is none of skip, run_once, run_all"),
        ({"overlap": "queue"}, InvalidConfiguration, "overlap: 'queue' is none of allow, skip"),
        ({"backend": "cron"}, InvalidConfiguration, "backend: 'cron' is none of worker, pg_cron"),
        ({"idempotency_key": "k"}, InvalidConfiguration, "spawns a task at every tick"),
        ({"queue_name": "nowhere"}, QueueNotFound, "nowhere"),
        ({"task": "unknown"}, TaskNotRegistered, "unknown"),
        ({"metadata": {"team": ["a\0b"]}}, SerializationError, "metadata of a schedule cannot be stored"),
        ({"metadata": ["mail"]}, InvalidConfiguration, "metadata: it must be a Mapping, not list"),
    ],
)
async def test_what_cannot_be_is_refused_at_its_definition(
    durable: Durable, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        await create(durable, **options)
    assert await durable.list_schedules() == []


async def test_what_is_not_there_is_said_to_be_missing(durable: Durable) -> None:
    for call in (
        durable.delete_schedule,
        durable.pause_schedule,
        durable.resume_schedule,
        durable.trigger_schedule,
    ):
        with pytest.raises(ScheduleNotFound):
            await call("nope")
