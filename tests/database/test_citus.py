"""A client that sees the extension Citus warns once, and its engine connects without a setting that slows asyncpg."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, event, text
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable
from durable_sa.database import citus

ROOT = Path(__file__).parents[2]
SETTING = text("SELECT current_setting('citus.override_table_visibility', true)")
PRETEND = text(
    "INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)"
    " SELECT 4294967295, 'citus', oid, 'pg_catalog'::regnamespace, false, '13.2-1' FROM pg_roles"
    " WHERE rolname = current_user"
)
"""The extension cannot be installed here; clients look at nothing of it but its row."""


@pytest.fixture
async def citus_url(database_url: URL) -> AsyncGenerator[URL]:
    engine = create_async_engine(database_url, poolclass=NullPool)
    async with engine.begin() as connection:
        if not (await connection.execute(text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))).scalar():
            pytest.skip("only a superuser may write catalogs")
        await connection.execute(PRETEND)
    await engine.dispose()
    yield database_url


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Citus" in record.getMessage()]


async def setting(engine: AsyncEngine) -> str | None:
    """Return the setting of a new connection."""
    await engine.dispose()
    async with engine.connect() as connection:
        return (await connection.execute(SETTING)).scalar()


async def test_a_client_warns_once_and_names_the_guide(citus_url: URL, caplog: pytest.LogCaptureFixture) -> None:
    async with Durable(citus_url) as durable:
        await durable.migrate()
        for _ in range(2):
            await durable.list_queues()
            await durable.engine.dispose()
        async with durable.worker():
            assert await durable.count_unclaimed_ready_tasks() == 0
    (warning,) = warnings(caplog)
    assert "'When one server is not enough'" in warning
    (guide,) = [word.strip("()") for word in warning.split() if ".md" in word]
    assert (ROOT / guide).is_file()


async def test_without_the_extension_nothing_is_said_or_set(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    async with Durable(database_url) as durable:
        await durable.migrate()
        await durable.list_queues()
        assert not await setting(durable.engine)
    assert warnings(caplog) == []


async def test_it_costs_no_statement(citus_url: URL, database_url: URL) -> None:
    engine = create_async_engine(database_url)
    statements: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *more: Any) -> None:
        statements.append(statement)

    async with Durable(engine) as durable:
        await durable.migrate()
        await engine.dispose()
        statements.clear()
        await durable.list_queues()
    assert len(statements) == 2, statements
    await engine.dispose()


async def test_an_engine_of_our_own_connects_with_the_setting(citus_url: URL) -> None:
    async with Durable(citus_url) as durable:
        await durable.migrate()
        await durable.list_queues()
        assert await setting(durable.engine) == "off"


async def test_an_engine_of_the_application_is_not_changed(citus_url: URL, caplog: pytest.LogCaptureFixture) -> None:
    engine = create_async_engine(citus_url)
    async with Durable(engine) as durable:
        await durable.migrate()
        await durable.list_queues()
        assert len(warnings(caplog)) == 1
        assert not await setting(engine)
    await engine.dispose()


async def test_a_client_notices_in_a_transaction_that_the_application_began(
    citus_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(citus_url)
    async with Durable(engine) as durable:
        await durable.migrate()
    caplog.clear()
    await engine.dispose()
    engine = create_async_engine(citus_url)

    @event.listens_for(engine.sync_engine, "checkout")
    def begin(connection: Any, *_: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    durable = Durable(engine)
    async with durable.database.transaction() as connection:
        await connection.execute(text("SELECT 1"))
    assert len(warnings(caplog)) == 1
    await durable.close()
    await engine.dispose()


class Refused(Exception):
    sqlstate = "08P01"


async def test_behind_a_pooler_that_refuses_the_setting_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dialect = asyncpg.dialect()
    citus.notice(dialect)
    tried: list[dict[str, Any]] = []

    def connect(**options: Any) -> None:
        tried.append(options)
        raise Refused

    monkeypatch.setattr(dialect, "connect", connect)
    given = {"server_settings": {"application_name": "shop"}}
    for _ in range(2):
        assert citus._connect(dialect, None, [], given) is None
    (options,) = tried
    assert options["server_settings"] == {"application_name": "shop", "citus.override_table_visibility": "off"}
    assert given == {"server_settings": {"application_name": "shop"}}
