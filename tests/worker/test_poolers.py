"""Errors of a pooler or a driver under the engine's own statements are never failures of a task."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Executable, Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from durable_sa import Durable
from durable_sa.database.connections import Database

from .conftest import Rows
from .stories import Parts, Story, assert_stories_ended_well, create_bookings
from .test_hints import PgBouncer, bouncer

__all__ = ["bouncer"]


def of_the_server(kind: type[asyncpg.PostgresError]) -> DBAPIError:
    said: Any = Exception(kind.__name__)
    said.sqlstate = kind.sqlstate
    return DBAPIError(None, None, said)


ERRORS = {
    "a prepared statement that does not exist": lambda: of_the_server(asyncpg.InvalidSQLStatementNameError),
    "a prepared statement that exists already": lambda: of_the_server(asyncpg.DuplicatePreparedStatementError),
    "a cached plan that is over": lambda: of_the_server(asyncpg.FeatureNotSupportedError),
    "parameters of another statement": lambda: of_the_server(asyncpg.ProtocolViolationError),
    "parameters of other types": lambda: of_the_server(asyncpg.InvalidBinaryRepresentationError),
    "a protocol that is out of step": lambda: asyncpg.ProtocolError("unexpected message"),
    "a driver that is out of step": lambda: asyncpg.InternalClientError("got result for unknown protocol state 3"),
    "a driver that is busy": lambda: DBAPIError(None, None, asyncpg.InterfaceError("another operation is in progress")),
}


def closed() -> Exception:
    """Make an error as the driver raises it by accident, once its connection has no protocol any more."""
    try:
        asyncpg.Connection.is_closed(None)
    except AttributeError as error:
        return error
    raise AssertionError


ERRORS["a driver's connection that has just been closed"] = closed


@pytest.mark.slow
@pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS)
async def test_an_error_of_the_driver_under_any_statement_fails_no_task(
    engine: AsyncEngine, durable: Durable, sql: Rows, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement of a worker fails when it is executed first, and a transaction's fence and checkpoint as well."""
    await create_bookings(engine)
    story = Story(durable)
    execute_on = Database.execute_on
    failed: set[int] = set()
    injecting = False

    async def execute(
        self: Database,
        connection: AsyncConnection,
        statement: Executable,
        parameters: Mapping[str, Any] | None = None,
    ) -> Sequence[Row[Any]]:
        if injecting and self is durable.database and id(statement) not in failed:
            failed.add(id(statement))
            raise make()
        return await execute_on(self, connection, statement, parameters)

    monkeypatch.setattr(Database, "execute_on", execute)
    observing = Durable(durable.engine, tasks=durable.tasks)
    async with durable.worker(concurrency=5):
        spawned = [await durable.spawn(story.task, Parts(sleep=0.05)) for _ in range(2)]
        injecting = True
        for spawn in spawned:
            result = await observing.wait_for_result(spawn, timeout=20)
            assert result.status == "completed", result.error
        injecting = False
    assert len(failed) > 8
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT failures, attempt FROM durable.tasks") == [(0, 1)]


@pytest.mark.slow
async def test_a_plain_url_behind_a_pooler_in_transaction_mode_fails_no_task(
    engine: AsyncEngine, durable: Durable, sql: Rows, bouncer: PgBouncer
) -> None:
    """PgBouncer before 1.21 hands prepared statements to connections that do not know them."""
    await create_bookings(engine)
    pooled = create_async_engine(bouncer.url)
    async with Durable(pooled) as victim:
        story = Story(victim)
        victim.tasks.update(durable.tasks)
        for name, registered in victim.tasks.items():
            durable.tasks.setdefault(name, registered)
        spawned = await durable.spawn_many([(story.task, Parts(sleep=0.05))] * 100)
        async with victim.worker(concurrency=10, poll_interval=0.1):
            results = await asyncio.gather(*(durable.wait_for_result(spawn, timeout=60) for spawn in spawned))
    await pooled.dispose()
    assert {result.status.value: result.error for result in results} == {"completed": None}
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT failures FROM durable.tasks") == [(0,)]
