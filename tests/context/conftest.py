"""A client whose tasks are retried at once, and a worker for them in the test's own process."""

from collections.abc import AsyncGenerator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, RetryStrategy
from tests.context.support import Runner, Tally


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    async with Durable(engine, default_retry_strategy=RetryStrategy.fixed(0)) as durable:
        yield durable


@pytest.fixture
async def run(durable: Durable) -> AsyncGenerator[Runner]:
    async with durable.worker(concurrency=20, shutdown_timeout=0.2):
        yield Runner(durable)


@pytest.fixture
def tally() -> Tally:
    return Tally()
