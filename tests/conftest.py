"""A database for each test, a copy of one that was migrated once, with an engine and a client on it."""

import gc
import threading
from collections.abc import AsyncGenerator, Generator

import hypothesis
import pytest
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable

pytest_plugins = ["pytester"]

# How long an example takes is the machine's affair, which may be busy with others.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Leave the modules and the collected tests out of garbage collection: with them it takes a tenth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def database_url(durable_database_url: URL) -> URL:
    return durable_database_url


@pytest.fixture
async def engine(database_url: URL) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
def sync_engine(database_url: URL) -> Generator[Engine]:
    engine = create_engine(database_url.set(drivername="postgresql+psycopg2"))
    yield engine
    for thread in threading.enumerate():
        if thread.name == "durable-hints":
            thread.join()
    engine.dispose()


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    """A client whose queue exists."""
    async with Durable(engine) as durable:
        await durable.create_queue()
        yield durable
