"""The carrier, who is somebody else's service."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol


class Carrier(Protocol):
    async def ship(self, order_id: int) -> str:
        """Have an order collected; the tracking code. Asking twice for the same order gives the same code."""
        ...


class PretendedCarrier:
    """Stands for an HTTP client."""

    async def ship(self, order_id: int) -> str:
        return f"TRACK-{order_id}"


@asynccontextmanager
async def carrier() -> AsyncGenerator[Carrier]:
    """Opened by each worker when it starts and closed when it ends; tasks have it as `ctx.state`."""
    yield PretendedCarrier()
