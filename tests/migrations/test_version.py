"""Which revision a database is at, and what is said where it is another one than needed."""

import re
import textwrap

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import migrations
from durable_sa.errors import InvalidConfiguration, InvalidState, SchemaMismatch
from durable_sa.migrations import check, current, head, migrate


def comment(connection: Connection, text: str) -> None:
    connection.execute(sa.text(f"COMMENT ON TABLE durable.queues IS {text}"))


async def test_without_tables_there_is_no_revision(empty_engine: AsyncEngine) -> None:
    async with empty_engine.begin() as connection:
        assert await connection.run_sync(current) is None
        await connection.execute(sa.text("CREATE SCHEMA durable"))
        assert await connection.run_sync(current) is None
        await connection.run_sync(migrate)
        assert await connection.run_sync(current) == head()
        assert await connection.run_sync(current, "elsewhere") is None


def test_the_documented_calls_are_those_of_the_newest_revision() -> None:
    documentation = migrations.__doc__ or ""
    assert f'    durable.upgrade("{head()}")\n' in documentation
    assert f'durable.downgrade("base", since="{head()}")' in documentation
    after = f"durable_{int(head().removeprefix('durable_')) + 1:04}"
    assert set(re.findall(r"durable_\d{4}", documentation)) == {head(), after}


async def test_any_role_may_ask(empty_engine: AsyncEngine) -> None:
    role = f"reader_{empty_engine.url.database}"
    async with empty_engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.execute(sa.text(f"CREATE ROLE {role}"))
        await connection.execute(sa.text(f"SET LOCAL ROLE {role}"))
        assert await connection.run_sync(current) == head()
        await connection.run_sync(check)
        await connection.rollback()


async def test_missing_tables_are_reported_with_the_lines_to_paste(empty_engine: AsyncEngine) -> None:
    async with empty_engine.begin() as connection:
        with pytest.raises(SchemaMismatch) as raised:
            await connection.run_sync(check)
        assert (raised.value.installed, raised.value.required) == (None, head())
        message = str(raised.value)
        assert "not installed" in message
        assert "alembic upgrade heads" in message
        assert "`durable migrate`" in message

        def paste(connection: Connection) -> None:
            lines = [line for line in message.splitlines() if line.startswith("    ")]
            revision: dict[str, object] = {}
            exec(textwrap.dedent("\n".join(lines)), revision)
            with Operations.context(MigrationContext.configure(connection)):
                call(revision["upgrade"])
                check(connection)
                call(revision["downgrade"])
                assert current(connection) is None

        def call(function: object) -> None:
            assert callable(function)
            function()

        await connection.run_sync(paste)


async def test_the_lines_name_another_schema(empty_engine: AsyncEngine) -> None:
    async with empty_engine.begin() as connection:
        with pytest.raises(SchemaMismatch) as raised:
            await connection.run_sync(check, 'my "durable"')
        with pytest.raises(SchemaMismatch) as plainly:
            await connection.run_sync(check, "jobs")
    assert f'durable.upgrade("{head()}", schema="my \\"durable\\"")' in str(raised.value)
    assert f'durable.downgrade("base", since="{head()}", schema="my \\"durable\\"")' in str(raised.value)
    assert 'durable_schema="jobs"' in str(plainly.value)
    assert "`durable migrate --schema jobs`" in str(plainly.value)


async def test_tables_of_a_newer_version_are_refused(empty_engine: AsyncEngine) -> None:
    async with empty_engine.begin() as connection:
        await connection.run_sync(migrate)
        await connection.run_sync(comment, "'schema version: durable_9999'")
        with pytest.raises(SchemaMismatch, match="pip install --upgrade durable_sa") as raised:
            await connection.run_sync(check)
    assert (raised.value.installed, raised.value.required) == ("durable_9999", head())
    assert "durable_9999" in str(raised.value)
    assert "durable.upgrade(" not in str(raised.value)


@pytest.mark.parametrize("text", ["NULL", "'the queues'"])
async def test_a_lost_comment_is_not_taken_for_missing_tables(empty_engine: AsyncEngine, text: str) -> None:
    async with empty_engine.begin() as connection:
        await connection.run_sync(migrate)
        await connection.run_sync(comment, text)
        with pytest.raises(InvalidState) as raised:
            await connection.run_sync(check)
        remedy = str(raised.value).split("`")[1]
        await connection.execute(sa.text(remedy))
        await connection.run_sync(check)


async def test_calls_in_the_wrong_place_are_refused(empty_engine: AsyncEngine) -> None:
    def run(connection: Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)):
            with pytest.raises(InvalidConfiguration, match="durable_9999"):
                migrations.upgrade("durable_9999")
            with pytest.raises(InvalidConfiguration, match=r"Write `durable.upgrade\(\"durable_0001\"\)`"):
                migrations.upgrade("base", since="durable_0001")
            with pytest.raises(InvalidConfiguration, match=r"`durable.downgrade\(\"base\", since=\"durable_0001\"\)`"):
                migrations.downgrade("durable_0001", since="base")
            # Nothing to upgrade from.
            with pytest.raises(SchemaMismatch, match="not installed"):
                migrations.upgrade("durable_0001", since="durable_0001")
            migrations.upgrade("durable_0001")
            # Past what is to be taken back.
            with pytest.raises(SchemaMismatch, match="at revision durable_0001"):
                migrations.downgrade("base", since="base")
            # Done already: by `migrate`, say, before the application had revisions.
            migrations.upgrade("durable_0001")
            migrations.downgrade("base", since="durable_0001")
            migrations.downgrade("base", since="durable_0001")
            comment_of_newer(connection)
            with pytest.raises(SchemaMismatch, match="durable_9999"):
                migrations.upgrade("durable_0001")
            with pytest.raises(SchemaMismatch, match="durable_9999"):
                migrations.downgrade("base", since="durable_0001")

    def comment_of_newer(connection: Connection) -> None:
        migrate(connection)
        comment(connection, "'schema version: durable_9999'")

    async with empty_engine.begin() as connection:
        await connection.run_sync(run)
