"""Workers are told of what was committed: once for each commit, after it, and not of what was rolled back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Engine, event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from durable_sa import CancellationPolicy, Durable, QueueNotFound, task
from durable_sa.database import notifier
from durable_sa.database.hint import Hint
from durable_sa.embedded import temporary_server
from durable_sa.statements.notifying import NOTIFY
from tests.client.support import (
    ASYNC,
    Application,
    Caller,
    Hints,
    close,
    count,
    settle,
    with_connections,
    with_every_caller,
    with_some_callers,
)
from tests.support import eventually


@task
async def ship(ctx: Any, params: Any = None) -> None: ...


@pytest.fixture
def client() -> Durable:
    return Durable("postgresql://nobody@127.0.0.1:1/none", tasks=[ship])


def lanes(payload: str) -> dict[tuple[str, int], datetime]:
    hint = Hint.decode(payload)
    assert hint is not None
    return hint.lanes


@with_every_caller
async def test_one_hint_after_the_commit_and_none_after_a_rollback(
    application: Application, client: Durable, durable: Durable, hints: Hints
) -> None:
    await durable.create_queue("mails")
    async with application.caller() as caller:
        await caller.call(client.spawn_with, ship, priority=9)
        await caller.rollback()
        await caller.call(client.spawn_with, ship, priority=2)
        await caller.call(client.spawn_with, ship, priority=2)
        await caller.call(client.spawn_with, ship, queue_name="mails", available_at=datetime(2100, 1, 1, tzinfo=UTC))
        async with caller.savepoint():
            await caller.call(client.spawn_with, ship)
        assert await hints.so_far() == []
        await caller.commit()
        first = await hints.next()
        assert lanes(first).keys() == {("default", 2), ("mails", 0), ("default", 0)}
        assert lanes(first)["mails", 0] == datetime(2100, 1, 1, tzinfo=UTC)
        await caller.call(client.spawn_with, ship)
        await caller.rollback()
        await caller.commit()
    async with application.caller() as caller:
        await caller.call(client.spawn_with, ship)
    await application.close()
    assert await hints.so_far() == [first]


@with_some_callers
async def test_no_hint_comes_before_what_it_is_about(
    application: Application, client: Durable, engine: AsyncEngine, hints: Hints
) -> None:
    """A worker that looked too early would not look again for long."""
    async with engine.begin() as connection:
        for statement in (
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END'",
            """CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
               FOR EACH ROW EXECUTE FUNCTION dawdle()""",
        ):
            await connection.execute(sa.text(statement))
    async with application.caller() as caller:
        await caller.insert("book")
        await caller.call(client.spawn_with, ship)
        commit = caller.executor.commit
        committing = asyncio.create_task(commit() if application.kind in ASYNC else asyncio.to_thread(commit))
        await hints.next()
        assert await count(engine) == 1
        await committing


@with_some_callers
async def test_each_transaction_of_an_executor_has_its_own_hint(
    application: Application, client: Durable, hints: Hints
) -> None:
    async with application.caller() as caller:
        for number in range(1, 4):
            await caller.call(client.spawn_with, ship, priority=number)
            await caller.commit()
            await eventually(partial(lambda wanted: len(hints.heard) >= wanted, number))
        await caller.insert("nothing for workers")
        await caller.commit()
    await application.close()
    assert [set(lanes(payload)) for payload in await hints.so_far()] == [{("default", n)} for n in (1, 2, 3)]


@with_connections
async def test_a_session_in_somebody_elses_transaction_hints_when_that_commits(
    application: Application, client: Durable, hints: Hints
) -> None:
    session_class: Any = Session if application.kind == "Connection" else AsyncSession
    connections: list[Any] = []
    engine = getattr(application.engine, "sync_engine", application.engine)
    event.listen(engine, "checkout", lambda *_: connections.append(1))
    for kept in (False, True):
        connections.clear()
        async with application.caller() as outer:
            await settle(outer.executor.begin())
            session = session_class(bind=outer.executor, join_transaction_mode="create_savepoint")
            inner = Caller(session)
            await inner.call(client.spawn_with, ship)
            await inner.commit()
            await inner.call(client.spawn_with, ship)
            await inner.commit()
            await settle(session.close())
            assert await hints.so_far() == []
            await (outer.commit() if kept else outer.rollback())
        await application.close()
        assert len(await hints.so_far()) == kept
        assert len(connections) == 1 + kept


@with_connections
async def test_an_autocommit_connection_hints_at_once(application: Application, client: Durable, hints: Hints) -> None:
    async with application.caller(isolation_level="AUTOCOMMIT") as caller:
        await caller.call(client.spawn_with, ship)
        assert lanes(await hints.next()).keys() == {("default", 0)}
    await application.close()
    assert len(await hints.so_far()) == 1


async def test_the_clients_own_calls_hint(durable: Durable, engine: AsyncEngine, hints: Hints) -> None:
    spawned = await durable.spawn(ship, priority=4)
    assert lanes(await hints.next()).keys() == {("default", 4)}
    hints.heard.clear()
    await durable.spawn_many([(ship, n) for n in range(10)])
    assert lanes(await hints.next()).keys() == {("default", 0)}
    hints.heard.clear()
    await durable.emit_event("paid")
    assert json.loads(await hints.next())[1] == 1
    hints.heard.clear()
    await durable.cancel_task(spawned)
    await durable.retry_task(spawned)
    assert lanes(await hints.next()).keys() == {("default", 4)}
    hints.heard.clear()
    assert not await durable.emit_event("paid")
    await durable.spawn(ship, 1, idempotency_key="k")
    await hints.next()
    await durable.spawn(ship, 1, idempotency_key="k")
    await durable.close()
    assert len(await hints.so_far()) == 1


@pytest.mark.slow
async def test_every_commit_is_heard_of(database_url: URL, client: Durable, hints: Hints) -> None:
    """Whatever the sender is doing when it is handed the next one."""
    app = create_async_engine(database_url, pool_size=5)
    numbers = random.Random(1)

    async def commit(priorities: list[int]) -> None:
        for priority in priorities:
            async with app.begin() as connection:
                await client.spawn_with(connection, ship, priority=priority)
            await asyncio.sleep(numbers.random() * 0.004)

    await asyncio.gather(*(commit(list(range(start, 160, 4))) for start in range(4)))
    await close(app)
    heard = {priority for payload in await hints.so_far() for _, priority in lanes(payload)}
    assert heard == set(range(160))


async def test_hints_of_threads_are_heard_of(sync_engine: Engine, client: Durable, hints: Hints) -> None:
    def commit(priorities: list[int]) -> None:
        for priority in priorities:
            with Session(sync_engine) as session:
                client.spawn_with(session, ship, priority=priority)
                session.commit()

    await asyncio.gather(*(asyncio.to_thread(commit, list(range(start, 80, 4))) for start in range(4)))
    await eventually(lambda: not [t for t in threading.enumerate() if t.name == "durable-hints"])
    heard = {priority for payload in await hints.so_far() for _, priority in lanes(payload)}
    assert heard == set(range(80))


async def test_a_failed_commit_is_none(sync_engine: Engine, client: Durable, engine: AsyncEngine) -> None:
    with sync_engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE singles (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
    with Session(sync_engine) as session:
        client.spawn_with(session, ship)
        session.execute(sa.text("INSERT INTO singles VALUES (1), (1)"))
        with pytest.raises(exc.IntegrityError):
            session.commit()
    assert await count(engine) == 0


async def test_an_engine_that_is_gone_loses_hints_and_nothing_else(
    database_url: URL, client: Durable, engine: AsyncEngine
) -> None:
    app = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with app.connect() as connection:
        for _ in range(3):
            await client.spawn_with(connection, ship)
            await connection.commit()
        await asyncio.sleep(0.1)  # the sender finds no connection in the pool
    await close(app)
    assert await count(engine) == 3


@pytest.mark.slow
async def test_variants_of_an_engine_are_not_kept(database_url: URL, client: Durable, sync_engine: Engine) -> None:
    """Applications make one with `execution_options()` for each request."""

    def engines() -> int:
        gc.collect()
        return sum(isinstance(found, Engine) for found in gc.get_objects())

    async def spawn(app: AsyncEngine, number: int) -> None:
        variant = app.execution_options(number=number)
        async with variant.begin() as connection:
            await client.spawn_with(connection, ship)
        with sync_engine.execution_options(number=number).begin() as connection:
            client.spawn_with(connection, ship)

    app = create_async_engine(database_url)
    for number in range(3):
        await spawn(app, number)
    await client.close()
    before = engines()
    for number in range(20):
        await spawn(app, number)
    await client.close()
    await eventually(lambda: not [t for t in threading.enumerate() if t.name == "durable-hints"])
    assert engines() <= before + 5
    await close(app)


@pytest.fixture
def two_phase_url(database_url: URL) -> Iterator[URL]:
    """A database whose server prepares transactions."""
    engine = sa.create_engine(database_url.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        able = connection.scalar(sa.text("SHOW max_prepared_transactions")) != "0"
    engine.dispose()
    if able:
        yield database_url
        return
    with temporary_server(settings={"max_prepared_transactions": 4, "fsync": "off"}) as server:
        url = server.url()

        async def migrate() -> None:
            async with Durable(url) as durable:
                await durable.migrate()

        asyncio.run(migrate())
        yield url


@pytest.mark.slow
async def test_a_prepared_transaction_spawns_when_it_is_committed(two_phase_url: URL, client: Durable) -> None:
    url = two_phase_url.set(drivername="postgresql").render_as_string(hide_password=False)
    hints = Hints(await asyncpg.connect(url))
    await hints.connection.add_listener("durable", hints.receive)
    commits = 0
    for driver, ending in itertools.product(("psycopg2", "psycopg"), ("rollback", "commit")):
        app = sa.create_engine(two_phase_url.set(drivername=f"postgresql+{driver}"))
        with Session(app, twophase=True) as session:
            client.spawn_with(session, ship)
            session.prepare()
            assert await hints.connection.fetchval("SELECT count(*) FROM durable.tasks") == commits
            assert len(await hints.so_far()) == commits
            getattr(session, ending)()
        await close(app)
        commits += ending == "commit"
        assert await hints.connection.fetchval("SELECT count(*) FROM durable.tasks") == commits
        assert len(await hints.so_far()) == commits
    await hints.connection.close()


async def test_a_lone_spawn_sends_its_hint_in_its_own_statement(
    durable: Durable, hints: Hints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.database.notifier.NOTIFY", sa.text("SELECT 'no statement of its own'"))
    at = datetime(2100, 1, 1, tzinfo=UTC)
    await durable.spawn_by_name("ship", unchecked=True, available_at=at)
    assert Hint.decode(await hints.next()) == Hint({("default", 0): at}, tasks=1)


@pytest.mark.slow
async def test_hints_of_spawns_in_a_row_are_merged(
    durable: Durable, hints: Hints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is sent at once, and those of the time after it together."""
    monkeypatch.setattr("durable_sa.database.notifier.SPACING", 0.5)
    durable.register(ship)
    at = datetime(2100, 1, 1, tzinfo=UTC)
    limited = CancellationPolicy(max_pending_time=60)
    await durable.spawn(ship, available_at=at, priority=3, cancellation=limited)
    assert Hint.decode(await hints.next()) == Hint({("default", 3): at}, timers=True, tasks=1)
    hints.heard.clear()
    for priority in (5, 5, 7):
        await durable.spawn(ship, available_at=at, priority=priority)
    with pytest.raises(QueueNotFound):
        await durable.spawn(ship, queue_name="nowhere")
    heard = Hint.decode(await hints.next())
    assert heard is not None
    assert heard.lanes == {("default", 5): at, ("default", 7): at}


