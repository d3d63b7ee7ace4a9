"""A database for each test, a copy of one that Alembic has migrated, and the application on it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from durable_sa import Durable
from reviews.app import create_app
from reviews.mail import Mailer
from reviews.tasks import define_schedules, make_durable

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def durable_migrate() -> Callable[[URL], None]:
    """Create the tables of the application, not durable's alone."""

    def migrate(url: URL) -> None:
        config = Config(ROOT / "alembic.ini")
        config.attributes["url"] = url
        command.upgrade(config, "head")

    return migrate


class Outbox:
    """A mail server that keeps everything."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, text: str) -> None:
        self.sent.append(text)


@dataclass
class Desk:
    http: httpx.AsyncClient
    durable: Durable[Mailer]
    outbox: Outbox

    async def submit(self, text: str = "The owl is a bird.") -> int:
        response = await self.http.post("/articles", json={"title": "Owls", "text": text})
        assert response.status_code == 201, response.text
        return int(response.json()["id"])

    async def article(self, article_id: int) -> dict[str, Any]:
        found: dict[str, Any] = (await self.http.get(f"/articles/{article_id}")).json()
        return found

    async def decide(self, article_id: int, *, accepted: bool = True) -> int:
        body = {"reader": "Ada", "accepted": accepted}
        return (await self.http.put(f"/articles/{article_id}/verdict", json=body)).status_code


@pytest.fixture
async def desk(durable_database_url: URL) -> AsyncGenerator[Desk]:
    outbox = Outbox()

    @asynccontextmanager
    async def mailer() -> AsyncGenerator[Mailer]:
        yield outbox

    engine = create_async_engine(durable_database_url.set(drivername="postgresql+psycopg"))
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with make_durable(sessions, mailer) as durable:
        await define_schedules(durable)
        app: Any = create_app(sessions, durable)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as http:
            yield Desk(http, durable, outbox)
    await engine.dispose()
