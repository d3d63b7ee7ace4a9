"""`migrate`: to the newest revision without Alembic's files, all or nothing, by one of many callers."""

import asyncio
import contextlib
import sys
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa.errors import InvalidState, SchemaMismatch
from durable_sa.migrations import current, head, migrate, running

Catalog = Callable[..., list[str]]


async def run(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(migrate)


async def installed(engine: AsyncEngine) -> str | None:
    async with engine.connect() as connection:
        return await connection.run_sync(current)


WAITING = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


async def block(connection: AsyncConnection) -> None:
    """Begin to create a table of the same name as one of durable's, so that a migration waits for the end of that."""
    await connection.execute(sa.text("CREATE SCHEMA durable"))
    await connection.commit()
    await connection.execute(sa.text("CREATE TABLE durable.workers ()"))


async def until(connection: AsyncConnection, query: str) -> None:
    """Wait until the query has a row."""
    while (await connection.execute(sa.text(query))).first() is None:
        await connection.rollback()
        await asyncio.sleep(0.01)
    await connection.rollback()


class Killed(BaseException):
    pass


class Statements:
    """What an engine's connections execute, until one of them is killed."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.seen: list[str] = []
        self.most = sys.maxsize
        event.listen(engine.sync_engine, "before_cursor_execute", self._execute)

    def _execute(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        if len(self.seen) == self.most:
            raise Killed
        self.seen.append(statement)


async def test_a_second_run_finds_nothing_to_do(empty_engine: AsyncEngine) -> None:
    await run(empty_engine)
    statements = Statements(empty_engine)
    await run(empty_engine)
    assert await installed(empty_engine) == head()
    assert not [text for text in statements.seen if "SELECT" not in text and "SET" not in text]


@pytest.mark.parametrize("separate", [True, False], ids=["processes", "one engine"])
async def test_of_ten_callers_one_migrates(empty_database: URL, separate: bool) -> None:
    def engine() -> AsyncEngine:
        return create_async_engine(empty_database, isolation_level="READ COMMITTED", pool_size=10)

    shared = engine()
    engines = [engine() if separate else shared for _ in range(10)]
    created = [Statements(engine) for engine in engines[: None if separate else 1]]
    await asyncio.gather(*(run(engine) for engine in engines))
    tables = [text for statements in created for text in statements.seen if "CREATE TABLE" in text]
    assert len(tables) == len(set(tables)) > 5
    assert await installed(shared) == head()
    for engine_ in {shared, *engines}:
        await engine_.dispose()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_migration_killed_at_any_statement_leaves_nothing(empty_database: URL, read_catalog: Catalog) -> None:
    engine = create_async_engine(empty_database, isolation_level="READ COMMITTED", poolclass=NullPool)
    watching = create_async_engine(empty_database)
    statements = Statements(engine)
    statements.most = 0
    while not await installed(watching):
        async with watching.connect() as connection:
            assert await connection.run_sync(read_catalog) == []
        statements.seen.clear()
        statements.most += 1
        with contextlib.suppress(Killed):
            await run(engine)
    assert statements.most > 20
    assert await installed(watching) == head()
    await engine.dispose()
    await watching.dispose()


async def test_a_migration_whose_connection_is_lost_can_be_run_again(empty_engine: AsyncEngine) -> None:
    async with empty_engine.connect() as blocking, empty_engine.connect() as watching:
        await block(blocking)
        migration = asyncio.create_task(run(empty_engine))
        await until(watching, f"SELECT pg_terminate_backend(pid) {WAITING}")
        with pytest.raises(DBAPIError):
            await migration
    assert await installed(empty_engine) is None
    await run(empty_engine)
    assert await installed(empty_engine) == head()


async def test_a_lock_that_cannot_be_had_is_explained(
    empty_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "LOCK_SECONDS", 0.1)
    async with empty_engine.connect() as blocking:
        await block(blocking)
        with pytest.raises(InvalidState, match="Repeat the migration"):
            await run(empty_engine)
    assert await installed(empty_engine) is None
    await run(empty_engine)


async def test_a_migrator_that_hangs_is_not_waited_for_forever(
    empty_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "QUEUE_SECONDS", 0.1)
    async with empty_engine.connect() as hanging:
        await hanging.run_sync(migrate)
        with pytest.raises(InvalidState, match="Repeat the migration"):
            await run(empty_engine)
        await hanging.rollback()
    await run(empty_engine)


@pytest.mark.slow
async def test_the_settings_of_a_dba_change_nothing(empty_engine: AsyncEngine, read_catalog: Catalog) -> None:
    async with empty_engine.connect() as connection:
        await connection.run_sync(migrate)
        expected = await connection.run_sync(read_catalog)
        await connection.rollback()
        await connection.execute(sa.text("CREATE SCHEMA elsewhere"))
        for setting in (
            "search_path = elsewhere",
            "statement_timeout = '100ms'",
            "lock_timeout = '50ms'",
            "timezone = 'Asia/Kathmandu'",
            "default_transaction_isolation = 'serializable'",
        ):
            await connection.execute(sa.text(f'ALTER DATABASE "{empty_engine.url.database}" SET {setting}'))
        await connection.commit()
    await empty_engine.dispose()
    async with empty_engine.connect() as first, empty_engine.connect() as watching:
        await first.run_sync(migrate)
        second = asyncio.create_task(run(empty_engine))
        await until(watching, f"SELECT 1 {WAITING} AND clock_timestamp() - query_start > interval '200 ms'")
        assert not second.done()
        await first.commit()
        await second
        assert await watching.run_sync(read_catalog) == expected


async def test_a_role_that_may_not_create_schemas_uses_one_that_exists(empty_engine: AsyncEngine) -> None:
    role = f"migrator_{empty_engine.url.database}"

    async def migrate_as_role() -> None:
        async with empty_engine.begin() as connection:
            await connection.execute(sa.text(f"SET LOCAL ROLE {role}"))
            await connection.run_sync(migrate)

    async with empty_engine.begin() as connection:
        await connection.execute(sa.text(f"CREATE ROLE {role}"))
    try:
        with pytest.raises(DBAPIError, match="permission denied for database"):
            await migrate_as_role()
        async with empty_engine.begin() as connection:
            await connection.execute(sa.text("CREATE SCHEMA durable"))
            await connection.execute(sa.text(f"GRANT USAGE, CREATE ON SCHEMA durable TO {role}"))
        await migrate_as_role()
        assert await installed(empty_engine) == head()
    finally:
        async with empty_engine.begin() as connection:
            await connection.execute(sa.text(f"DROP OWNED BY {role}"))
            await connection.execute(sa.text(f"DROP ROLE {role}"))


async def test_tables_of_a_newer_version_are_left_alone(empty_engine: AsyncEngine) -> None:
    await run(empty_engine)
    async with empty_engine.begin() as connection:
        await connection.execute(sa.text("COMMENT ON TABLE durable.queues IS 'schema version: durable_9999'"))
    with pytest.raises(SchemaMismatch, match="durable_9999"):
        await run(empty_engine)
    assert await installed(empty_engine) == "durable_9999"
