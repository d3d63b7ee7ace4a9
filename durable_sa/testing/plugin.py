"""A pytest plugin, active wherever `durable_sa` is installed: databases with the durable tables, made in milliseconds.

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

The server is the one in `DURABLE_TEST_DATABASE_URL`, whose role needs the right to create databases; else a container
where Docker answers (`testcontainers` must be installed); else the embedded one (the `embedded` extra). It is started
when the first test asks for a database, once for all. The fixtures are synchronous, so they go with pytest-asyncio,
with anyio, and with tests that know no event loop.

An application with tables of its own overrides `durable_migrate`, in its `conftest.py`; all databases are then copies
of what that made:

```python
import pytest
from sqlalchemy import URL, Column, Integer, MetaData, Table, create_engine

from durable_sa import migrations

metadata = MetaData()
orders = Table("orders", metadata, Column("id", Integer, primary_key=True))


@pytest.fixture(scope="session")
def durable_migrate():
    def migrate(url: URL) -> None:  # often: alembic.command.upgrade(config, "head")
        engine = create_engine(url.set(drivername="postgresql+psycopg2"))
        with engine.begin() as connection:
            migrations.migrate(connection)
            metadata.create_all(connection)
        engine.dispose()

    return migrate
```

Tests that roll back what they have done share one database, `durable_shared_database_url`. What is spawned with their
session is rolled back with the rest: no worker ever sees the task, nobody is notified, and no connection is opened:

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
    engine = create_engine(durable_shared_database_url.set(drivername="postgresql+psycopg2"))
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

`-p no:durable_sa` on the command line of pytest leaves the plugin out.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pytest
from sqlalchemy import URL

from ..client import Durable
from .database import TestServer, database_server

__all__ = [
    "durable_database_url",
    "durable_migrate",
    "durable_server",
    "durable_shared_database_url",
    "durable_template_url",
]

Migrate: TypeAlias = Callable[[URL], Awaitable[None] | None]


@pytest.fixture(scope="session")
def durable_server() -> Generator[TestServer]:
    """The server that all test databases are made on."""
    with database_server() as server:
        yield server


@pytest.fixture(scope="session")
def durable_migrate() -> Migrate:
    """What makes the tables in an empty database: a function of its URL, `async def` or not.

    It makes durable's. Override it to make those of the application as well.
    """

    async def migrate(url: URL) -> None:
        async with Durable(url) as durable:
            await durable.migrate()

    return migrate


@pytest.fixture(scope="session")
def durable_template_url(durable_server: TestServer, durable_migrate: Migrate) -> Generator[URL]:
    """The database that all others are copies of. Nobody may be connected to it while copies are made."""
    url = durable_server.create_database()

    def migrate() -> None:
        if inspect.isawaitable(done := durable_migrate(url)):
            asyncio.run(_awaited(done))

    # In a thread of its own, since the test that comes first may have an event loop running here.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(migrate).result()
    yield url
    durable_server.drop_database(url)


@pytest.fixture
def durable_database_url(durable_server: TestServer, durable_template_url: URL) -> Generator[URL]:
    """A migrated database for one test, which is dropped after it, also while connections are open."""
    url = durable_server.create_database(durable_template_url)
    yield url
    durable_server.drop_database(url)


@pytest.fixture(scope="session")
def durable_shared_database_url(durable_server: TestServer, durable_template_url: URL) -> Generator[URL]:
    """One migrated database for all tests, which leave it as they found it."""
    url = durable_server.create_database(durable_template_url)
    yield url
    durable_server.drop_database(url)


async def _awaited(awaitable: Awaitable[None]) -> None:
    await awaitable
