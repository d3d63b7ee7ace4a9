"""The revision of limits on tables with tasks: its indexes are built without holding up spawns and claims."""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable, Limit, TaskStatus
from durable_sa.migrations import concurrent, downgrade, head, migrate, upgrade
from durable_sa.testing import run_until_idle

from .test_upgrade import child, failing, order, report, restore

Catalog = Callable[..., list[str]]
BEFORE = "durable_0001"
INDEXES = sa.text(
    "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " WHERE c.relnamespace = 'durable'::regnamespace AND c.relname = ANY (:names) AND i.indisvalid"
)


@pytest.fixture
async def old(empty_database: URL) -> AsyncGenerator[AsyncEngine]:
    restore(empty_database)
    engine = create_async_engine(empty_database, isolation_level="READ COMMITTED")
    yield engine
    await engine.dispose()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every table for a large one."""
    monkeypatch.setattr(concurrent, "LARGE_BYTES", 0)


async def indexes(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return set(await connection.scalars(INDEXES, {"names": list(concurrent.INDEXES)}))


async def test_indexes_of_a_large_table_are_built_after_the_upgrade(old: AsyncEngine, large: None) -> None:
    async with old.begin() as connection:
        await connection.run_sync(lambda inner: migrate(inner, deferred=True))
    assert await indexes(old) == set()
    async with Durable(old) as durable:
        await durable.migrate()
    assert await indexes(old) == set(concurrent.INDEXES)


async def test_a_build_that_was_interrupted_is_made_anew(old: AsyncEngine, large: None) -> None:
    async with Durable(old) as durable:
        await durable.migrate()
        async with old.begin() as connection:
            await connection.execute(
                sa.text(
                    "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'durable.tasks_unique_idx'::regclass"
                )
            )
            await connection.execute(sa.text("DROP INDEX durable.tasks_limit_idx"))
        await durable.migrate()
    assert await indexes(old) == set(concurrent.INDEXES)


@pytest.mark.parametrize("own", [True, False], ids=["Alembic's transaction", "a transaction around it"])
async def test_a_revision_of_the_application_builds_them(old: AsyncEngine, large: None, own: bool) -> None:
    def run(connection: Connection) -> None:
        context = MigrationContext.configure(connection)
        if not own:
            connection.begin()
        with context.begin_transaction(), Operations.context(context):
            upgrade(head(), since=BEFORE)
        if not own:
            connection.commit()

    async with old.connect() as connection:
        await connection.run_sync(run)
    assert await indexes(old) == set(concurrent.INDEXES)


async def test_it_can_be_taken_back(old: AsyncEngine, read_catalog: Catalog) -> None:
    def back(connection: Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)):
            downgrade(BEFORE, since=head())

    async with old.begin() as connection:
        before = await connection.run_sync(read_catalog)
        await connection.run_sync(migrate)
        assert await connection.run_sync(read_catalog) != before
        await connection.run_sync(back)
        assert await connection.run_sync(read_catalog) == before


async def test_tasks_from_before_the_upgrade_obey_limits(old: AsyncEngine) -> None:
    async with Durable(old, tasks=[child, order, failing, report]) as durable:
        await durable.migrate()
        # The dump has a worker of before, which is long dead.
        await durable.set_limit("default", Limit(concurrency=1))
        async with old.connect() as connection:
            statement = sa.text("SELECT task_id, state, limit_key FROM durable.tasks WHERE finished_at IS NULL")
            rows: list[Any] = [row for row in await connection.execute(statement) if row.limit_key is not None]
        assert {row.limit_key for row in rows} == {""}
        for number in (2, 3):
            await durable.emit_event(f"paid:{number}", 1)
        await run_until_idle(durable, queues=["default"])
        async with old.connect() as connection:
            unfinished = sa.text(
                "SELECT count(*) FROM durable.tasks WHERE queue_name = 'default' AND finished_at IS NULL"
                " AND task_name = 'order'"
            )
            assert await connection.scalar(unfinished) == 0
        (running,) = [row for row in rows if row.state == "running"] or [None]
        if running is not None:
            result = await durable.wait_for_result(running.task_id, timeout=20)
            assert result.status is TaskStatus.COMPLETED
