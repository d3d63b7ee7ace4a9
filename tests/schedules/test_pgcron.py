"""Schedules that the real extension fires, and its jobs, which are always in step with them."""

import itertools
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import (
    CancellationPolicy,
    Durable,
    InvalidConfiguration,
    InvalidCron,
    InvalidState,
    RetryStrategy,
    ScheduleFilter,
    ScheduleNotFound,
    TaskContext,
    TaskStatus,
    setup_pgcron,
    task,
)
from tests.schedules import extension
from tests.support import eventually

HOSTILE = "it's \\ \\' \"q\" $$ $1 $x$ %s %% %(a)s :name ; -- /* é \n E'"

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=extension.why_not() or "")


@task("report")
async def report(ctx: TaskContext, params: dict[str, Any]) -> list[Any]:
    return [params, dict(ctx.headers)]


@pytest.fixture(scope="module")
def server() -> Generator[URL]:
    start = datetime.now(UTC).replace(second=55, microsecond=0)
    if start < datetime.now(UTC):
        # A clock that is put back makes of a task spawned in a process that has not heard of it one of the future.
        start += timedelta(minutes=1)
    with extension.server(start if extension.faketime() else None) as url:
        yield url


@pytest.fixture
async def engine(server: URL) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(server)
    await setup_pgcron(engine)
    yield engine
    await engine.dispose()


_numbers = itertools.count()


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    """A client with a schema of its own, since there is one database."""
    async with Durable(engine, schema=f'd{next(_numbers)} "x"', tasks=[report], telemetry=False) as durable:
        await durable.migrate()
        yield durable
        for schedule in await durable.list_schedules(ScheduleFilter()):
            await durable.delete_schedule(schedule.name, queue_name=schedule.queue_name)


Sql = Callable[..., Awaitable[list[Any]]]


@pytest.fixture
def sql(durable: Durable, engine: AsyncEngine) -> Sql:
    """Run a statement, with the schema's name in place of `durable.`."""
    quoted = '"' + durable.schema.replace('"', '""') + '"'

    async def run(statement: str, **parameters: Any) -> list[Any]:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement.replace("durable.", f"{quoted}.")), parameters)
            return list(result.all()) if result.returns_rows else []

    return run


async def jobs(sql: Sql) -> dict[str, tuple[str, bool]]:
    rows = await sql("SELECT jobname, schedule, active FROM cron.job ORDER BY jobname")
    return {row.jobname.rpartition(":")[2]: (row.schedule, row.active) for row in rows}


async def fire(sql: Sql, engine: AsyncEngine, times: int = 1, *, conforming: str = "on") -> None:
    """Do what the extension does at a tick: send the job's command as it is. The role may have settings of its own."""
    for row in await sql("SELECT command FROM cron.job WHERE active"):
        async with engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.execute(f"SET standard_conforming_strings = {conforming}")
            for _ in range(times):
                await raw.execute(row.command)
            await raw.execute("RESET standard_conforming_strings")


@pytest.mark.slow
async def test_the_extension_fires_a_tick_and_a_worker_runs_it(durable: Durable, sql: Sql) -> None:
    """First of all, as the server's minute is about to end."""
    if extension.faketime() is None:
        pytest.skip("libfaketime is not installed, and a minute is too long to wait")
    await durable.create_schedule(
        "every-minute", task=report, params={"text": HOSTILE}, cron_expression="* * * * *", backend="pg_cron"
    )
    async with durable.worker():

        async def spawned() -> list[Any]:
            return await sql("SELECT task_id, headers, created_at FROM durable.tasks")

        (row,) = await eventually(spawned, within=80)
        result = await durable.wait_for_result(row.task_id, timeout=3)
    headers = {"durable::scheduled_by": "every-minute", "durable::cron": "* * * * *"}
    assert result.output == [{"text": HOSTILE}, headers]
    assert row.task_id.version == 7
    milliseconds = row.task_id.int >> 80
    assert abs(milliseconds / 1000 - row.created_at.timestamp()) < 2
    (details,) = await sql("SELECT status, return_message FROM cron.job_run_details")
    assert details.status == "succeeded", details.return_message


async def test_a_tick_has_one_task_however_often_it_is_fired(durable: Durable, sql: Sql, engine: AsyncEngine) -> None:
    await durable.create_schedule("often", task=report, params={}, cron_expression="* * * * *", backend="pg_cron")
    before = (await sql("SELECT date_trunc('minute', now()) AS tick"))[0].tick
    await fire(sql, engine, times=5)
    rows = await sql("SELECT task_id, run_id, idempotency_key FROM durable.tasks ORDER BY created_at")
    ticks = (await sql("SELECT date_trunc('minute', now()) AS tick"))[0].tick - before
    assert 1 <= len(rows) <= 1 + ticks / timedelta(minutes=1)
    assert rows[0].run_id != rows[0].task_id
    # The same key as a worker gives: a schedule that goes from the one to the other fires no tick twice.
    assert rows[0].idempotency_key == f"durable::often:{before.astimezone(UTC).isoformat()}"
    (schedule,) = await sql("SELECT last_tick_at, last_task_id, next_tick_at FROM durable.schedules")
    assert (schedule.last_tick_at, schedule.last_task_id, schedule.next_tick_at) == (
        before + ticks,
        rows[-1].task_id,
        None,
    )


