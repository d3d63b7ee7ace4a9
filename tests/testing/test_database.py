"""The server for tests: where it is found, and the databases made on it."""

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa.errors import InvalidConfiguration
from durable_sa.testing.database import TestServer, database_server


async def execute(url: URL, statement: str) -> object:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        result = await connection.execute(sa.text(statement))
        value = result.scalar() if result.returns_rows else None
    await engine.dispose()
    return value


async def test_a_copy_has_what_its_template_has_and_is_apart_from_it(durable_server: TestServer) -> None:
    template = durable_server.create_database()
    await execute(template, "CREATE TABLE things AS SELECT 1 AS thing")
    copies = [durable_server.create_database(template) for _ in range(2)]
    await execute(copies[0], "UPDATE things SET thing = 2")
    assert [await execute(url, "SELECT thing FROM things") for url in (template, *copies)] == [1, 2, 1]
    for url in (template, *copies):
        durable_server.drop_database(url)


async def test_a_database_in_use_is_dropped(durable_server: TestServer) -> None:
    url = durable_server.create_database()
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        await connection.execute(sa.text("SELECT 1"))
        durable_server.drop_database(url)
        with pytest.raises(sa.exc.DBAPIError):
            await connection.execute(sa.text("SELECT 1"))
    await engine.dispose()
    with pytest.raises(Exception, match="does not exist"):
        await execute(url, "SELECT 1")


def test_the_url_in_the_environment_comes_first(durable_server: TestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # As other tools write it: without a driver.
    url = durable_server.url.set(drivername="postgresql").render_as_string(hide_password=False)
    monkeypatch.setenv("DURABLE_TEST_DATABASE_URL", url)
    with database_server() as server:
        assert server.url == durable_server.url.set(drivername="postgresql+asyncpg")
        database = server.create_database()
        assert asyncio.run(execute(database, "SELECT current_database()")) == database.database
        server.drop_database(database)


def test_a_url_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_TEST_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(InvalidConfiguration, match="DURABLE_TEST_DATABASE_URL"), database_server():
        pass


@pytest.mark.slow
def test_no_docker_leaves_the_embedded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURABLE_TEST_DATABASE_URL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with database_server() as server:
        assert "host" in server.url.query
