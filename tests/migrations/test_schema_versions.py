"""Workers on tables of another version than theirs: refused with the way out, or, on newer ones that are for them, not."""

import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, SchemaMismatch, TaskContext
from durable_sa.migrations import current, head, versions
from durable_sa.models import metadata
from tests.cli.support import CommandLine

application = Durable()

LATER = """
revision = "durable_0010"
down_revision = "durable_0009"
{oldest}

def up(op, schema):
    op.create_table("later", schema=schema)

def down(op, schema):
    op.drop_table("later", schema=schema)
"""

Upgrade = Callable[[], None]


@pytest.fixture
def upgrade_library(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    """Install a version of the package with one revision more."""
    (tmp_path / "durable_0010_later.py").write_text(LATER.format(oldest=getattr(request, "param", "")))
    monkeypatch.delitem(sys.modules, f"{versions.__name__}.durable_0010_later", raising=False)
    return lambda: monkeypatch.setattr(versions, "__path__", [*versions.__path__, str(tmp_path)])


for_both = pytest.mark.parametrize("upgrade_library", ['oldest = "durable_0009"'], indirect=True)


async def comment(engine: AsyncEngine, what: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(f"COMMENT ON TABLE durable.queues IS 'schema version: {what}'"))


async def run_a_task(durable: Durable) -> None:
    @durable.task
    async def answer(ctx: TaskContext) -> int:
        return 42

    async with durable.worker():
        assert (await durable.wait_for_result(await durable.spawn(answer), timeout=5)).output == 42


async def test_tables_that_are_too_old_are_refused_with_the_lines_that_upgrade_them(
    durable: Durable, engine: AsyncEngine, upgrade_library: Upgrade
) -> None:
    upgrade_library()
    with pytest.raises(SchemaMismatch) as raised:
        await durable.start_worker()
    message = str(raised.value)
    assert "are at revision durable_0009, and revision durable_0010 is needed" in message
    assert 'durable.upgrade("durable_0010", since="durable_0009")' in message
    assert "`alembic upgrade heads`" in message
    assert durable.workers == frozenset()

    def paste(connection: Connection) -> None:
        revision: dict[str, Callable[[], None]] = {}
        lines = [line for line in message.splitlines() if line.startswith("    ")]
        exec(textwrap.dedent("\n".join(lines)), revision)
        with Operations.context(MigrationContext.configure(connection)):
            revision["upgrade"]()
            assert current(connection) == "durable_0010"
            revision["downgrade"]()
            assert current(connection) == "durable_0009"
            revision["upgrade"]()

    async with engine.begin() as connection:
        await connection.run_sync(paste)
    await run_a_task(durable)


async def test_tables_that_are_too_new_are_refused_with_the_ways_to_go(
    durable: Durable, engine: AsyncEngine, database_url: URL
) -> None:
    await comment(engine, "durable_9999")
    with pytest.raises(SchemaMismatch) as raised:
        await durable.start_worker()
    message = str(raised.value)
    assert "are at revision durable_9999, and revision durable_0009 is needed" in message
    assert "    pip install --upgrade durable_sa\n" in message
    assert "`alembic downgrade -1`" in message
    assert "`alembic downgrade durable@durable_0009`" in message
    with pytest.raises(SchemaMismatch):
        await durable.migrate()

    done = await CommandLine(database_url)("worker", f"{__name__}:application")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.strip() == f"error: {message}"


async def test_a_migration_may_come_before_the_deployment(durable: Durable, engine: AsyncEngine) -> None:
    await comment(engine, "durable_0010 (for durable_0009 and later)")
    async with engine.connect() as connection:
        assert await connection.run_sync(current) == "durable_0010"
    # Those of before start anew on what the next version has made, and their own migration leaves it as it is.
    await run_a_task(durable)
    await durable.migrate()
    async with engine.connect() as connection:
        assert await connection.run_sync(current) == "durable_0010"


@for_both
async def test_a_revision_says_for_which_versions_it_is(
    durable: Durable, upgrade_library: Upgrade, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade_library()
    assert head() == "durable_0010"
    await durable.migrate()
    monkeypatch.undo()
    assert head() == "durable_0009"
    await durable.check_schema()
    await run_a_task(durable)


@pytest.mark.parametrize("oldest", ["durable_0010", "durable_9998", ""])
async def test_newer_tables_that_are_for_later_versions_are_refused(
    durable: Durable, engine: AsyncEngine, oldest: str
) -> None:
    await comment(engine, f"durable_9999 (for {oldest} and later)")
    with pytest.raises(SchemaMismatch, match="durable_9999"):
        await durable.start_worker()


async def test_older_tables_are_not_for_later_versions_whatever_they_say(
    durable: Durable, engine: AsyncEngine, upgrade_library: Upgrade
) -> None:
    upgrade_library()
    await comment(engine, "durable_0009 (for durable_0009 and later)")
    with pytest.raises(SchemaMismatch, match="durable_0010 is needed"):
        await durable.check_schema()


async def one(number: int) -> int:
    return number + 1


async def read_one(session: AsyncSession) -> int:
    return int(await session.scalar(text("SELECT 1")) or 0)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_columns_that_are_added_while_workers_run_disturb_nobody(
    database_url: URL, durable: Durable, engine: AsyncEngine, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a later migration adds them: the workers of before go on with the statements that they have prepared."""
    engine_of_workers = create_async_engine(database_url.set(drivername=f"postgresql+{driver}"))
    async with Durable(engine_of_workers) as old:

        @old.task
        async def child(ctx: TaskContext, number: int) -> int:
            return await ctx.step("one", one, number)

        @old.task
        async def parent(ctx: TaskContext, number: int) -> int:
            handle = await ctx.spawn("child", child, number)
            await ctx.sleep_for("nap", 0.01)
            await ctx.emit_event(f"event-{ctx.task_id}", number)
            await ctx.await_event(f"event-{ctx.task_id}")
            await ctx.transaction("read", read_one)
            return await ctx.join(handle)

        async def run_some() -> None:
            spawned = await old.spawn_many([(parent, number) for number in range(5)])
            results = [await old.wait_for_result(each, timeout=20) for each in spawned]
            assert [result.output for result in results] == list(range(1, 6))
            waiting = await old.spawn(parent, 1, delay=3600)
            await old.cancel_task(waiting)
            await old.retry_task(waiting)
            await old.cancel_task(waiting)
            await old.create_schedule("never", task=parent, params=1, cron_expression="0 0 1 1 *")
            assert [schedule.name for schedule in await old.list_schedules()] == ["never"]

        async with old.worker(concurrency=5):
            for _ in range(3):  # what is executed again and again is prepared
                await run_some()
            for table in metadata.sorted_tables:
                name = f"{table.schema}.{table.name}"
                async with engine.begin() as connection:
                    await connection.execute(text(f"ALTER TABLE {name} ADD COLUMN later text DEFAULT 'x' NOT NULL"))
            await run_some()
    await engine_of_workers.dispose()
    async with engine.connect() as connection:
        tried = await connection.execute(text("SELECT DISTINCT failures, lease_losses, attempt FROM durable.tasks"))
        assert set(tried.all()) <= {(0, 0, 0), (0, 0, 1)}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
