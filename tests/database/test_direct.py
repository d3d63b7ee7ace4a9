"""Statements that go to asyncpg itself behave as those that SQLAlchemy executes, and leave it what it is asked to see."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, event, select
from sqlalchemy.exc import DBAPIError, NotSupportedError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, TaskContext, task
from durable_sa.database.connections import Database
from durable_sa.database.direct import execute_within, leads_directly
from durable_sa.database.failover import timeline_of
from durable_sa.database.private import ARRAY_TYPES, ASYNCPG_ATTRIBUTES
from durable_sa.statements import queues
from durable_sa.statements.expressions import INTROSPECT_TYPES, NO_ARRAYS, constant

NUMBER = sa.bindparam("number", type_=sa.Integer())
DIVIDE = select((constant(10) // NUMBER).label("quotient"), constant("x").label("letter"))
SLEEP = select(sa.func.pg_sleep(60))
LEAVE = select(sa.func.pg_terminate_backend(sa.func.pg_backend_pid()))

Way = Callable[[AsyncEngine], AsyncEngine]


@task
async def noop(ctx: Any) -> None: ...


def directly(engine: AsyncEngine) -> AsyncEngine:
    return engine


def through_sqlalchemy(engine: AsyncEngine) -> AsyncEngine:
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: None)
    return engine


@pytest.fixture(params=[directly, through_sqlalchemy])
async def database(request: pytest.FixtureRequest, database_url: URL) -> Any:
    engine = request.param(create_async_engine(database_url, pool_size=3))
    yield Database(engine)
    await engine.dispose()


def inner(connection: AsyncConnection) -> sa.Connection:
    assert connection.sync_connection is not None
    return connection.sync_connection


async def failure(call: Awaitable[Any]) -> BaseException:
    try:
        await call
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("it did not fail")


async def test_the_ways_are_what_they_are_called(database_url: URL) -> None:
    for way, expected in ((directly, True), (through_sqlalchemy, False)):
        engine = way(create_async_engine(database_url))
        async with engine.connect() as connection:
            assert leads_directly(inner(connection)) is expected
        await engine.dispose()


async def test_listeners_count_wherever_they_are_and_as_long_as_they_are_there(database_url: URL) -> None:
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        for target in (sa.Engine, engine.sync_engine, connection.sync_connection):
            for name in ("before_cursor_execute", "after_cursor_execute"):
                event.listen(target, name, listener_of_cursors)
                assert not leads_directly(inner(connection))
                event.remove(target, name, listener_of_cursors)
                assert leads_directly(inner(connection))
    await engine.dispose()


def listener_of_cursors(*_: object) -> None: ...


async def test_rows_have_names_and_positions(database: Database) -> None:
    (row,) = await database.execute(DIVIDE, {"number": 3})
    assert (row.quotient, row.letter, tuple(row), row._asdict()) == (3, "x", (3, "x"), {"quotient": 3, "letter": "x"})
    assert await database.execute(queues.KNOWN_QUEUES, {"queue_names": ["nowhere"]}) in ((), [])


@pytest.mark.parametrize("number", [0, "three", 2**40], ids=["server", "driver", "range"])
async def test_errors_are_those_of_sqlalchemy(database_url: URL, number: object) -> None:
    errors: list[Any] = []
    for way in (directly, through_sqlalchemy):
        engine = way(create_async_engine(database_url))
        errors.append(await failure(Database(engine).execute(DIVIDE, {"number": number})))
        assert (await Database(engine).execute(DIVIDE, {"number": 5}))[0].quotient == 2
        await engine.dispose()
    direct, usual = errors
    assert type(direct) is type(usual)
    assert str(direct) == str(usual)
    assert isinstance(direct, DBAPIError)
    assert type(direct.orig) is type(usual.orig)
    assert direct.connection_invalidated is usual.connection_invalidated is False


async def test_a_lost_connection_takes_the_others_of_its_pool_with_it(database: Database) -> None:
    """They are as old as it was, and the server that they led to may be gone."""
    pool: Any = database.engine.pool
    held = [await database.connect() for _ in range(3)]
    for connection in held:
        await connection.close()
    assert pool.checkedin() == 3
    connection = await database.connect()
    error: Any = await failure(database.execute_on(connection, LEAVE))
    assert isinstance(error, DBAPIError)
    assert error.connection_invalidated
    await connection.close()
    before = await pids(database)
    assert await pids(database) == before
    assert pool.checkedin() <= 3


async def pids(database: Database) -> set[int]:
    """The servers' processes of three connections at once."""
    connections = [await database.connect() for _ in range(3)]
    found = {(await database.execute_on(each, select(sa.func.pg_backend_pid())))[0][0] for each in connections}
    for each in connections:
        await each.close()
    return found


