"""The migrations that the guide to adopting shows do what it says."""

import sys
from typing import Any
from unittest import mock

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import migrations
from durable_sa.testing.database import TestServer

from . import snippets

PAGE = snippets.DOCS / "guides" / "adopting.md"


def test_env_py_has_revisions_written(monkeypatch: pytest.MonkeyPatch) -> None:
    context = mock.Mock()
    monkeypatch.setitem(sys.modules, "alembic.context", context)
    with mock.patch("alembic.context", context):
        exec(snippets.file(PAGE, "alembic/env.py"), {})
    context.configure.assert_called_once_with(process_revision_directives=migrations.autogenerate)


def test_the_worker_is_started_on_a_module_that_has_tasks() -> None:
    client = snippets.file(PAGE, "shop/durable.py")
    assert "task" not in client
    workers = [line for line in snippets.durable_commands(list(snippets.blocks(PAGE))) if " worker " in line]
    assert workers
    assert all("shop.durable:" not in line for line in workers)


async def test_the_revision_makes_the_tables_and_removes_them(durable_server: TestServer) -> None:
    revision: dict[str, Any] = {}
    exec(snippets.file(PAGE, "alembic/versions/0001_durable_tables.py"), revision)
    url = durable_server.create_database()
    engine = create_async_engine(url)

    def run(connection: Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)):
            revision["upgrade"]()
            assert migrations.current(connection) == migrations.head()
            revision["downgrade"]()
            assert migrations.current(connection) is None

    try:
        async with engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()
        durable_server.drop_database(url)
