"""A database of an earlier revision, as `pg_dump` has written it: upgraded, its tasks go on; and taken back."""

from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Connection
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable, InvalidState, SchemaMismatch, TaskContext, TaskStatus, task
from durable_sa.migrations import current, downgrade, head, migrate
from durable_sa.models import metadata
from durable_sa.testing import run_until_idle

LATER_TABLES = {"ended_workers", "limits", "limit_keys", "limit_totals", "limit_arrivals", "messages", "task_values"}
LATER_TABLES |= {"streams", "stream_items", "task_minutes"}
DUMP = Path(__file__).with_name("durable_0001.sql")


@task("child")
async def child(ctx: TaskContext, n: int) -> int:
    return await ctx.step("double", double, n)


async def double(n: int) -> int:
    return 2 * n


@task("order")
async def order(ctx: TaskContext, n: int) -> int:
    doubled = await ctx.step("double", double, n)
    handle = await ctx.spawn("part", child, doubled)
    four = await ctx.join(handle)
    paid = await ctx.await_event(f"paid:{n}", timeout=36500 * 86400, type=int)
    return four + paid


@task("failing")
async def failing(ctx: TaskContext) -> str:
    return "mended"


@task("report")
async def report(ctx: TaskContext, day: str) -> str:
    return day


def restore(url: URL) -> None:
    # Servers before 17 do not know this setting of the newest pg_dump.
    lines = [line for line in DUMP.read_text().splitlines() if line != "SET transaction_timeout = 0;"]
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    with connection, connection.cursor() as cursor:
        cursor.execute("\n".join(lines))
    connection.close()


@pytest.fixture
async def old(empty_database: URL) -> AsyncGenerator[AsyncEngine]:
    restore(empty_database)
    engine = create_async_engine(empty_database, isolation_level="READ COMMITTED")
    yield engine
    await engine.dispose()


def revise(connection: Connection, function: Callable[..., None], revision: str, since: str) -> None:
    with Operations.context(MigrationContext.configure(connection)):
        function(revision, since=since)


async def test_the_dump_has_rows_in_every_table(old: AsyncEngine) -> None:
    async with old.connect() as connection:
        assert await connection.run_sync(current) == "durable_0001"
        tables = await connection.run_sync(lambda inner: sa.inspect(inner).get_table_names("durable"))
        assert set(tables) == {table.name for table in metadata.sorted_tables} - LATER_TABLES
        for table in metadata.sorted_tables:
            if table.name in LATER_TABLES:
                continue
            assert await connection.scalar(sa.text(f"SELECT count(*) FROM durable.{table.name}")), table.name


async def test_tasks_of_an_upgraded_database_go_on(old: AsyncEngine) -> None:
    tasks = [child, order, failing, report]
    async with Durable(old, tasks=tasks) as durable, Durable(old, tasks=tasks, queue_name="west") as west:
        with pytest.raises(SchemaMismatch, match=rf'durable.upgrade\("{head()}", since="durable_0001"\)'):
            await durable.start_worker()
        await durable.migrate()
        await durable.check_schema()

        async with old.connect() as connection:
            rows = await connection.execute(
                sa.text("SELECT task_name, state, params::text, task_id FROM durable.tasks")
            )
            ids = {(row.task_name, row.state, row.params): row.task_id for row in rows}
        completed = await durable.get_task_result(ids["order", "completed", "1"])
        assert completed is not None
        assert (completed.status, completed.output) == (TaskStatus.COMPLETED, 104)
        await durable.retry_task(ids["failing", "failed", None], max_attempts=5)
        await durable.emit_event("paid:2", 200)
        await run_until_idle(durable, queue_names=["default", "west"])
        outputs = {}
        for key in [("order", "sleeping", "2"), ("order", "running", "3"), ("failing", "failed", None)]:
            result = await durable.wait_for_result(ids[key], timeout=20)
            outputs[key[2]] = result.output
        assert outputs == {"2": 208, "3": 312, None: "mended"}
        assert (await west.wait_for_result(ids["report", "pending", '"Friday"'], timeout=20)).output == "Friday"

        # A schedule keeps its queue, and its name is free in others.
        assert [info.name for info in await durable.list_schedules()] == ["nightly"]
        assert [info.name for info in await west.list_schedules()] == ["weekly"]
        await west.create_schedule("nightly", task=report, params="Tuesday", cron_expression="0 3 * * *")


async def test_an_upgrade_can_be_taken_back_unless_queues_share_a_name(
    old: AsyncEngine, read_catalog: Callable[..., list[str]]
) -> None:
    async with old.begin() as connection:
        before = await connection.run_sync(read_catalog)
        await connection.run_sync(migrate)
        await connection.execute(
            sa.text(
                "INSERT INTO durable.schedules (name, queue_name, task_name, cron_expression)"
                " VALUES ('weekly', 'default', 'report', '0 3 * * *')"
            )
        )
        with pytest.raises(InvalidState, match="'weekly' is defined in more than one queue"):
            await connection.run_sync(revise, downgrade, "durable_0001", head())
        await connection.execute(
            sa.text("DELETE FROM durable.schedules WHERE (queue_name, name) = ('default', 'weekly')")
        )
        await connection.run_sync(revise, downgrade, "durable_0001", head())
        assert await connection.run_sync(read_catalog) == before
        assert await connection.scalar(sa.text("SELECT count(*) FROM durable.schedules")) == 2


async def test_versions_of_before_fire_pause_and_delete_schedules_of_upgraded_tables(old: AsyncEngine) -> None:
    """Their statements know schedules by name alone, and must not be in the way of workers of theirs that are left."""
    async with old.begin() as connection:
        await connection.run_sync(migrate)
        for statement in (
            "UPDATE durable.schedules SET next_tick_at = now() WHERE name = 'nightly' AND paused_at IS NULL",
            "UPDATE durable.schedules SET paused_at = now() WHERE name = 'nightly'",
            "DELETE FROM durable.schedules WHERE name = 'nightly' RETURNING name",
            (
                "INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)"
                " VALUES (gen_random_uuid(), 'old', '{default}', '1 s', now())"
            ),
        ):
            assert (await connection.execute(sa.text(statement))).rowcount == 1
    async with old.connect() as connection:
        with pytest.raises(ProgrammingError, match="no unique or exclusion constraint"):
            await connection.execute(
                sa.text(
                    "INSERT INTO durable.schedules (name, queue_name, task_name, cron_expression)"
                    " VALUES ('nightly', 'west', 'report', '* * * * *') ON CONFLICT (name) DO NOTHING"
                )
            )


async def test_workers_of_before_write_history_without_what_is_new(old: AsyncEngine) -> None:
    """Their checkpoints have no duration, and their labels are forgotten with their rows."""
    async with old.begin() as connection:
        await connection.run_sync(migrate)
        task_id = await connection.scalar(sa.text("SELECT task_id FROM durable.tasks WHERE state = 'sleeping'"))
        await connection.execute(
            sa.text(
                "INSERT INTO durable.checkpoints (task_id, key, kind, name, status, value, created_at)"
                " VALUES (:task_id, gen_random_uuid(), 'step', 'by an old worker', 'completed', '1', now())"
            ),
            {"task_id": task_id},
        )
        await connection.execute(sa.text("DELETE FROM durable.workers"))
    async with Durable(old) as durable:
        history = await durable.get_history(task_id)
        (step,) = [entry for entry in history if entry.name == "by an old worker"]
        assert (step.status, step.began_at, step.duration) == ("completed", None, None)
