"""A PostgreSQL server for tests, with one database for each test, created as a copy of a template."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from ..database.urls import resolve_url
from ..errors import InvalidConfiguration

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

__all__ = ["TestServer", "database_server", "fast_directory"]

_VARIABLE = "DURABLE_TEST_DATABASE_URL"
_IMAGE = "postgres:18-alpine"
_DOCKER_SECONDS = 3
_CONTAINER_SECONDS = 60
_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory with a random name is made in it
_MEMORY_BYTES = 4 * 1024**3

# Test data need not survive a crash. Without fsync a database is created in 10 ms instead of 150.
_SETTINGS: dict[str, str | int] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "256MB",
    "max_connections": 200,
}


class TestServer:
    """A server on which test databases are created.

    The methods block, and may be called while an event loop is running. Several processes may share a server, because
    the names of the databases are random.
    """

    __test__ = False  # not a class of tests

    def __init__(self, url: URL | str) -> None:
        self.url = resolve_url(url)
        """The database in which `CREATE DATABASE` is executed; tests do not use it."""
        # One connection is kept: to connect takes half as long as to create a database.
        self._engine = create_async_engine(
            self.url, pool_size=1, max_overflow=0, pool_pre_ping=True, isolation_level="AUTOCOMMIT"
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="durable-test-server")
        self._runner = asyncio.Runner()

    def create_database(self, template: URL | None = None) -> URL:
        """Create a database, empty or as a copy of `template`, which must have no connections."""
        name = f"durable_test_{secrets.token_hex(8)}"
        statement = f'CREATE DATABASE "{name}"'
        if template is not None:
            statement += f' TEMPLATE "{template.database}"'
            # Copied as files instead of block by block through the WAL, as version 14 always does.
            if (self._engine.dialect.server_version_info or ()) >= (15,):
                statement += " STRATEGY FILE_COPY"
        self._execute(statement)
        return self.url.set(database=name)

    def drop_database(self, url: URL) -> None:
        """Drop a database, even if it has connections."""
        self._execute(f'DROP DATABASE IF EXISTS "{url.database}" WITH (FORCE)')

    def connect(self, seconds: float = 0) -> None:
        """Raise the error of the connection unless the server accepts one within `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._execute("SELECT 1")
            except (OSError, DBAPIError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        """Stop the thread that executes the statements."""

        def close() -> None:
            self._runner.run(self._engine.dispose())
            self._runner.run(asyncio.sleep(0))  # in which asyncio closes the socket
            self._runner.close()

        self._thread.submit(close).result()
        self._thread.shutdown()

    def _execute(self, statement: str) -> None:
        async def execute() -> None:
            async with self._engine.connect() as connection:
                await connection.execute(sa.text(statement))

        self._thread.submit(lambda: self._runner.run(execute())).result()


@contextlib.contextmanager
def database_server() -> Generator[TestServer]:
    """Provide a server: `DURABLE_TEST_DATABASE_URL`, else a container if Docker is running, else an embedded one.

    The role in `DURABLE_TEST_DATABASE_URL` needs the privilege to create databases. Containers need `testcontainers`.

    Raises:
        InvalidConfiguration: none of the three is available, or the URL does not lead to a server.
    """
    with contextlib.ExitStack() as stack:
        given = os.environ.get(_VARIABLE)
        url = given or stack.enter_context(_container()) or stack.enter_context(_embedded())
        server = stack.enter_context(contextlib.closing(TestServer(url)))
        try:
            server.connect(0 if given else _CONTAINER_SECONDS)
        except (OSError, DBAPIError) as error:
            if given:
                raise InvalidConfiguration(_VARIABLE, f"no connection: {error}") from error
            raise
        yield server


@contextlib.contextmanager
def _container() -> Generator[URL | None]:
    password = secrets.token_urlsafe()
    container = _start_container(password)
    if container is None:
        yield None
        return
    try:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(5432))
        yield URL.create("postgresql+asyncpg", "postgres", password, host, port, "postgres")
    finally:
        container.stop()


def _start_container(password: str) -> DockerContainer | None:
    """Start a container; None if testcontainers is missing, Docker is not running or cannot fetch the image."""
    try:
        from docker.errors import DockerException
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.docker_client import DockerClient
    except ModuleNotFoundError:
        return None
    settings = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
    with warnings.catch_warnings():
        # The client leaves the socket of a failed attempt to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with contextlib.closing(DockerClient(timeout=_DOCKER_SECONDS).client) as client:
                client.ping()
            container = DockerContainer(_IMAGE).with_exposed_ports(5432).with_env("POSTGRES_PASSWORD", password)
            return container.with_command(["postgres", *settings]).start()
        except (DockerException, OSError):
            return None
        finally:
            gc.collect()


@contextlib.contextmanager
def _embedded() -> Generator[URL]:
    from ..embedded import temporary_server

    with temporary_server(settings=_SETTINGS, parent=fast_directory()) as server:
        yield server.url()


def fast_directory() -> Path | None:
    """Return a directory in memory with room for a database, if there is one.

    A database is created there in tens of milliseconds, on a busy disk in hundreds.
    """
    return _MEMORY if _MEMORY.exists() and shutil.disk_usage(_MEMORY).free > _MEMORY_BYTES else None
