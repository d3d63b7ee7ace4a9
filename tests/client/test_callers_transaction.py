"""The `*_with` methods happen in the caller's transaction, whatever holds it, and touch nothing else of it."""

from __future__ import annotations

import asyncio
import random
import uuid
from datetime import UTC, datetime
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, create_engine, event
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from durable_sa import (
    CancellationPolicy,
    Durable,
    IdempotencyConflict,
    InvalidState,
    InvalidTaskParams,
    QueueNotFound,
    RetryStrategy,
    Spawn,
    SpawnResult,
    TaskNotFound,
    TaskNotRegistered,
    TaskRow,
    TaskStatus,
    models,
    task,
)
from durable_sa.database_errors import sqlstate
from tests.client.support import (
    Application,
    Base,
    Caller,
    Gate,
    Order,
    close,
    count,
    read,
    settle,
    with_connections,
    with_every_caller,
    with_sessions,
    with_some_callers,
)


@task
async def ship(ctx: Any, params: dict[str, int]) -> None: ...


@task
async def bill(ctx: Any) -> None: ...


@pytest.fixture
def client() -> Durable:
    """A client without a database: it needs none for what it does in a transaction of somebody else."""
    return Durable("postgresql://nobody@127.0.0.1:1/none", tasks=[ship, bill])


@with_every_caller
async def test_a_task_is_there_if_and_only_if_the_transaction_commits(
    application: Application, client: Durable, engine: AsyncEngine
) -> None:
    async with application.caller() as caller:
        await caller.insert("book")
        spawned: SpawnResult[None] = await caller.call(client.spawn_with, ship, {"order": 1}, priority=3)
        assert await count(engine) == 0
        await caller.commit()
    row = await read(engine, spawned.task_id)
    assert (row.run_id, row.state, row.priority, row.params_text) == (spawned.run_id, "pending", 3, '{"order":1}')
    assert spawned.created
    assert await count(engine, "orders") == 1

    async with application.caller() as caller:
        await caller.insert("pen")
        await caller.call(client.spawn_with, ship, {"order": 2})
        await caller.rollback()
    async with application.caller() as caller:
        await caller.insert("pencil")
        await caller.call(client.spawn_with, ship, {"order": 3})
    assert (await count(engine), await count(engine, "orders")) == (1, 1)


@with_some_callers
async def test_a_savepoint_that_is_rolled_back_takes_its_tasks_along(
    application: Application, client: Durable, engine: AsyncEngine
) -> None:
    async with application.caller() as caller:
        outer = await caller.call(client.spawn_with, bill)
        async with caller.savepoint() as savepoint:
            await caller.call(client.spawn_with, bill)
            await caller.call(client.emit_event_with, "undone")
            await settle(savepoint.rollback())
        async with caller.savepoint():
            inner = await caller.call(client.spawn_with, bill)
        await caller.commit()
    assert {outer.task_id, inner.task_id} == set(await task_ids(engine))
    assert await count(engine, "durable.events") == 0


