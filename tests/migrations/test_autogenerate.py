"""Autogenerate leaves durable's tables alone, whatever the search path, the schemas and the names that it looks at."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import models
from durable_sa.migrations import migrate
from durable_sa.models import TaskRow

SEARCH_PATHS = ["public", "public, durable", "durable, public", "durable", '"$user", public, durable']
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "schemas": {"include_schemas": True},
    "version table in durable": {"version_table_schema": "durable"},
    "version table in durable, schemas": {"version_table_schema": "durable", "include_schemas": True},
    "version table in public": {"version_table_schema": "public", "include_schemas": True},
    "other version table": {"version_table_schema": "durable", "version_table": "tasks_version"},
    "every name": {"include_schemas": True, "include_name": lambda *_: True},
    "only its schema": {
        "include_schemas": True,
        "include_name": lambda name, kind, _: kind != "schema" or name in (None, "durable"),
    },
    "not its schema": {
        "include_schemas": True,
        "include_name": lambda name, kind, _: kind != "schema" or name != "durable",
    },
}
paths = pytest.mark.parametrize("engine_of_app", SEARCH_PATHS, indirect=True)


@pytest.fixture
async def engine_of_app(request: pytest.FixtureRequest, empty_database: URL) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(
        empty_database,
        isolation_level="READ COMMITTED",
        connect_args={"server_settings": {"search_path": request.param}},
    )
    async with engine.begin() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()
    # A new one, as the dialect takes its default schema from the first connection.
    engine = create_async_engine(engine.url, connect_args={"server_settings": {"search_path": request.param}})
    yield engine
    await engine.dispose()


def generated(connection: Connection, metadata: Any, options: dict[str, Any]) -> str:
    """The upgrade that autogenerate would write."""
    opts = {"target_metadata": metadata, **options}
    context = MigrationContext.configure(connection, opts=opts)
    upgrade = produce_migrations(context, metadata).upgrade_ops
    assert upgrade is not None
    return render_python_code(upgrade)


def application() -> sa.MetaData:
    metadata = sa.MetaData()
    sa.Table(
        "a_orders",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("task_id", sa.Uuid, sa.ForeignKey(TaskRow.task_id, ondelete="SET NULL"), index=True),
    )
    return metadata


@pytest.mark.slow
@paths
async def test_no_table_is_dropped(engine_of_app: AsyncEngine) -> None:
    metadata = application()
    async with engine_of_app.begin() as connection:
        await connection.run_sync(metadata.create_all)
        path = await connection.scalar(sa.text("SHOW search_path"))
    for name, options in OPTIONS.items():
        for target in (metadata, [metadata, models.metadata]):
            async with engine_of_app.connect() as connection:
                code = await connection.run_sync(generated, target, options)
                lines = [line for line in code.splitlines() if "drop_" in line or "create_" in line]
                if path.startswith("durable"):
                    # Alembic writes foreign keys into its default schema anew if models name that schema.
                    lines = [line for line in lines if "foreign" not in line]
                assert (name, lines) == (name, [])
                assert await connection.scalar(sa.text("SHOW search_path")) == path
                await connection.rollback()


@pytest.mark.slow
@paths
async def test_a_table_of_the_same_name_is_the_applications(engine_of_app: AsyncEngine) -> None:
    """`tasks` without a schema is found in durable's through the search path, and is another one."""
    metadata = sa.MetaData()
    sa.Table("tasks", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text, index=True))
    async with engine_of_app.begin() as connection:
        first = await connection.scalar(sa.text("SELECT current_schema()"))
    for name, options in OPTIONS.items():
        async with engine_of_app.connect() as connection:
            code = await connection.run_sync(generated, metadata, options)
            assert (name, [line for line in code.splitlines() if "drop_" in line or "add_" in line]) == (name, [])
            if first == "public":
                assert code.count("op.create_table('tasks'") == 1
                assert code.count("op.create_index(op.f('ix_tasks_title')") == 1
            await connection.rollback()
