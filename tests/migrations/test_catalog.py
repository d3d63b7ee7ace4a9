"""However the tables came about, they are the same."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import migrations, models
from durable_sa.migrations.chain import scripts
from durable_sa.migrations.running import migrate
from durable_sa.testing.database import TestServer

Catalog = Callable[..., list[str]]

HOSTILE_NAMES = ['my "durable"', "Durable", "it's", "a.b", "select", "a :b $1 {c}", "100%s", "ü" * 20]


@pytest.fixture
async def created(durable_server: TestServer, read_catalog: Catalog) -> list[str]:
    """The catalog as the models make it."""
    url = durable_server.create_database()
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(sa.schema.CreateSchema(models.SCHEMA))
        await connection.run_sync(models.metadata.create_all)
        lines = await connection.run_sync(read_catalog)
    await engine.dispose()
    durable_server.drop_database(url)
    assert len(lines) > 150
    return lines


async def test_the_migrations_make_the_tables_of_the_models(
    empty_engine: AsyncEngine, read_catalog: Catalog, created: list[str]
) -> None:
    async with empty_engine.begin() as connection:
        await connection.run_sync(migrate)
        assert await connection.run_sync(read_catalog) == created


async def test_autogenerate_finds_no_difference(empty_engine: AsyncEngine) -> None:
    def compare(connection: Connection) -> list[object]:
        options = {"include_schemas": True, "durable_schema": None, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts={**options, "target_metadata": models.metadata})
        return list(compare_metadata(context, models.metadata))

    async with empty_engine.begin() as connection:
        await connection.run_sync(migrate)
        assert await connection.run_sync(compare) == []
        # And would find one.
        await connection.execute(sa.text("ALTER TABLE durable.tasks DROP COLUMN fence"))
        assert len(await connection.run_sync(compare)) == 1


@pytest.mark.parametrize("schema", HOSTILE_NAMES)
@pytest.mark.parametrize("empty_engine", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.slow)], indirect=True)
async def test_any_schema_name_will_do(
    empty_engine: AsyncEngine, read_catalog: Catalog, created: list[str], schema: str
) -> None:
    async with empty_engine.begin() as connection:
        await connection.run_sync(migrate, schema)
        assert await connection.run_sync(read_catalog, schema) == created
        assert await connection.run_sync(migrations.current, schema) == migrations.head()
        # A second installation beside the first.
        await connection.run_sync(migrate)
        assert await connection.run_sync(read_catalog) == created


async def test_each_revision_can_be_taken_back(empty_engine: AsyncEngine, read_catalog: Catalog) -> None:
    def there_and_back(connection: Connection) -> None:
        operations = Operations(MigrationContext.configure(connection))
        with operations.context(operations.get_context()):
            revisions = ["base", *(script.revision for script in scripts())]
            states = [read_catalog(connection)]
            for since, revision in pairwise(revisions):
                migrations.upgrade(revision, since=since)
                assert migrations.current(connection) == revision
                states.append(read_catalog(connection))
            for since, revision in pairwise(reversed(revisions)):
                assert read_catalog(connection) == states.pop()
                migrations.downgrade(revision, since=since)
            assert read_catalog(connection) == states.pop() == []
            assert migrations.current(connection) is None

    async with empty_engine.begin() as connection:
        await connection.run_sync(there_and_back)


def test_the_models_are_those_of_the_newest_revision() -> None:
    assert migrations.head() == models.REVISION


@pytest.mark.slow
def test_the_development_environment_finds_no_difference(empty_database: URL) -> None:
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
        done = subprocess.run(
            [Path(sys.executable).with_name("alembic"), *arguments],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "DURABLE_DATABASE_URL": empty_database.render_as_string(hide_password=False)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ("No new upgrade operations detected.\n" if arguments == ["check"] else "")
