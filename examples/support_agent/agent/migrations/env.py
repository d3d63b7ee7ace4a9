"""Alembic's environment, as `alembic init -t async` makes it, with one line for durable_sa."""

import asyncio

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from agent.models import Base
from agent.settings import DATABASE_URL
from durable_sa import migrations as durable

# The tests have a database of their own.
url = context.config.attributes.get("url", DATABASE_URL)


def run(connection: Connection | None = None) -> None:
    context.configure(
        connection=connection,
        url=None if connection else url,
        target_metadata=Base.metadata,
        process_revision_directives=durable.autogenerate,
    )
    with context.begin_transaction():
        context.run_migrations()


async def connect_and_run() -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()


if context.is_offline_mode():
    run()
else:
    asyncio.run(connect_and_run())