async def test_a_lone_spawn_carries_the_hints_that_wait(
    durable: Durable, hints: Hints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.database.notifier.NOTIFY", sa.text("SELECT 'no statement of its own'"))
    durable.register(ship)
    at = datetime(2100, 1, 1, tzinfo=UTC)
    sender = notifier.sender(durable.database)
    sender._outbox.put(Hint({("default", 5): at}), None)  # pyright: ignore[reportPrivateUsage]
    await durable.spawn(ship, available_at=at, priority=7)
    await hints.next()
    heard = [lanes(payload) for payload in await hints.so_far()]
    assert heard == [{("default", 7): at}, {("default", 5): at}]


async def test_hints_that_a_refused_spawn_was_to_carry_are_sent_all_the_same(
    durable: Durable, hints: Hints, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = notifier.sender(durable.database)
    at = datetime(2100, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(sender, "take", lambda: Hint({("default", 5): at}))
    durable.register(ship)
    with pytest.raises(QueueNotFound):
        await durable.spawn(ship, queue_name="nowhere")
    assert Hint.decode(await hints.next()) == Hint({("default", 5): at}, tasks=1)


@pytest.mark.slow
async def test_an_engine_without_a_client_remembers_when_its_latest_hint_was_sent(
    durable: Durable, hints: Hints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next transaction then waits for its turn, and shares a hint with those that follow."""
    monkeypatch.setattr("durable_sa.database.notifier.SPACING", 1)
    durable.register(ship)
    app = create_async_engine(durable.engine.url)
    for spawns in (1, 2):
        hints.heard.clear()
        for _ in range(spawns):
            async with AsyncSession(app) as session, session.begin():
                await durable.spawn_with(session, ship)
        await hints.next()
        assert len(await hints.so_far()) == 1
        gc.collect()
    await app.dispose()


async def test_many_spawns_at_once_do_not_wait_in_line_for_their_hints(durable: Durable, hints: Hints) -> None:
    durable.register(ship)
    await asyncio.gather(*(durable.spawn(ship) for _ in range(200)))
    await hints.next()
    assert len(await hints.so_far()) < 20


async def test_a_lone_spawn_that_is_refused_sends_no_hint(durable: Durable, hints: Hints) -> None:
    durable.register(ship)
    with pytest.raises(QueueNotFound):
        await durable.spawn(ship, queue_name="nowhere")
    assert await hints.so_far() == []


async def test_sending_a_hint_leaves_its_connection_as_durable_as_it_was(durable: Durable) -> None:
    async with durable.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(sa.text("SET synchronous_commit = local"))
        await connection.execute(NOTIFY, {"channel": "durable", "payload": "x"})
        assert await connection.scalar(sa.text("SHOW synchronous_commit")) == "local"
        await connection.execute(sa.text("RESET synchronous_commit"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.slow
def test_a_forked_process_does_not_leave_its_hints_to_a_thread_that_it_does_not_have() -> None:
    program = """
import os
from sqlalchemy import create_engine
from durable_sa.database import notifier as hints
engine = create_engine("postgresql+psycopg2://nowhere/nothing")
kept = hints._thread_senders[engine.pool, "durable"] = hints._ThreadSender(engine, "durable")
if os.fork() == 0:
    os._exit(len(hints._thread_senders))
print(os.waitstatus_to_exitcode(os.wait()[1]), len(hints._thread_senders))
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == ["0", "1"]