async def test_it_is_tried_again_when_all_connections_of_the_pool_are_dead(database: Database) -> None:
    connections = [await database.connect() for _ in range(3)]
    for each in connections[1:]:
        await database.execute_on(connections[0], select(sa.func.pg_terminate_backend(await pid(database, each))))
    for each in connections[1:]:
        await each.close()
    await failure(database.execute_on(connections[0], LEAVE))
    await connections[0].close()
    assert (await database.execute(DIVIDE, {"number": 2}))[0].quotient == 5


async def pid(database: Database, connection: Any) -> int:
    return int((await database.execute_on(connection, select(sa.func.pg_backend_pid())))[0][0])


async def test_nothing_is_left_open(database: Database, engine: AsyncEngine) -> None:
    """Neither a transaction nor a changed isolation level remains on a connection that goes back to the pool."""
    for _ in range(3):
        await database.execute(DIVIDE, {"number": 2})
    async with database.engine.connect() as connection:
        mine = (await connection.execute(select(sa.func.pg_backend_pid()))).scalar_one()
        await connection.rollback()
        async with engine.connect() as other:
            state = sa.text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
            assert (await other.execute(state, {"pid": mine})).scalar() == "idle"


@pytest.mark.parametrize("pooled", [True, False], ids=["pool", "no pool"])
async def test_what_an_application_begins_at_checkout_is_kept_from_spawns_and_for_transactions(
    database_url: URL, pooled: bool
) -> None:
    """A tenant, a timeout: the statement begins a transaction, which the pool rolls back at the end."""
    engine = create_async_engine(database_url, **({"pool_size": 2} if pooled else {"poolclass": NullPool}))

    @event.listens_for(engine.sync_engine, "checkout")
    def checkout(dbapi_connection: Any, *_: Any) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SELECT set_config('app.tenant', 'seven', false)")
        cursor.close()

    seen: list[str | None] = []

    async def look(session: AsyncSession) -> None:
        seen.append(await session.scalar(sa.text("SELECT current_setting('app.tenant', true)")))

    @task
    async def looking(ctx: TaskContext) -> None:
        await ctx.transaction("look", look)

    async with Durable(engine, tasks=[looking]) as durable:
        spawned = [await durable.spawn(looking) for _ in range(5)]
        async with durable.worker():
            for each in spawned:
                await durable.wait_for_result(each, timeout=20)
        assert seen == ["seven"] * 5
    await engine.dispose()


async def test_a_listener_may_execute_in_place_of_sqlalchemy(database_url: URL) -> None:
    engine = create_async_engine(database_url)
    await Database(engine).execute(DIVIDE, {"number": 2})
    event.listen(engine.sync_engine, "do_execute", listener_of_cursors)
    async with engine.connect() as connection:
        assert not leads_directly(inner(connection))
    await engine.dispose()


async def test_an_engine_knows_the_timeline_of_its_primary_when_its_pool_is_another_one(database_url: URL) -> None:
    engine = create_async_engine(database_url)
    database = Database(engine)
    await database.execute(DIVIDE, {"number": 2})
    timeline_of(engine.dialect).number += 1  # as if this server had been left behind since
    await engine.dispose()
    for call in (database.execute(DIVIDE, {"number": 2}), database.transactional()):
        with pytest.raises(ConnectionError, match="left behind"):
            await call
    await engine.dispose()


async def test_ids_of_spawns_are_plain_ones(database_url: URL) -> None:
    """Some encoders of JSON take no subclass of `uuid.UUID`."""
    async with Durable(database_url, tasks=[noop]) as durable:
        for _ in range(2):
            for spawned in (await durable.spawn(noop, idempotency_key="once"), await durable.spawn(noop)):
                assert (type(spawned.task_id), type(spawned.run_id)) == (uuid.UUID, uuid.UUID)