@pytest.mark.parametrize("conforming", ["on", "off"])
async def test_everything_that_a_spawn_says_is_in_the_job(
    durable: Durable, sql: Sql, engine: AsyncEngine, conforming: str
) -> None:
    await durable.create_queue(HOSTILE.replace("\n", ""))
    options: Any = {
        "queue_name": HOSTILE.replace("\n", ""),
        "headers": {"mine": HOSTILE},
        "max_attempts": 7,
        "priority": -3,
        "delay": timedelta(minutes=5),
        "retry_strategy": RetryStrategy.exponential(0.25, factor=1.5, max_backoff=77, jitter=0.1),
        "cancellation": CancellationPolicy(max_pending_time=3600, max_running_time=1.5),
    }

    @durable.task("its 'name' \\ %s $$")
    async def named(ctx: TaskContext, params: list[Any]) -> None:
        pass

    await durable.create_schedule(
        "full",
        task=named,
        params=[HOSTILE, None, 1.5],
        cron_expression="*/5 1-3 * JAN mon",
        backend="pg_cron",
        **options,
    )
    await fire(sql, engine, conforming=conforming)
    (row,) = await sql(
        "SELECT *, params::text AS params_text, available_at - created_at AS delay, cancel_at - available_at AS pending"
        " FROM durable.tasks"
    )
    triggered = (await durable.trigger_schedule("full", queue_name=options["queue_name"])).task_id
    (other,) = await sql("SELECT *, params::text AS params_text FROM durable.tasks WHERE task_id = :i", i=triggered)
    assert (row.delay, row.pending) == (timedelta(minutes=5), timedelta(hours=1))
    differing = {"task_id", "run_id", "idempotency_key", "created_at", "available_at", "cancel_at", "params"}
    for column in other._mapping:
        if column not in differing:
            assert row._mapping[column] == other._mapping[column], column
    assert row.headers == {
        "mine": HOSTILE,
        "durable::scheduled_by": "full",
        "durable::cron": "*/5 1-3 * JAN mon",
    }
    assert row.queue_name == HOSTILE.replace("\n", "")


async def test_jobs_keep_in_step(durable: Durable, sql: Sql) -> None:
    async def create(expression: str, **options: Any) -> None:
        await durable.create_schedule("s", task=report, params={}, cron_expression=expression, **options)

    await create("0 3 * * *", backend="pg_cron")
    (info,) = await durable.list_schedules()
    assert info.backend == "pg_cron"
    assert info.pgcron_job_name == f"durable:{durable.schema}:default:s"
    assert await jobs(sql) == {"s": ("0 3 * * *", True)}
    await create("0 4 * * *", backend="pg_cron")
    assert await jobs(sql) == {"s": ("0 4 * * *", True)}
    await durable.pause_schedule("s")
    assert await jobs(sql) == {"s": ("0 4 * * *", False)}
    await create("0 5 * * *", backend="pg_cron")
    assert await jobs(sql) == {"s": ("0 5 * * *", False)}
    await durable.resume_schedule("s")
    assert await jobs(sql) == {"s": ("0 5 * * *", True)}
    await create("0 5 * * *", backend="worker")
    assert await jobs(sql) == {}
    assert (await durable.list_schedules())[0].pgcron_job_name is None
    await create("0 5 * * *", backend="pg_cron")
    await durable.delete_schedule("s")
    assert await jobs(sql) == {}
    with pytest.raises(ScheduleNotFound):
        await durable.delete_schedule("s")
    await durable.create_queue("mail")
    await create("0 5 * * *", backend="pg_cron", queue_name="mail")
    await durable.drop_queue("mail")
    assert await jobs(sql) == {}


async def test_two_schemas_have_a_job_each_whatever_the_length_of_the_name(
    durable: Durable, sql: Sql, engine: AsyncEngine
) -> None:
    async with Durable(engine, schema=durable.schema + "2", tasks=[report], telemetry=False) as other:
        await other.migrate()
        for each in (durable, other):
            await each.create_schedule(
                "n" * 200, task=report, params={}, cron_expression="0 3 * * *", backend="pg_cron"
            )
        assert len({row.jobname for row in await sql("SELECT jobname FROM cron.job")}) == 2
        await other.delete_schedule("n" * 200)
        (job,) = await sql("SELECT jobname FROM cron.job")
        assert job.jobname == (await durable.list_schedules())[0].pgcron_job_name


