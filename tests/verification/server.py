"""A private Postgres and what can be done to it: stop, crash, kill, terminate, fill up, replicate, promote."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import URL

from durable_sa.embedded import EmbeddedServer, temporary_server
from durable_sa.embedded.binaries import Binaries
from durable_sa.embedded.postgres import StopMode

SETTINGS: dict[str, str | int] = {
    # Processes are killed here, not machines: what the kernel has been given is kept.
    "fsync": "off",
    "max_connections": 120,
    "max_wal_size": "512MB",
    "wal_level": "replica",
    "max_wal_senders": 4,
    "restart_after_crash": "on",
    "log_min_messages": "panic",
    "max_prepared_transactions": 4,
    "track_commit_timestamp": "on",
}


CONTROL = {"application_name": "control", "default_transaction_read_only": "off"}
"""What tells the connections of whoever controls the server from others."""


class Server:
    """A server with a connection for whoever controls it, which is made anew when it is lost."""

    def __init__(self, embedded: EmbeddedServer) -> None:
        self.embedded = embedded
        self._connection: asyncpg.Connection[Any] | None = None
        self._lock = asyncio.Lock()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        url = self.embedded.url()
        assert url.host is not None
        assert url.port is not None
        return url.host, url.port

    def url(self, database: str, port: int | None = None) -> URL:
        """The URL of a database, through a proxy on another port if one is given."""
        url = self.embedded.url(database=database)
        return url if port is None else url.set(port=port)

    async def connect(self, database: str = "postgres") -> asyncpg.Connection[Any]:
        """A connection, from a server that may still be starting."""
        url = self.embedded.url(database=database)
        async with asyncio.timeout(60):
            while True:
                try:
                    return await asyncpg.connect(
                        host=url.host,
                        port=url.port,
                        user="postgres",
                        password=url.password,
                        database=database,
                        timeout=5,
                        server_settings=CONTROL,
                    )
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                    await asyncio.sleep(0.1)

    async def sql(self, statement: str, *arguments: Any) -> list[Any]:
        """Run a statement on the database `postgres`, again if the connection is lost."""
        async with self._lock:
            for _ in range(10):
                if self._connection is None or self._connection.is_closed():
                    self._connection = await self.connect()
                try:
                    return list(await self._connection.fetch(statement, *arguments, timeout=10))
                except (
                    OSError,
                    TimeoutError,
                    asyncpg.InterfaceError,
                    asyncpg.PostgresConnectionError,
                    asyncpg.OperatorInterventionError,
                ):
                    self._connection.terminate()
                    self._connection = None
            raise AssertionError("the server does not keep a connection")

    async def close(self) -> None:
        """Give up the controlling connection."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def backends(self, database: str) -> list[int]:
        """The processes that serve clients of a database."""
        rows = await self.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
            " AND application_name <> 'control' ORDER BY pid",
            database,
        )
        return [row["pid"] for row in rows]

    async def strike(self, function: str, database: str, chance: random.Random, share: float = 0.0) -> int:
        """Terminate or cancel one backend, or a share of them; how many were hit."""
        pids = await self.backends(database)
        chosen = chance.sample(pids, min(len(pids), max(1, round(share * len(pids)))))
        hit = 0
        for pid in chosen:
            hit += (await self.sql(f"SELECT {function}($1) AS hit", pid))[0]["hit"]
        return hit

    async def kill_backend(self, database: str, chance: random.Random) -> int:
        """kill -9 of one backend: the server takes its memory for damaged, ends all others, and recovers."""
        pids = await self.backends(database)
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
                return 1
        return 0

    async def stop(self, mode: StopMode) -> None:
        """Stop it."""
        await asyncio.to_thread(self.embedded.stop, mode)

    async def kill(self) -> None:
        """Kill every process of it at once."""
        await asyncio.to_thread(self.embedded.kill)

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        await asyncio.to_thread(self.embedded.start)
        await self.sql("SELECT 1")

    async def configure(self, setting: str, value: str | None) -> None:
        """Change a setting of the running server, or take the change back."""
        change = f"RESET {setting}" if value is None else f"SET {setting} = '{value}'"
        await self.sql(f"ALTER SYSTEM {change}")
        await self.sql("SELECT pg_reload_conf()")


def faketime_library() -> Path | None:
    """What gives a process another clock, where it is installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@contextlib.contextmanager
def _clock_from(file: Path | None) -> Generator[None]:
    """What is started inside has the clock that a file says, however it changes."""
    if file is None:
        yield
        return
    os.environ |= {
        "LD_PRELOAD": str(faketime_library()),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    try:
        yield
    finally:
        for name in (
            "LD_PRELOAD",
            "FAKETIME_TIMESTAMP_FILE",
            "FAKETIME_CACHE_DURATION",
            "FAKETIME_DONT_FAKE_MONOTONIC",
        ):
            del os.environ[name]


@contextlib.asynccontextmanager
async def private_server(*, clock: Path | None = None, **settings: str | int) -> AsyncGenerator[Server]:
    """A server of one's own, on a free port of this machine, gone at the end."""
    with contextlib.ExitStack() as stack:
        with _clock_from(clock):
            embedded = stack.enter_context(temporary_server(settings={**SETTINGS, **settings}, listen="127.0.0.1"))
        server = Server(embedded)
        try:
            yield server
        finally:
            await server.close()


class _Standby(EmbeddedServer):
    """Over a copy of another server's data, with the same password."""

    def __init__(self, primary: EmbeddedServer) -> None:
        directory = primary.data_dir.with_name(f"standby-{os.urandom(3).hex()}")
        super().__init__(directory, listen="127.0.0.1")
        self._password = primary.url().password

    def start(self) -> None:
        """Start it; it does not become ready, as a primary does, before it is promoted."""
        if self._postmaster() is None:
            self._launch()


@contextlib.asynccontextmanager
async def standby(primary: Server, *, synchronous: bool = True) -> AsyncGenerator[Server]:
    """A streaming standby. While a synchronous one is there, no commit is acknowledged that it does not have."""
    embedded = _Standby(primary.embedded)
    url = primary.url("postgres")
    fresh = embedded.data_dir
    fresh.mkdir(mode=0o700)
    binaries = Binaries()
    binaries.give(fresh)
    source = f"host={url.host} port={url.port} user=postgres password={url.password} application_name=standby"
    try:
        await asyncio.to_thread(
            binaries.run, "pg_basebackup", "-D", str(fresh), "-d", source, "-R", "-X", "stream", "-c", "fast"
        )
        await asyncio.to_thread(embedded.start)
        replica = Server(embedded)
        if synchronous:
            await primary.configure("synchronous_standby_names", "standby")
            await _until(primary, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
        yield replica
        await replica.close()
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.output) from error
    finally:
        await asyncio.to_thread(embedded.stop, "immediate")


async def promote(replica: Server) -> None:
    """Make a standby the primary."""
    await replica.sql("SELECT pg_promote(true, 30)")
    await _until(replica, "SELECT 1 WHERE NOT pg_is_in_recovery()")
    await replica.configure("synchronous_standby_names", "")


async def start_as_standby(server: Server) -> None:
    """Start a former primary as whoever manages a failover does: it can be read, and not written to."""
    owner = server.embedded.data_dir.stat()
    signal_file = server.embedded.data_dir / "standby.signal"
    signal_file.touch()
    os.chown(signal_file, owner.st_uid, owner.st_gid)
    await asyncio.to_thread(server.embedded._launch)


async def _until(server: Server, query: str) -> None:
    async with asyncio.timeout(30):
        while not await server.sql(query):
            await asyncio.sleep(0.02)
