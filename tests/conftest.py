"""A database for each test, a copy of one that was migrated once."""

import asyncio
from collections.abc import AsyncGenerator, Generator

import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable
from durable_sa.testing.database import TestServer, database_server


@pytest.fixture(scope="session")
def database_test_server() -> Generator[TestServer]:
    with database_server() as server:
        yield server


@pytest.fixture(scope="session")
def database_template(database_test_server: TestServer) -> Generator[URL]:
    """The URL of a migrated database that nobody is connected to."""

    async def migrate(url: URL) -> None:
        async with Durable(url) as durable:
            await durable.migrate()

    template = database_test_server.create_database()
    asyncio.run(migrate(template))
    yield template
    database_test_server.drop_database(template)


@pytest.fixture
def database_url(database_test_server: TestServer, database_template: URL) -> Generator[URL]:
    url = database_test_server.create_database(database_template)
    yield url
    database_test_server.drop_database(url)


@pytest.fixture
async def engine(database_url: URL) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    """A client whose queue exists."""
    async with Durable(engine) as durable:
        await durable.create_queue()
        yield durable
