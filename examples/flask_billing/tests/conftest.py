"""The application on a database of its own for each test, and on a shared one in a transaction that is rolled back."""

from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from alembic import command
from alembic.config import Config
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import URL

from billing.app import create_app
from billing.database import db
from billing.tasks import subscription
from durable_sa import Durable
from durable_sa.integrations.flask import FlaskTasks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def durable_migrate() -> Callable[[URL], None]:
    """Create the tables of the application, not durable's alone."""

    def migrate(url: URL) -> None:
        config = Config(ROOT / "alembic.ini")
        config.attributes["url"] = url.set(drivername="postgresql+psycopg")
        command.upgrade(config, "head")

    return migrate


@pytest.fixture(scope="session")
def shared_app(durable_shared_database_url: URL) -> Generator[Flask]:
    app = create_app(durable_shared_database_url.set(drivername="postgresql+psycopg"), trial_days=14)
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def app(shared_app: Flask) -> Generator[Flask]:
    """The application in an application context, and in a transaction that is rolled back at the end."""
    with shared_app.app_context(), db.engine.connect() as connection, connection.begin() as transaction:
        engines = cast("dict[str | None, Any]", db.engines)
        engine, engines[None] = engines[None], connection
        yield shared_app
        db.session.remove()
        engines[None] = engine
        transaction.rollback()


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
    async with Durable(url, hooks=[FlaskTasks(app, db)], tasks=[subscription]) as durable:
        yield Office(app.test_client(), durable)
    with app.app_context():
        db.engine.dispose()
