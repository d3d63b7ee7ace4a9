"""Alembic's environment, as `alembic init` makes it, with one line for durable_sa."""

from alembic import context
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from billing.models import Base
from billing.settings import DATABASE_URL
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


if context.is_offline_mode():
    run()
else:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        run(connection)
