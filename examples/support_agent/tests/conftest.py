"""A database for each test, a copy of one that Alembic has migrated, and the application on it."""

import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from agent import operators, scripted
from agent.app import create_app
from agent.tasks import Sessions, make_durable
from durable_sa import Durable
from durable_sa.testing import run_until_idle

ROOT = Path(__file__).parents[1]
OPERATOR = ("operator", "a secret of tests")


@pytest.fixture(scope="session")
def durable_migrate() -> Callable[[URL], None]:
    """Create the tables of the application, not durable's alone."""

    def migrate(url: URL) -> None:
        config = Config(ROOT / "alembic.ini")
        config.attributes["url"] = url
        command.upgrade(config, "head")

    return migrate


@dataclass
class Shop:
    http: httpx.AsyncClient
    durable: Durable[Sessions]
    app: FastAPI

    async def ask(self, question: str) -> dict[str, Any]:
        """Ask, and let the agent work until it has answered or waits for a human; the turn."""
        response = await self.http.post("/turns", json={"question": question})
        assert response.status_code == 201, response.text
        await run_until_idle(self.durable)
        return await self.turn(response.json()["id"])

    async def turn(self, turn_id: int) -> dict[str, Any]:
        turns: list[dict[str, Any]] = (await self.http.get("/turns")).json()
        return next(turn for turn in turns if turn["id"] == turn_id)

    async def waiting(self) -> list[dict[str, Any]]:
        refunds: list[dict[str, Any]] = (await self.http.get("/refunds", auth=OPERATOR)).json()
        return refunds

    async def decide(self, refund_id: int, *, approved: bool) -> int:
        verdict = {"approved": approved}
        response = await self.http.put(f"/refunds/{refund_id}/verdict", json=verdict, auth=OPERATOR)
        await run_until_idle(self.durable)
        return response.status_code

    async def refunded(self, order_id: int) -> int:
        return int((await self.http.get(f"/orders/{order_id}", auth=OPERATOR)).json()["refunded"])

    async def events(self, turn_id: int, **headers: str) -> list[tuple[int, Any]]:
        """Return the positions and the data of the events that a browser is sent, until the event `end`."""
        response = await self.http.get(f"/turns/{turn_id}/events", headers=headers)
        assert response.status_code == 200, response.text
        *messages, end = response.text.strip().split("\n\n")
        assert end.startswith("event: end")
        fields = [dict(line.split(": ", 1) for line in message.splitlines()) for message in messages]
        return [(int(field["id"]), json.loads(field["data"])) for field in fields]


@pytest.fixture
async def shop(durable_database_url: URL, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Shop]:
    monkeypatch.setattr(operators, "OPERATOR_PASSWORD", OPERATOR[1])
    monkeypatch.setattr(scripted, "PAUSE", 0)
    engine = create_async_engine(durable_database_url)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with make_durable(sessions) as durable:
        app = create_app(sessions, durable)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
            for number, customer in ((17, "ada"), (18, "bob")):
                order = {"customer": customer, "item": "lamp", "cents": 1200}
                response = await http.put(f"/orders/{number}", json=order, auth=OPERATOR)
                assert response.status_code == 200, response.text
            yield Shop(http, durable, app)
    await engine.dispose()
