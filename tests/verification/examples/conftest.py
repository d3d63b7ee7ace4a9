"""Example applications on databases of their own."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest

from durable_sa.testing import TestServer
from tests.verification.examples.applications import Application, Run


@pytest.fixture
def run(durable_server: TestServer, tmp_path: Path) -> Generator[Run]:
    """An application on an empty database, which its own migrations fill, empty and fill again."""
    with contextlib.ExitStack() as stack:

        def run(name: str, driver: str, **environment: str) -> Application:
            url = durable_server.create_database()
            stack.callback(durable_server.drop_database, url)
            application = Application(name, url, driver, tmp_path, **environment)
            stack.callback(application.close)
            said = application.alembic(("upgrade", "head"), ("check",), ("downgrade", "base"), ("upgrade", "head"))
            assert "No new upgrade operations" in said
            return application

        yield run
