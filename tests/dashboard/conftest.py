"""The dashboard of a client with everything allowed."""

from collections.abc import AsyncGenerator

import pytest

from durable_sa import Durable
from tests.dashboard.chromium import Site, serving_in_chromium
from tests.dashboard.support import Browser, serving


@pytest.fixture
async def browser(durable: Durable) -> AsyncGenerator[Browser]:
    async with serving(durable) as (browser, _):
        yield browser


@pytest.fixture
async def site(durable: Durable) -> AsyncGenerator[Site]:
    async with serving_in_chromium(durable) as site:
        yield site