async def test_listeners_and_echo_see_every_statement(database_url: URL, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    listening, echoing = create_async_engine(database_url), create_async_engine(database_url)
    async with Durable(listening, tasks=[noop]) as durable:
        await durable.spawn(noop)
        # Only now, when statements have gone directly on these very connections.
        event.listen(listening.sync_engine, "before_cursor_execute", lambda *given: seen.append(given[2]))
        await durable.spawn(noop)
    assert len([text for text in seen if "INSERT INTO durable.tasks" in text]) == 1
    echoing.echo = True
    caplog.set_level(logging.INFO, "sqlalchemy.engine")
    async with Durable(echoing, tasks=[noop]) as durable:
        await durable.spawn(noop)
    assert "INSERT INTO durable.tasks" in caplog.text
    await listening.dispose()
    await echoing.dispose()


async def test_whoever_keeps_no_prepared_statements_has_none_kept(database_url: URL) -> None:
    engine = create_async_engine(database_url, connect_args={"prepared_statement_cache_size": 0})
    async with engine.connect() as connection:
        assert not leads_directly(inner(connection))
        assert (await Database(engine).execute(DIVIDE, {"number": 5}))[0].quotient == 2
    await engine.dispose()


async def test_a_cancelled_statement_costs_its_connection_only(database: Database) -> None:
    connection = await database.connect()
    running = asyncio.ensure_future(database.execute_on(connection, SLEEP))
    await asyncio.sleep(0.05)
    running.cancel()
    assert isinstance(await failure(running), asyncio.CancelledError)
    await connection.invalidate()
    await connection.close()
    assert (await database.execute(DIVIDE, {"number": 2}))[0].quotient == 5


async def test_a_migration_beside_it_is_noticed(database: Database) -> None:
    """What no longer fits the table is prepared anew, by whomever it was."""
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE changing (id integer)"))
        await connection.execute(sa.text("INSERT INTO changing VALUES (1)"))
    changing = select(sa.text("*")).select_from(sa.table("changing"))
    assert [tuple(row) for row in await database.execute(changing)] == [(1,)]
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE changing ADD COLUMN more text DEFAULT 'x'"))

    assert [tuple(row) for row in await database.execute(changing)] == [(1, "x")]


async def test_statements_in_the_transaction_of_a_session_are_those_of_sqlalchemy(database_url: URL) -> None:
    """They go to asyncpg once SQLAlchemy has begun the transaction; savepoints and errors are as they always are."""
    engine = create_async_engine(database_url)
    async with Durable(engine, tasks=[noop]) as durable, AsyncSession(engine) as session:
        connection = inner(await session.connection())
        assert not leads_directly(connection, alone=False)
        kept = [await durable.spawn_with(session, noop)]
        assert leads_directly(connection, alone=False)
        assert not leads_directly(connection)
        error: Any = await failure(session.execute(sa.text("SELECT 1 / 0")))
        refused: Any = await failure(durable.spawn_with(session, noop))
        assert isinstance(error, DBAPIError)
        assert isinstance(refused, DBAPIError)
        assert refused.orig.sqlstate == "25P02"
        await session.rollback()
        assert await durable.get_task_result(kept[0]) is None

        kept = [await durable.spawn_with(session, noop) for _ in range(3)]
        async with session.begin_nested() as savepoint:
            await durable.spawn_with(session, noop)
            await savepoint.rollback()
        await session.commit()
        found = await session.execute(sa.text("SELECT task_id FROM durable.tasks"))
        assert {row.task_id for row in found} == {spawned.task_id for spawned in kept}
    await engine.dispose()


async def test_spawns_at_once_in_one_transaction_take_turns(database_url: URL) -> None:
    engine = create_async_engine(database_url)
    async with Durable(engine, tasks=[noop]) as durable, engine.connect() as connection:
        await connection.execute(sa.text("SELECT 1"))
        spawned = await asyncio.gather(*(durable.spawn_with(connection, noop) for _ in range(20)))
        await connection.commit()
        assert (await connection.execute(sa.text("SELECT count(*) FROM durable.tasks"))).scalar() == len(spawned)
    await engine.dispose()


async def test_a_migration_in_the_middle_of_a_transaction_fails_it_and_the_next_goes_on(database_url: URL) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    changing = select(sa.text("*")).select_from(sa.table("changing"))
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE changing (id integer)"))
    for columns in (("id",), ("id", "more")):
        for attempt in range(2):
            async with engine.connect() as connection:
                await connection.execute(sa.text("INSERT INTO changing (id) VALUES (1)"))
                call = connection.run_sync(execute_within, changing, {}, None)
                if columns == ("id", "more") and attempt == 0:
                    assert isinstance(await failure(call), NotSupportedError)
                else:
                    assert {tuple(row._fields) for row in await call} == {columns}
        async with engine.begin() as connection:
            await connection.execute(sa.text("ALTER TABLE changing ADD COLUMN IF NOT EXISTS more text"))
    await engine.dispose()


@pytest.mark.parametrize("known", [True, False])
async def test_types_of_arrays_are_not_searched_for_where_asyncpg_can_be_told_them(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, known: bool
):
    if not known:
        monkeypatch.setitem(ASYNCPG_ATTRIBUTES, "protocol", "renamed")
    searched: list[Any] = []
    search = asyncpg.Connection._introspect_types

    async def introspect(connection: Any, oids: Any, timeout: Any) -> Any:
        searched.append(oids)
        return await search(connection, oids, timeout)

    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", introspect)
    database = Database(engine)
    times = [datetime(2026, 2, 3, tzinfo=UTC)]
    values = {**NO_ARRAYS, "uuids": [uuid.UUID(int=7)], "flags": [True], "floats": [0.5], "times": times}
    connection = await database.connect()
    (row,) = await database.execute_on(connection, INTROSPECT_TYPES, values)
    oids = await connection.execute(select(*(sa.text(f"to_regtype('{name}[]')::oid") for name, _, _ in ARRAY_TYPES)))
    assert list(oids.one()) == [oid for _, _, oid in ARRAY_TYPES]
    await connection.close()
    assert list(row) == list(values.values())
    assert (searched == []) is known
