"""Runs the migrations on the database of `DURABLE_DATABASE_URL`, for developing them."""

import asyncio
import os

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa.database.urls import resolve_url
from durable_sa.models import metadata

URL = resolve_url(os.environ["DURABLE_DATABASE_URL"])


def migrate(connection: Connection | None = None) -> None:
    context.configure(
        connection=connection,
        url=None if connection else URL,
        target_metadata=metadata,
        include_schemas=True,
        include_name=lambda name, kind, _: kind != "schema" or name == metadata.schema,
        # Elsewhere autogenerate leaves durable's tables alone. Here they are what it is about.
        durable_schema=None,
    )
    with context.begin_transaction():
        context.run_migrations()


async def connect_and_migrate() -> None:
    engine = create_async_engine(URL, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)


if context.is_offline_mode():
    migrate()
else:
    asyncio.run(connect_and_migrate())
