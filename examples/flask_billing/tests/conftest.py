"""A database for each test, a copy of one that Alembic has migrated, and the application on it."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from flask.testing import FlaskClient
from sqlalchemy import URL

from billing.app import create_app
from billing.tasks import subscription
from durable_sa import Durable

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def durable_migrate() -> Callable[[URL], None]:
    """Create the tables of the application, not durable's alone."""

    def migrate(url: URL) -> None:
        config = Config(ROOT / "alembic.ini")
        config.attributes["url"] = url.set(drivername="postgresql+psycopg")
        command.upgrade(config, "head")

    return migrate


@dataclass
class Office:
    http: FlaskClient
    durable: Durable
    """The client of the worker."""

    def subscribe(self, card: str = "visa") -> int:
        response = self.http.post("/subscriptions", json={"customer": "ada", "card": card})
        assert response.status_code == 201, response.text
        return int(response.get_json()["id"])

    def show(self, subscription_id: int) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/subscriptions/{subscription_id}").get_json()
        return found


@pytest.fixture
async def office(durable_database_url: URL) -> AsyncGenerator[Office]:
    url = durable_database_url.set(drivername="postgresql+psycopg")
    app = create_app(url, trial_days=14)
    async with Durable(url, tasks=[subscription]) as durable:
        yield Office(app.test_client(), durable)
    app.extensions["sessions"].kw["bind"].dispose()
