"""The PostgreSQL server of the benchmarks, and its counters of WAL, tuples and statements."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import asyncpg
import psutil

from durable_sa.embedded import EmbeddedServer, temporary_server
from durable_sa.embedded.binaries import Binaries

from .catalogue import System

GIB: Final = 1024**3

SETTINGS: Final[dict[str, str | int]] = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "max_connections": 300,
    # The database name (%d) tells the systems apart when statements are counted.
    "log_line_prefix": "%m [%p] %d ",
}

_COUNTERS = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float AS wal_bytes,
    coalesce(sum(n_tup_upd + n_tup_del), 0)::float AS dead_tuples,
    coalesce(sum(n_tup_upd), 0)::float AS updates,
    coalesce(sum(n_tup_hot_upd), 0)::float AS hot_updates
FROM pg_stat_user_tables WHERE relname <> 'orders'
"""


@contextmanager
def benchmark_server() -> Generator[Server]:
    """Run a temporary server with production settings, on TCP and with its data on disk."""
    shared_buffers = min(2 * GIB, psutil.virtual_memory().total // 4)
    settings = {**SETTINGS, "shared_buffers": f"{shared_buffers // 1024**2}MB"}
    with temporary_server(settings=settings, listen="127.0.0.1") as embedded:
        yield Server(embedded, settings)


class Server:
    """A server with a template database for each system, and copies of the templates."""

    def __init__(self, embedded: EmbeddedServer, settings: dict[str, str | int]) -> None:
        self.settings = settings
        self._embedded = embedded
        self._numbers = itertools.count(1)
        self.programs = Binaries()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database, in the form that all drivers accept."""
        url = self._embedded.url(database=database).set(drivername="postgresql")
        return url.render_as_string(hide_password=False)

    async def execute(self, *statements: str, database: str = "postgres") -> Any:
        """Run statements, each in its own transaction; return the single value of the last one."""
        connection = await asyncpg.connect(self.url(database))
        try:
            for statement in statements:
                value = await connection.fetchval(statement)
        finally:
            await connection.close()
        return value

    async def make_template(self, system: str) -> str:
        """Create a database to install a system in, with the application's table ``orders``."""
        name = f"template_{system}"
        await self.execute(f'CREATE DATABASE "{name}"')
        await self.execute("CREATE TABLE orders (id bigserial PRIMARY KEY, note text)", database=name)
        return name

    @asynccontextmanager
    async def database(self, system: System) -> AsyncGenerator[Database]:
        """Create a database with a system's tables, and drop it at the end."""
        name = f"{system.name}_{next(self._numbers)}"
        await self.execute(f'CREATE DATABASE "{name}" TEMPLATE "template_{system.name}"')
        connection = await asyncpg.connect(self.url(name))
        try:
            yield Database(self, name, system, connection)
        finally:
            with contextlib.suppress(asyncpg.PostgresError, OSError):
                await connection.close()
            await self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def commit_seconds(self, count: int = 200) -> float:
        """Return the median time that a commit of one small row takes, as a measure of the disk."""
        connection = await asyncpg.connect(self.url())
        await connection.execute("CREATE TABLE commits (id int)")
        times = []
        for _ in range(count):
            began = time.monotonic()
            await connection.execute("INSERT INTO commits VALUES (1)")
            times.append(time.monotonic() - began)
        await connection.execute("DROP TABLE commits")
        await connection.close()
        return sorted(times)[count // 2]

    @property
    def log_position(self) -> int:
        """The length of the server's log."""
        return (self._embedded.data_dir / "log").stat().st_size

    def statements_logged(self, since: int, database: str) -> int:
        """Count the statements of a database's sessions in the log after a position."""
        with (self._embedded.data_dir / "log").open("rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace")
        line = rf"^\S+ \S+ \S+ \[\d+\] {re.escape(database)} LOG:  (?:statement:|execute )"
        return len(re.findall(line, text, re.MULTILINE))


class Database:
    """A database of one system, with a connection for the benchmarks' own queries."""

    def __init__(self, server: Server, name: str, system: System, connection: Any) -> None:
        self.server = server
        self.name = name
        self.url = server.url(name)
        self._system = system
        self.connection = connection

    async def unfinished(self) -> int:
        """Count the tasks that are ready or running."""
        return int(await self.connection.fetchval(self._system.unfinished))

    async def suspended(self) -> int:
        """Count the tasks that wait in the database, without a worker."""
        assert self._system.suspended is not None
        return int(await self.connection.fetchval(self._system.suspended))

    async def counters(self) -> dict[str, float]:
        """Return the WAL and tuples written so far.

        Waits until all other sessions have ended, because a session may report its tuples as late as at its end.
        """
        async with asyncio.timeout(10):
            while await self.connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'",
                self.name,
            ):
                await asyncio.sleep(0.01)
        await self.connection.execute("SELECT pg_stat_clear_snapshot()")
        return dict(await self.connection.fetchrow(_COUNTERS))

    @asynccontextmanager
    async def held_snapshot(self) -> AsyncGenerator[None]:
        """Keep a transaction with a snapshot open, so that vacuum cannot remove dead rows."""
        connection = await asyncpg.connect(self.url)
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                await connection.fetchval("SELECT count(*) FROM orders")
                yield
        finally:
            await connection.close()

    async def log_statements(self) -> None:
        """Log the statements of all sessions that start later."""
        await self.connection.execute(f"ALTER DATABASE \"{self.name}\" SET log_statement = 'all'")
