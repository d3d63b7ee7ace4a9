"""Callers of the `*_with` methods, SQLAlchemy's six executors over each driver, and how to see what is stored."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from durable_sa import Durable
from tests.support import eventually

SYNC = ("Session", "scoped_session", "Connection")
ASYNC = ("AsyncSession", "async_scoped_session", "AsyncConnection")


def _callers(*callers: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("application", callers, indirect=True, ids=" ".join)


with_every_caller = _callers(
    *((kind, driver) for driver in ("psycopg2", "psycopg") for kind in SYNC),
    *((kind, driver) for driver in ("asyncpg", "psycopg") for kind in ASYNC),
)
with_some_callers = _callers(
    ("Session", "psycopg2"), ("Connection", "psycopg"), ("AsyncConnection", "asyncpg"), ("AsyncSession", "psycopg")
)
with_sessions = _callers(
    ("Session", "psycopg2"),
    ("scoped_session", "psycopg"),
    ("AsyncSession", "asyncpg"),
    ("async_scoped_session", "psycopg"),
)
with_connections = _callers(
    ("Connection", "psycopg2"),
    ("Connection", "psycopg"),
    ("AsyncConnection", "asyncpg"),
    ("AsyncConnection", "psycopg"),
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    """What an application has of its own."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class Caller:
    """One executor in one transaction. What it does is awaited, also where it is done at once."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    async def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A `*_with` method with the executor as its first argument."""
        result = method(self.executor, *args, **kwargs)
        assert inspect.iscoroutine(result) == (type(self.executor).__name__ in ASYNC)
        return await settle(result)

    async def insert(self, item: str) -> None:
        await settle(self.executor.execute(sa.insert(Order).values(item=item)))

    async def scalar(self, statement: Any) -> Any:
        return await settle(self.executor.scalar(statement))

    async def commit(self) -> None:
        await settle(self.executor.commit())

    async def rollback(self) -> None:
        await settle(self.executor.rollback())

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[Any]:
        nested: Any = self.executor.begin_nested()
        if hasattr(nested, "__aenter__"):
            async with nested as transaction:
                yield transaction
        else:
            with nested as transaction:
                yield transaction


async def settle(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


class Application:
    """Engines of an application for one of `CALLERS`, and executors on them."""

    def __init__(self, url: URL, kind: str, driver: str, **options: Any) -> None:
        self.kind = kind
        self.url = url.set(drivername=f"postgresql+{driver}")
        self.engine: Any = (create_engine if kind in SYNC else create_async_engine)(self.url, **options)

    @asynccontextmanager
    async def caller(self, **options: Any) -> AsyncIterator[Caller]:
        """A caller that is closed at the end, whereby what is not committed is rolled back."""
        engine = self.engine.execution_options(**options) if options else self.engine
        executor: Any
        if self.kind == "Session":
            executor = Session(engine)
        elif self.kind == "scoped_session":
            executor = scoped_session(sessionmaker(engine))
        elif self.kind == "AsyncSession":
            executor = AsyncSession(engine)
        elif self.kind == "async_scoped_session":
            executor = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        else:
            executor = await settle(engine.connect())
        try:
            yield Caller(executor)
        finally:
            await settle(executor.remove() if "scoped" in self.kind else executor.close())

    async def close(self) -> None:
        await close(self.engine)


async def close(engine: Any) -> None:
    """Dispose of an engine when no hint is on its way over it."""
    async with Durable():  # which waits for those of asynchronous engines
        pass
    # The others are sent by threads, which end when there is nothing left to send.
    await eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "durable-hints"])
    await settle(engine.dispose())


class Gate:
    """A way to the database that can be shut, or lose the reply to a statement that was executed."""

    def __init__(self, url: URL) -> None:
        self._target = url
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._port = 0
        self.lose_reply_to: bytes | None = None

    @property
    def url(self) -> URL:
        return self._target.set(host="127.0.0.1", port=self._port, query={})

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.transport.abort()
        # Until Python 3.12 the server did not wait for connections; now it would for those that come at this moment.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections = {writer}
        try:
            socket = self._target.query.get("host")
            if socket is not None:
                port = self._target.query.get("port", "5432")
                there = await asyncio.open_unix_connection(f"{socket}/.s.PGSQL.{port}")
            else:
                there = await asyncio.open_connection(self._target.host, self._target.port)
            connections.add(there[1])
            self._connections |= connections
            losing = asyncio.Event()
            await asyncio.gather(
                self._forward(reader, there[1], losing, asks=True),
                self._forward(there[0], writer, losing, asks=False),
                return_exceptions=True,
            )
        finally:
            # The event loop of a test cancels this if the test ends while a client connects.
            self._connections -= connections
            for each in connections:
                each.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event, *, asks: bool
    ) -> None:
        while data := await reader.read(65536):
            if asks and self.lose_reply_to is not None and self.lose_reply_to in data:
                self.lose_reply_to = None
                losing.set()
            if not asks and losing.is_set():
                break
            writer.write(data)
        writer.transport.abort()


class Hints:
    """What a connection of its own hears on the channel, which is in the order of the commits."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.heard: list[str] = []

    def receive(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        self.heard.append(payload)

    async def so_far(self) -> list[str]:
        """What was heard until a notification that is sent now."""
        mark = f"mark {len(self.heard)}"
        await self.connection.execute("SELECT pg_notify('durable', $1)", mark)
        await eventually(lambda: mark in self.heard)
        return [payload for payload in self.heard if not payload.startswith("mark ")]

    async def next(self) -> str:
        """The first that was heard."""
        await eventually(lambda: any(not payload.startswith("mark ") for payload in self.heard))
        return next(payload for payload in self.heard if not payload.startswith("mark "))


async def count(engine: AsyncEngine, table: str = "durable.tasks", where: str = "true") -> int:
    """How many rows there are, as another connection sees it."""
    async with engine.connect() as connection:
        return int(await connection.scalar(sa.text(f"SELECT count(*) FROM {table} WHERE {where}")) or 0)


async def read(engine: AsyncEngine, task_id: Any) -> Any:
    """A task's row, JSON as text."""
    columns = "*, params::text AS params_text, headers::text AS headers_text, output::text AS output_text"
    async with engine.connect() as connection:
        result = await connection.execute(
            sa.text(f"SELECT {columns} FROM durable.tasks WHERE task_id = :i"), {"i": task_id}
        )
        return result.one()
