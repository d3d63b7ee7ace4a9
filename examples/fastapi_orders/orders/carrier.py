"""The carrier, an external service."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol


class Carrier(Protocol):
    async def ship(self, order_id: int) -> str:
        """Have an order collected, and return the tracking code: the same one for the same order."""
        ...


class PretendedCarrier:
    """Stand in for an HTTP client."""

    async def ship(self, order_id: int) -> str:
        return f"TRACK-{order_id}"


@asynccontextmanager
async def carrier() -> AsyncGenerator[Carrier]:
    """Open the client for a worker, from its start to its end; tasks get it as `ctx.state`."""
    yield PretendedCarrier()
