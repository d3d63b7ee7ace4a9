"""A database for each test, a copy of one that Alembic has migrated, and the shop on it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from durable_sa import Durable
from orders.app import create_app
from orders.carrier import Carrier, PretendedCarrier
from orders.tasks import make_durable

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def durable_migrate() -> Callable[[URL], None]:
    """Create the tables of the application, not durable's alone."""

    def migrate(url: URL) -> None:
        config = Config(ROOT / "alembic.ini")
        config.attributes["url"] = url
        command.upgrade(config, "head")

    return migrate


class Courier(PretendedCarrier):
    """A carrier that can be out of order."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.failures = 0

    async def ship(self, order_id: int) -> str:
        self.asked.append(order_id)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the carrier does not answer")
        return await super().ship(order_id)


@dataclass
class Shop:
    http: httpx.AsyncClient
    durable: Durable[Carrier]
    courier: Courier

    async def order(self, reference: str = "A-1", quantity: int = 2) -> int:
        body = {"reference": reference, "sku": "lamp", "quantity": quantity}
        response = await self.http.post("/orders", json=body)
        assert response.status_code == 201, response.text
        return int(response.json()["id"])

    async def status(self, order_id: int) -> tuple[str, str]:
        """Return the states of the order and of its task."""
        found = (await self.http.get(f"/orders/{order_id}")).json()
        return found["status"], found["task_state"]

    async def stock(self) -> int:
        return int((await self.http.get("/products/lamp")).json()["stock"])


@pytest.fixture
async def shop(durable_database_url: URL) -> AsyncGenerator[Shop]:
    courier = Courier()

    @asynccontextmanager
    async def carrier() -> AsyncGenerator[Carrier]:
        yield courier

    engine = create_async_engine(durable_database_url)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with make_durable(sessions, carrier) as durable:
        transport = httpx.ASGITransport(create_app(sessions, durable))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
            await http.put("/products/lamp", json={"stock": 5})
            yield Shop(http, durable, courier)
    await engine.dispose()
