"""An application's tables, its executors, and an ear for wake-up hints."""

from collections.abc import AsyncGenerator

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.client.support import Application, Base, Gate, Hints


@pytest.fixture
async def orders(engine: AsyncEngine) -> None:
    """The application's tables."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@pytest.fixture
async def application(request: pytest.FixtureRequest, database_url: URL, orders: None) -> AsyncGenerator[Application]:
    """Engine and executors of the kind that the test is parametrized with."""
    application = Application(database_url, *request.param)
    yield application
    await application.close()


@pytest.fixture
async def hints(database_url: URL) -> AsyncGenerator[Hints]:
    """All that is sent to the workers from here on."""
    heard = Hints(await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(False)))
    await heard.connection.add_listener("durable", heard.receive)
    yield heard
    await heard.connection.close()


@pytest.fixture
async def gate(database_url: URL) -> AsyncGenerator[Gate]:
    gate = Gate(database_url)
    await gate.open()
    yield gate
    await gate.shut()