@with_every_caller
async def test_every_method_works_with_every_executor(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    old = await durable.spawn(bill)
    async with application.caller() as caller:
        named = await caller.call(client.spawn_by_name_with, "ship", {"order": 1})
        unknown = await caller.call(client.spawn_by_name_with, "elsewhere", [1, None], unchecked=True)
        many = await caller.call(
            client.spawn_many_with, [(ship, {"n": n}) for n in range(3)] + [Spawn(bill, priority=7)]
        )
        assert await caller.call(client.emit_event_with, "paid", {"amount": 5}) is True
        assert await caller.call(client.emit_event_with, "paid", {"amount": 6}) is False
        assert await caller.call(client.cancel_task_with, old.task_id) is TaskStatus.CANCELLED
        assert await caller.call(client.cancel_task_with, old) is TaskStatus.CANCELLED
        assert (await read(engine, old.task_id)).state == "pending"
        assert await count(engine) == 1
        await caller.commit()
    assert (await read(engine, old.task_id)).state == "cancelled"
    assert (await read(engine, named.task_id)).params_text == '{"order":1}'
    assert (await read(engine, unknown.task_id)).params_text == "[1,null]"
    assert [(await read(engine, item.task_id)).params_text for item in many] == ['{"n":0}', '{"n":1}', '{"n":2}', None]
    assert (await read(engine, many[3].task_id)).priority == 7
    async with engine.connect() as connection:
        assert await connection.scalar(sa.text("SELECT payload::text FROM durable.events")) == '{"amount":5}'


@with_some_callers
async def test_all_options_are_stored_alike_by_every_driver(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    options: dict[str, Any] = {
        "max_attempts": 7,
        "retry_strategy": RetryStrategy.exponential(0.25, 1.5, 60.125, 0.5),
        "headers": {"trace": "ü \\ \" '", "n": [1.5, None, True]},
        "cancellation": CancellationPolicy(10.5, 20.25),
        "available_at": datetime(2100, 1, 2, 3, 4, 5, 678901, UTC),
        "priority": -5,
    }
    params = {"a'b\"c\\": -(2**62)}
    direct = await durable.spawn(ship, params, idempotency_key="one", **options)
    async with application.caller() as caller:
        spawned = await caller.call(client.spawn_with, ship, params, idempotency_key="two", **options)
        await caller.commit()

    def stored(row: Any) -> dict[str, Any]:
        unique = ("task_id", "run_id", "created_at", "idempotency_key")
        return {name: value for name, value in row._asdict().items() if name not in unique}

    assert stored(await read(engine, spawned.task_id)) == stored(await read(engine, direct.task_id))


@with_some_callers
async def test_refused_spawns_leave_the_transaction_usable(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    first = await durable.spawn(ship, {"order": 1}, idempotency_key="order 1")
    async with application.caller() as caller:
        await caller.insert("book")
        with pytest.raises(InvalidTaskParams):
            await caller.call(client.spawn_with, ship, {"order": "one"})
        with pytest.raises(TaskNotRegistered, match="'sihp'"):
            await caller.call(client.spawn_by_name_with, "sihp")
        with pytest.raises(QueueNotFound, match="'nowhere'"):
            await caller.call(client.spawn_with, bill, queue_name="nowhere")
        with pytest.raises(QueueNotFound, match="'nowhere'"):
            await caller.call(client.emit_event_with, "paid", queue_name="nowhere")
        with pytest.raises(IdempotencyConflict, match="'order 1'"):
            await caller.call(client.spawn_with, ship, {"order": 2}, idempotency_key="order 1")
        missing = uuid.uuid4()
        with pytest.raises(TaskNotFound, match=str(missing)):
            await caller.call(client.cancel_task_with, missing)
        again = await caller.call(client.spawn_with, ship, {"order": 1}, idempotency_key="order 1")
        assert (again.task_id, again.run_id, again.created) == (first.task_id, first.run_id, False)
        await caller.commit()
    assert (await count(engine), await count(engine, "orders")) == (1, 1)


@with_some_callers
@pytest.mark.parametrize("fault", ["key", "queue"])
async def test_a_refused_item_of_many_leaves_nothing_behind(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine, fault: str
) -> None:
    first = await durable.spawn(ship, {"order": 1}, idempotency_key="taken")
    items = [Spawn(ship, {"order": n}, idempotency_key=f"order {n}") for n in range(1500)]
    if fault == "key":
        items.append(Spawn(ship, {"order": 2}, idempotency_key="taken"))
    else:
        items.append(Spawn(bill, queue_name="nowhere"))
    async with application.caller() as caller:
        await caller.insert("book")
        with pytest.raises(IdempotencyConflict if fault == "key" else QueueNotFound) as raised:
            await caller.call(client.spawn_many_with, items)
        assert "item 1500 " in raised.value.__notes__[0]
        # What was there before the call is not undone, also if the call named it again.
        again = await caller.call(client.spawn_with, ship, {"order": 1}, idempotency_key="taken")
        await caller.commit()
    assert again.task_id == first.task_id
    assert await task_ids(engine) == [first.task_id]
    assert await count(engine, "orders") == 1


@with_some_callers
async def test_a_refused_item_of_many_leaves_the_tasks_that_had_its_unique_keys(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    cancelled = await durable.spawn(ship, {"order": 1}, unique="a", delay=60)
    replaced = await durable.spawn(ship, {"order": 1}, unique="b", delay=60)
    items = [
        Spawn(ship, {"order": 2}, unique="a", on_conflict="cancel"),
        Spawn(ship, {"order": 2}, unique="b", on_conflict="replace"),
        Spawn(bill, queue_name="nowhere"),
    ]
    async with application.caller() as caller:
        await caller.insert("book")
        with pytest.raises(QueueNotFound):
            await caller.call(client.spawn_many_with, items)
        await caller.commit()
    for task_id in (cancelled.task_id, replaced.task_id):
        row = await read(engine, task_id)
        assert (row.state, row.params) == ("pending", {"order": 1})
    assert (await count(engine), await count(engine, "orders")) == (2, 1)
    async with application.caller() as caller:
        first, second = await caller.call(client.spawn_many_with, items[:2])
        await caller.commit()
    assert (first.created, second.task_id, await count(engine)) == (True, replaced.task_id, 3)


@with_some_callers
async def test_a_refused_retry_leaves_the_transaction_usable(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    old = await durable.spawn(ship, {"order": 1}, unique="a")
    await durable.cancel_task(old)
    holder = await durable.spawn(ship, {"order": 2}, unique="a")
    async with application.caller() as caller:
        await caller.insert("book")
        with pytest.raises(InvalidState, match="without its unique key"):
            await caller.call(client.retry_task_with, old)
        await caller.commit()
    assert await count(engine, "orders") == 1
    await durable.cancel_task(holder)
    async with application.caller() as caller:
        await caller.call(client.retry_task_with, old)
        await caller.commit()
    assert (await read(engine, old.task_id)).state == "pending"


@with_sessions
async def test_nothing_is_flushed(application: Application, client: Durable) -> None:
    async with application.caller() as caller:
        order = Order(item="book")
        caller.executor.add(order)
        await caller.call(client.spawn_with, bill)
        await caller.call(client.spawn_many_with, [(bill, None)])
        await caller.call(client.emit_event_with, "paid")
        assert order in caller.executor.new
        assert order.id is None


@with_some_callers
async def test_a_transaction_at_a_higher_isolation_level_gets_its_task_or_a_serialization_failure(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    for level in ("REPEATABLE READ", "SERIALIZABLE"):
        async with application.caller(isolation_level=level) as caller:
            await caller.insert("book")
            assert (await caller.call(client.spawn_with, bill, idempotency_key=f"{level} 1")).created
            assert not (await caller.call(client.spawn_with, bill, idempotency_key=f"{level} 1")).created
            other = await durable.spawn(bill, idempotency_key=f"{level} 2")
            # It is not in the snapshot, so the second transaction cannot have it.
            with pytest.raises(DBAPIError) as raised:
                await caller.call(client.spawn_with, bill, idempotency_key=f"{level} 2")
            assert sqlstate(raised.value) == "40001"
            await caller.rollback()
            again = await caller.call(client.spawn_with, bill, idempotency_key=f"{level} 2")
            assert (again.task_id, again.created) == (other.task_id, False)
            await caller.commit()


@with_some_callers
async def test_a_read_only_transaction_says_so(application: Application, client: Durable, engine: AsyncEngine) -> None:
    async with application.caller(postgresql_readonly=True) as caller:
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await caller.call(client.spawn_with, bill)
        await caller.rollback()
    assert await count(engine) == 0


@with_connections
async def test_an_autocommit_connection_has_its_task_at_once(
    application: Application, client: Durable, engine: AsyncEngine
) -> None:
    async with application.caller(isolation_level="AUTOCOMMIT") as caller:
        spawned = await caller.call(client.spawn_with, bill)
        assert await task_ids(engine) == [spawned.task_id]
        assert await caller.call(client.cancel_task_with, spawned) is TaskStatus.CANCELLED
        assert (await read(engine, spawned.task_id)).state == "cancelled"


NO_INSERT = (
    "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'inserted'; END $$",
    "CREATE TRIGGER refuse BEFORE INSERT ON durable.tasks FOR EACH STATEMENT EXECUTE FUNCTION public.refuse()",
)


@with_connections
async def test_an_autocommit_connection_shows_nothing_of_many_of_which_one_is_refused(
    application: Application, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    await durable.spawn(ship, {"order": 1}, idempotency_key="taken")
    key = Spawn(ship, {"order": 7}, idempotency_key="new")
    refused = {
        "taken": Spawn(ship, {"order": 2}, idempotency_key="taken"),
        "queue": Spawn(bill, queue_name="nowhere"),
        "new": Spawn(ship, {"order": 8}, idempotency_key="new"),
    }
    async with engine.begin() as connection:
        for statement in NO_INSERT:
            await connection.exec_driver_sql(statement)
    async with application.caller(isolation_level="AUTOCOMMIT") as caller:
        for what, item in refused.items():
            with pytest.raises(QueueNotFound if what == "queue" else IdempotencyConflict) as raised:
                await caller.call(client.spawn_many_with, [key, (bill, None), item])
            assert "item 2 " in raised.value.__notes__[0]
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DROP TRIGGER refuse ON durable.tasks")
        # The same again is no conflict, with what is there or among themselves.
        spawned = await caller.call(
            client.spawn_many_with, [key, key, Spawn(ship, {"order": 1}, idempotency_key="taken")]
        )
        assert [spawn.created for spawn in spawned] == [True, False, False]
    assert await count(engine) == 2


@with_connections
async def test_a_session_that_joined_an_outer_transaction_commits_with_it(
    application: Application, client: Durable, engine: AsyncEngine
) -> None:
    """The pattern of test suites that roll everything back."""
    session_class: Any = Session if application.kind == "Connection" else AsyncSession
    for kept in (False, True):
        async with application.caller() as outer:
            await settle(outer.executor.begin())
            session = session_class(bind=outer.executor, join_transaction_mode="create_savepoint")
            caller = Caller(session)
            spawned = await caller.call(client.spawn_with, bill)
            await caller.commit()
            assert await caller.scalar(sa.select(sa.func.count()).select_from(TaskRow)) == 1
            await settle(session.close())
            assert await count(engine) == 0
            await (outer.commit() if kept else outer.rollback())
    assert await task_ids(engine) == [spawned.task_id]


@pytest.mark.parametrize("hook", ["before_flush", "after_flush"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
async def test_a_flush_spawns_together_with_the_object_that_caused_it(
    database_url: URL, orders: None, client: Durable, engine: AsyncEngine, hook: str, driver: str
) -> None:
    spawned = []

    def spawn(session: Session, *_: Any) -> None:
        for order in session.new:
            number = order.id or 0
            spawned.append(client.spawn_with(session, ship, {"order": number}))

    url = database_url.set(drivername=f"postgresql+{driver}")
    asynchronous = driver == "asyncpg"
    app: Any = create_async_engine(url) if asynchronous else create_engine(url)
    session: Any = AsyncSession(app) if asynchronous else Session(app)
    event.listen(session.sync_session if asynchronous else session, hook, spawn)
    order = Order(item="book")
    session.add(order)
    await settle(session.flush())
    assert len(spawned) == 1
    assert await count(engine) == 0
    await settle(session.commit())
    await settle(session.refresh(order))
    row = await read(engine, spawned[0].task_id)
    assert row.params_text == ('{"order":0}' if hook == "before_flush" else f'{{"order":{order.id}}}')
    session.add(Order(item="pen"))
    await settle(session.flush())
    await settle(session.rollback())
    await settle(session.close())
    assert (await count(engine), await count(engine, "orders")) == (1, 1)
    await close(app)


@pytest.mark.slow
async def test_a_connection_that_is_cut_at_any_moment_leaves_both_or_neither(
    gate: Gate, orders: None, client: Durable, engine: AsyncEngine
) -> None:
    app = create_async_engine(gate.url)
    numbers = random.Random(1)
    acknowledged = []

    async def buy(number: int) -> None:
        async with AsyncSession(app) as session:
            session.add(Order(item=str(number)))
            await client.spawn_with(session, ship, {"order": number})
            await session.commit()
            acknowledged.append(str(number))

    for number in range(60):
        buying = asyncio.create_task(buy(number))
        await asyncio.sleep(numbers.random() * 0.012)
        if number % 2:
            await gate.shut()
            await gate.open()
        await asyncio.wait([buying])
        error = buying.exception()
        assert error is None or isinstance(error, DBAPIError | OSError | asyncpg.PostgresConnectionError), error
    await close(app)
    async with engine.connect() as connection:
        ordered = await connection.scalars(sa.select(Order.item))
        spawned = await connection.scalars(sa.select(sa.cast(TaskRow.params["order"], sa.Text)))
        found = sorted(ordered)
        assert found == sorted(spawned)
    assert set(acknowledged) <= set(found)
    # How many is a matter of the moment: enough of both kinds.
    assert 10 <= len(acknowledged) < 60


async def test_a_session_with_several_binds_uses_the_one_of_the_durable_tables(
    durable_server: Any, database_url: URL, client: Durable, engine: AsyncEngine
) -> None:
    elsewhere = durable_server.create_database()
    other, home = create_async_engine(elsewhere), create_async_engine(database_url)
    try:
        async with other.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(binds={Base: other, models.Base: home}) as session:
            session.add(Order(item="book"))
            spawned = await client.spawn_with(session, bill)
            await session.commit()
            assert (await session.get_one(TaskRow, spawned.task_id)).task_name == "bill"
        assert await task_ids(engine) == [spawned.task_id]
        async with AsyncSession(binds={Base: other}) as session:
            with pytest.raises(UnboundExecutionError):
                await client.spawn_with(session, bill)
    finally:
        await close(other)
        await close(home)
        durable_server.drop_database(elsewhere)


async def test_what_is_no_executor_is_refused_with_the_list_of_those_that_are(
    client: Durable, engine: AsyncEngine
) -> None:
    for executor in (engine, None, engine.sync_engine):
        with pytest.raises(TypeError, match="Session, scoped_session, Connection, AsyncSession.*not "):
            client.spawn_with(executor, bill)  # type: ignore[call-overload]


async def test_the_engines_own_json_functions_have_no_part_in_it(
    database_url: URL, client: Durable, durable: Durable, engine: AsyncEngine
) -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError("called")

    app = create_async_engine(database_url, json_serializer=refuse, json_deserializer=refuse)
    async with app.begin() as connection:
        spawned = await client.spawn_with(connection, ship, {"order": 1}, headers={"a": 1}, idempotency_key="k")
        await client.emit_event_with(connection, "paid", {"a": 1})
        assert not (await client.spawn_with(connection, ship, {"order": 1}, idempotency_key="k")).created
    await close(app)
    row = await read(engine, spawned.task_id)
    assert (row.params_text, row.headers_text) == ('{"order":1}', '{"a": 1}')


async def task_ids(engine: AsyncEngine) -> list[uuid.UUID]:
    async with engine.connect() as connection:
        return list(await connection.scalars(sa.text("SELECT task_id FROM durable.tasks ORDER BY task_id")))