async def test_two_queues_have_a_job_each(durable: Durable, sql: Sql, engine: AsyncEngine) -> None:
    async def create(queue: str) -> None:
        await durable.create_schedule(
            "s", task=report, params={}, cron_expression="* * * * *", backend="pg_cron", queue_name=queue
        )

    queues = ["east", "we:st", "it's"]
    for queue in queues:
        await durable.create_queue(queue)
        await create(queue)
    await durable.pause_schedule("s", queue_name="it's")
    await fire(sql, engine, times=2)
    rows = await sql("SELECT queue_name FROM durable.tasks ORDER BY 1")
    assert [row.queue_name for row in rows] == ["east", "we:st"]
    await durable.delete_schedule("s", queue_name="we:st")
    assert len(await sql("SELECT * FROM cron.job")) == 2

    # The job of an earlier version knows its schedule by name alone: a second one must not be made beside it.
    await sql("UPDATE cron.job SET jobname = 'old' WHERE jobname LIKE '%:east:s'")
    await sql("UPDATE durable.schedules SET pgcron_job_name = 'old' WHERE queue_name = 'east'")
    with pytest.raises(InvalidState, match="schedule 's' in queue 'east' is of an earlier version"):
        await create("we:st")
    assert len(await sql("SELECT * FROM cron.job")) == 2
    await create("east")
    await create("we:st")
    names = {row.jobname for row in await sql("SELECT jobname FROM cron.job")}
    assert names == {info.pgcron_job_name for info in await durable.list_schedules(ScheduleFilter())}
    assert "old" not in names


async def test_a_paused_schedule_and_one_whose_last_task_goes_on_do_not_fire(
    durable: Durable, sql: Sql, engine: AsyncEngine
) -> None:
    await durable.create_schedule(
        "s", task=report, params={}, cron_expression="* * * * *", backend="pg_cron", overlap="skip"
    )
    (job,) = await sql("SELECT command FROM cron.job")

    async def tick(minutes: int) -> int:
        """A tick that is so much later than the last one."""
        await sql(f"UPDATE durable.schedules SET last_tick_at = last_tick_at - interval '{minutes} minutes'")
        await sql("UPDATE durable.tasks SET idempotency_key = NULL")
        async with engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.execute(job.command)
        return int((await sql("SELECT count(*) AS n FROM durable.tasks"))[0].n)

    assert await tick(0) == 1
    assert await tick(2) == 1, "its task has not ended"
    await sql("UPDATE durable.tasks SET state = 'completed', outcome = 'completed', finished_at = now()")
    await durable.pause_schedule("s")
    assert await tick(2) == 1, "it is paused"
    await durable.resume_schedule("s")
    assert await tick(2) == 2


async def test_it_is_triggered_by_hand(durable: Durable) -> None:
    await durable.create_schedule("s", task=report, params={}, cron_expression="0 0 1 1 *", backend="pg_cron")
    spawned = await durable.trigger_schedule("s")
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status is TaskStatus.COMPLETED
    assert result.output is not None
    assert result.output[1]["durable::scheduled_by"] == "s"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cron_expression": "*/10 * * * * *"}, InvalidCron, "five fields"),
        ({"cron_expression": "0 0 L * *"}, InvalidCron, "does not know L"),
        ({"cron_expression": "0 0 * * 5L"}, InvalidCron, "does not know L"),
        ({"cron_expression": "0 0 15W * *"}, InvalidCron, "W"),
        ({"cron_expression": "0 0 * * 1#2"}, InvalidCron, "five fields"),
        ({"timezone": "Europe/Berlin"}, InvalidConfiguration, "pg_cron fires by the time of GMT, not of Europe/Berlin"),
        ({"misfire": "run_all"}, InvalidConfiguration, "makes up for no ticks"),
        ({"misfire": "run_once"}, InvalidConfiguration, "makes up for no ticks"),
    ],
)
async def test_what_the_extension_cannot_do_is_refused(
    durable: Durable, sql: Sql, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"cron_expression": "0 3 * * *", **options}
    with pytest.raises(error, match=re.escape(message)):
        await durable.create_schedule("s", task=report, params={}, backend="pg_cron", **options)
    assert await durable.list_schedules() == []
    assert await jobs(sql) == {}


async def test_without_the_extension_it_says_how_to_get_it(database_url: URL) -> None:
    async with Durable(database_url, tasks=[report]) as durable:
        with pytest.raises(InvalidConfiguration, match=r"setup_pgcron\(bind\)"):
            await durable.create_schedule("s", task=report, params={}, cron_expression="0 3 * * *", backend="pg_cron")
        assert await durable.list_schedules() == []
    with pytest.raises(InvalidConfiguration, match="pg_cron: it cannot be set up: "):
        await setup_pgcron(database_url)
