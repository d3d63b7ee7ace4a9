"""A pytest plugin, active wherever `durable_sa` is installed: databases with durable's tables, created in milliseconds.

A test that names `durable_database_url` gets a database of its own:

```python
from durable_sa import Durable, TaskContext, task
from durable_sa.testing import run_until_idle


@task
async def greet(ctx: TaskContext, name: str) -> str:
    return f"Hello {name}"


async def test_greeting(durable_database_url):
    async with Durable(durable_database_url, tasks=[greet]) as durable:
        spawned = await durable.spawn(greet, "Ada")
        await run_until_idle(durable)
        result = await durable.get_task_result(spawned)
    assert result.output == "Hello Ada"
```

The server is the one in `DURABLE_TEST_DATABASE_URL`, whose role needs the privilege to create databases; else a
container if Docker is running (`testcontainers` must be installed); else the embedded one (the `embedded` extra). It is
started once, when the first test requests a database. The fixtures are synchronous, so they work with pytest-asyncio,
with anyio, and with tests without an event loop.

An application with tables of its own overrides `durable_migrate` in its `conftest.py`; all databases are copies of the
one it has migrated. Where that calls `alembic.command.upgrade`, `env.py` should pass `disable_existing_loggers=False`
to `fileConfig`: without it, all loggers that exist are silent from then on.

```python
import pytest
from sqlalchemy import URL, Column, Integer, MetaData, Table, create_engine

from durable_sa import migrations

metadata = MetaData()
orders = Table("orders", metadata, Column("id", Integer, primary_key=True))


@pytest.fixture(scope="session")
def durable_migrate():
    def migrate(url: URL) -> None:  # often: alembic.command.upgrade(config, "head")
        engine = create_engine(url.set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            migrations.migrate(connection)
            metadata.create_all(connection)
        engine.dispose()

    return migrate
```

Tests that roll back their changes share one database, `durable_shared_database_url`. Tasks spawned with their session
are rolled back with the rest: no worker ever sees or is notified of the task, and no connection is opened:

```python
import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

from durable_sa import Durable, SyncTaskContext, TaskRow, task


@task
def ship(ctx: SyncTaskContext, order_id: int) -> None: ...


durable = Durable()


@pytest.fixture(scope="session")
def engine(durable_shared_database_url):
    engine = create_engine(durable_shared_database_url.set(drivername="postgresql+psycopg"))
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine):
    with engine.connect() as connection, connection.begin() as transaction:
        yield Session(connection, join_transaction_mode="create_savepoint")
        transaction.rollback()


def test_ordering(session):
    durable.spawn_with(session, ship, 7)
    session.commit()  # of a savepoint, as the session has joined the transaction of the test
    assert session.scalar(select(func.count()).select_from(TaskRow)) == 1
```

`-p no:durable_sa` on the command line of pytest disables the plugin.
"""

from __future__ import annotations

# The plugin is loaded by every run of pytest: what costs time to import, fixtures import when they are used.
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:
    from sqlalchemy import URL

    from .database import TestServer

__all__ = [
    "durable_database_url",
    "durable_migrate",
    "durable_server",
    "durable_shared_database_url",
    "durable_template_url",
]

Migrate: TypeAlias = "Callable[[URL], Awaitable[None] | None]"


@pytest.fixture(scope="session")
def durable_server() -> Generator[TestServer]:
    """Provide the server of all test databases."""
    from .database import database_server

    with database_server() as server:
        yield server


@pytest.fixture(scope="session")
def durable_migrate() -> Migrate:
    """Return the function, `async def` or not, that creates the tables in the empty database of a URL.

    This one creates durable's tables. Override it to create those of the application as well.
    """
    from ..client import Durable

    async def migrate(url: URL) -> None:
        async with Durable(url) as durable:
            await durable.migrate()

    return migrate


@pytest.fixture(scope="session")
def durable_template_url(durable_server: TestServer, durable_migrate: Migrate) -> Generator[URL]:
    """Create the template of all test databases. It must have no connections while they are copied."""
    import asyncio
    import inspect
    from concurrent.futures import ThreadPoolExecutor

    url = durable_server.create_database()

    async def awaited(awaitable: Awaitable[None]) -> None:
        await awaitable

    def migrate() -> None:
        if inspect.isawaitable(done := durable_migrate(url)):
            asyncio.run(awaited(done))

    # In a thread, because the first test may have an event loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(migrate).result()
    yield url
    durable_server.drop_database(url)


@pytest.fixture
def durable_database_url(durable_server: TestServer, durable_template_url: URL) -> Generator[URL]:
    """Create a migrated database for one test, and drop it afterwards, even if connections are open."""
    url = durable_server.create_database(durable_template_url)
    yield url
    durable_server.drop_database(url)


@pytest.fixture(scope="session")
def durable_shared_database_url(durable_server: TestServer, durable_template_url: URL) -> Generator[URL]:
    """Create one migrated database for all tests that roll back their changes."""
    url = durable_server.create_database(durable_template_url)
    yield url
    durable_server.drop_database(url)
