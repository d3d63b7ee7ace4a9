"""`ctx.transaction` with a plain function and psycopg: in a thread, on a synchronous session of the application."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, Engine, create_engine, event, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from durable_sa import Durable, Hooks, RetryStrategy, SyncTaskContext, TaskContext, current_context, task, transaction
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "ledger"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Unique(Base):
    __tablename__ = "uniques"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
async def engine(database_url: URL) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(database_url.set(drivername="postgresql+psycopg"))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


async def entries(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list((await connection.execute(select(Entry.text).order_by(Entry.id))).scalars())


def note(session: Session, entry: str) -> str:
    session.add(Entry(text=entry))
    return entry.upper()


@task
async def noop(ctx: TaskContext) -> None:
    pass


@pytest.mark.parametrize("sync", [False, True])
async def test_its_writes_and_its_checkpoint_commit_together(run: Runner, engine: AsyncEngine, sync: bool):
    threads: list[int] = []
    child: list[Any] = []

    def work(session: Session, entry: str) -> str:
        threads.append(threading.get_ident())
        assert type(session) is Session
        child.append(run.durable.spawn_with(session, noop))
        # A blocking call, which holds up nothing but this thread.
        session.execute(select(func.pg_sleep(0.01)))
        assert current_context().task_name == "both"
        return note(session, entry)

    if sync:

        @task("both")
        def both(ctx: SyncTaskContext) -> list[str]:
            found = [ctx.transaction("a", work, "x"), ctx.transaction("a", work, "y")]
            assert threads == [threading.get_ident()] * 2 or ctx.attempt == 2
            if ctx.attempt == 1:
                raise Crash
            return found
    else:

        @task("both")
        async def both(ctx: TaskContext) -> list[str]:
            found = [await ctx.transaction("a", work, "x"), await ctx.transaction("a", work, "y")]
            if ctx.attempt == 1:
                raise Crash
            return found

    run.durable.register(noop)
    assert await run(both) == ["X", "Y"]
    assert await entries(engine) == ["x", "y"]
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    for spawned in child:
        assert (await run.wait(spawned)).status == "completed"


async def test_the_decorator(run: Runner, engine: AsyncEngine):
    decorated = transaction("noted")(note)

    @task
    def work(ctx: SyncTaskContext) -> str:
        return decorated("d")

    assert await run(work) == "D"
    assert await entries(engine) == ["d"]


async def test_the_event_loop_goes_on_meanwhile(run: Runner):
    turned = threading.Event()

    def blocks(session: Session) -> bool:
        return turned.wait(10)

    async def turn() -> None:
        turned.set()

    @task
    async def work(ctx: TaskContext) -> bool:
        blocked = asyncio.ensure_future(ctx.transaction("blocks", blocks))
        await asyncio.sleep(0.05)
        await ctx.step("turn", turn)
        return await blocked

    assert await run(work) is True


async def test_an_exception_leaves_nothing_and_is_raised_as_it_is(run: Runner, engine: AsyncEngine):
    def twice(session: Session) -> None:
        note(session, "x")
        session.add_all([Unique(id=1)])
        session.flush()
        session.expunge_all()
        session.add(Unique(id=1))
        session.flush()

    @task
    async def work(ctx: TaskContext) -> str:
        try:
            await ctx.transaction("twice", twice)
        except IntegrityError:
            return "refused"
        return ""

    assert await run(work) == "refused"
    assert await entries(engine) == []


async def test_a_flush_that_fails_in_a_savepoint(run: Runner, engine: AsyncEngine):
    def tries(session: Session) -> str:
        note(session, "x")
        session.execute(text("INSERT INTO uniques VALUES (1)"))
        try:
            with session.begin_nested():
                session.add(Unique(id=1))
        except IntegrityError:
            return "refused"
        return ""

    @task
    async def work(ctx: TaskContext) -> str:
        return await ctx.transaction("tries", tries)

    assert await run(work) == "refused"
    assert await entries(engine) == ["x"]


def commits(session: Session) -> None:
    note(session, "x")
    session.commit()


def commits_and_hides_it(session: Session) -> None:
    note(session, "x")
    with suppress(Exception):
        session.commit()


def commits_by_sql(session: Session) -> None:
    session.execute(text("COMMIT"))


def commits_the_connection(session: Session) -> None:
    note(session, "x")
    session.flush()
    session.connection().commit()


def rolls_back(session: Session) -> None:
    session.rollback()


def rolls_back_the_connection(session: Session) -> None:
    session.connection().get_transaction().rollback()


def swallows_a_failed_flush(session: Session) -> None:
    session.execute(text("INSERT INTO uniques VALUES (1)"))
    session.add(Unique(id=1))
    with suppress(IntegrityError):
        session.flush()


def closes(session: Session) -> None:
    with session:
        note(session, "x")


@pytest.mark.parametrize(
    "fn",
    [
        commits,
        commits_and_hides_it,
        commits_by_sql,
        commits_the_connection,
        rolls_back,
        rolls_back_the_connection,
        swallows_a_failed_flush,
        closes,
    ],
)
async def test_only_the_engine_ends_the_transaction(run: Runner, engine: AsyncEngine, fn: Any):
    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("ends", fn)

    error = await run.failure(work, max_attempts=1)
    assert error.name == "InvalidState"
    assert "'ends'" in error.message
    assert await entries(engine) == []


async def test_a_result_that_cannot_be_stored_leaves_nothing(run: Runner, engine: AsyncEngine):
    def odd(session: Session) -> object:
        note(session, "x")
        return object()

    async def late(session: Session) -> None: ...

    @task
    async def work(ctx: TaskContext, which: str) -> None:
        await ctx.transaction("odd", odd if which == "odd" else lambda session: late(session))

    for which in ("odd", "awaitable"):
        assert (await run.failure(work, which)).name == "SerializationError"
    assert await entries(engine) == []


async def test_serialization_failures_and_lost_connections_are_retried(run: Runner, engine: AsyncEngine, tally: Tally):
    def work(session: Session) -> int:
        tally.add("call")
        note(session, f"call {len(tally)}")
        session.flush()
        if len(tally) == 1:
            session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"))
        if len(tally) == 2:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return len(tally)

    @task
    async def retried(ctx: TaskContext) -> int:
        return await ctx.transaction("work", work)

    assert await run(retried) == 3
    assert await entries(engine) == ["call 3"]


async def test_a_lost_reply_to_the_commit_is_looked_up(
    run: Runner, engine: AsyncEngine, tally: Tally, monkeypatch: pytest.MonkeyPatch
):
    commit = Session.commit

    def lose_reply(session: Session) -> None:
        commit(session)
        if tally == ["call"] and session.info.get("own", True):
            tally.add("lost")
            connection = session.connection()
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    monkeypatch.setattr(Session, "commit", lose_reply)

    def work(session: Session) -> int:
        tally.add("call")
        note(session, "x")
        return tally.count("call")

    @task
    async def once(ctx: TaskContext) -> int:
        return await ctx.transaction("work", work)

    assert await run(once) == 1
    assert await entries(engine) == ["x"]
    assert tally == ["call", "lost", "call"]


@pytest.mark.slow
async def test_a_run_that_has_lost_its_task_commits_nothing(run: Runner, engine: AsyncEngine, tally: Tally):
    reached, go_on = threading.Event(), threading.Event()

    def work(session: Session) -> str:
        tally.add("call")
        number = len(tally)
        note(session, f"call {number}")
        session.flush()
        if number == 1:
            reached.set()
            go_on.wait(10)
        return f"call {number}"

    @task
    async def fenced(ctx: TaskContext) -> str:
        return await ctx.transaction("work", work)

    spawned = await run.spawn(fenced)
    await asyncio.to_thread(reached.wait, 10)
    await Rows(run.durable, spawned).take_over()
    go_on.set()
    assert (await run.wait(spawned)).output == "call 2"
    assert await entries(engine) == ["call 2"]


async def test_a_caller_that_was_cancelled_gets_it_rolled_back(run: Runner, engine: AsyncEngine, tally: Tally):
    go_on = threading.Event()

    def work(session: Session) -> None:
        note(session, "x")
        session.flush()
        go_on.wait(10)
        tally.add("done")

    async def ended() -> bool:
        async with engine.connect() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
            return bool(tally) and (await connection.execute(text(query))).scalar() == 0

    async def wait_for_its_end() -> None:
        await eventually(ended)

    @task
    async def impatient(ctx: TaskContext) -> str:
        try:
            async with asyncio.timeout(0.05):
                await ctx.transaction("work", work)
        except TimeoutError:
            go_on.set()
            # The run goes on, and so would hold the fence.
            await ctx.step("wait", wait_for_its_end)
            return "gave up"
        return ""

    assert await run(impatient) == "gave up"
    assert await entries(engine) == []


def bound(kind: str, engine: Engine) -> Any:
    sessions = sessionmaker(engine, expire_on_commit=False, info={"own": True})
    return {"sessionmaker": sessions, "scoped_session": scoped_session(sessions), "Engine": engine}[kind]


@pytest.mark.parametrize("kind", ["sessionmaker", "scoped_session", "Engine"])
async def test_sync_bind(kind: str, database_url: URL, engine: AsyncEngine, sync_engine: Engine):
    given = bound(kind, sync_engine)
    async with Durable(database_url, sync_bind=given, tasks=[]) as durable:
        run = Runner(durable)

        def work(session: Session) -> str:
            if kind == "scoped_session":
                assert given() is session
                note(given, "x")
            else:
                note(session, "x")
            assert session.info.get("own", False) == (kind != "Engine")
            return session.get_bind().dialect.driver

        @task("in async")
        async def first(ctx: TaskContext) -> str:
            return await ctx.transaction("work", work)

        @task("in sync")
        def second(ctx: SyncTaskContext) -> str:
            outer = given() if kind == "scoped_session" else None
            found = ctx.transaction("work", work)
            if kind == "scoped_session":
                assert given() is outer
                given.remove()
            return found

        async with durable.worker():
            assert await run(first) == await run(second) == "psycopg2"
    assert await entries(engine) == ["x", "x"]


async def test_hooks_are_in_the_thread(engine: AsyncEngine, tally: Tally):
    class Entered(Hooks):
        @contextmanager
        def around_step(self, ctx: TaskContext, name: str) -> Generator[None]:
            tally.add(f"in {name}")
            yield
            tally.add(f"out {name}")

    def work(session: Session) -> None:
        tally.add("work")

    @task
    async def first(ctx: TaskContext) -> None:
        await ctx.transaction("a", work)

    @task
    def second(ctx: SyncTaskContext) -> None:
        ctx.transaction("b", work)

    async with Durable(engine, hooks=[Entered()], tasks=[first, second]) as durable, durable.worker():
        await Runner(durable)(first)
        await Runner(durable)(second)
    assert tally == ["in a", "work", "out a", "in b", "work", "out b"]


async def test_an_autocommit_engine_and_another_schema(database_url: URL, engine: AsyncEngine):
    autocommit = create_engine(
        database_url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT", pool_size=2
    )

    def work(session: Session) -> str:
        note(session, "x")
        session.flush()
        if len(calls := session.info.setdefault("calls", [])) == 0:
            calls.append(1)
        raise LookupError

    @task
    async def fails(ctx: TaskContext) -> None:
        await ctx.transaction("work", work)

    @task
    async def succeeds(ctx: TaskContext) -> str:
        return await ctx.transaction("note", note, "y")

    client = Durable(
        engine,
        sync_bind=autocommit,
        schema="jobs",
        tasks=[fails, succeeds],
        default_retry_strategy=RetryStrategy.fixed(0),
        default_max_attempts=1,
    )
    async with client as durable:
        await durable.migrate()
        await durable.create_queue()
        async with durable.worker():
            assert (await Runner(durable).failure(fails)).name == "LookupError"
            assert await Runner(durable)(succeeds) == "Y"
    assert await entries(engine) == ["y"]
    autocommit.dispose()


class Own(Session):
    pass


class OwnAsync(AsyncSession):
    sync_session_class = Own


async def test_the_session_is_of_the_applications_class(engine: AsyncEngine):
    def work(session: Session) -> str:
        return f"{type(session).__name__} {session.autoflush}"

    @task
    async def named(ctx: TaskContext) -> str:
        return await ctx.transaction("work", work)

    sessions = async_sessionmaker(engine, class_=OwnAsync, autoflush=False)
    async with Durable(sessions, tasks=[named]) as durable, durable.worker():
        assert await Runner(durable)(named) == "Own False"


async def test_a_thread_waits_and_no_other_task(run: Runner, engine: AsyncEngine):
    """Transactions that block for longer than the worker's poll overlap."""
    together = threading.Barrier(3)

    def work(session: Session) -> None:
        together.wait(10)
        time.sleep(0.01)

    @task
    def blocking(ctx: SyncTaskContext) -> None:
        ctx.transaction("work", work)

    spawned = [await run.spawn(blocking) for _ in range(3)]
    for one in spawned:
        assert (await run.wait(one)).status == "completed"


@pytest.mark.parametrize("how", ["listener", "creator", "binds"])
async def test_an_engine_that_cannot_be_copied_is_used_itself(database_url: URL, engine: AsyncEngine, how: str):
    """Its transactions run on the event loop: a synchronous engine of the same URL would be another one."""
    url = database_url.set(drivername="postgresql+psycopg")
    own = engine

    async def connect() -> Any:
        return await psycopg.AsyncConnection.connect(url.set(drivername="postgresql").render_as_string(False))

    if how == "creator":
        own = create_async_engine(url, async_creator=connect)
    if how == "listener":
        event.listen(own.sync_engine, "connect", lambda *_: None)
    bind = async_sessionmaker(binds={Entry: own}, bind=own) if how == "binds" else own

    def work(session: Session) -> bool:
        note(session, "x")
        return threading.get_ident() == loop_thread

    loop_thread = threading.get_ident()

    @task
    async def looped(ctx: TaskContext) -> bool:
        return await ctx.transaction("work", work)

    async with Durable(bind, tasks=[looped]) as durable, durable.worker():
        assert await Runner(durable)(looped) is True
    assert await entries(engine) == ["x"]
    await own.dispose()


def _cancel(durable: Durable, session: Any, ctx: Any) -> None:
    with session.begin_nested():
        durable.cancel_task_with(session, ctx.task_id)


def _cancel_parent(durable: Durable, session: Any, ctx: Any) -> None:
    durable.cancel_task_with(session, ctx.headers["parent"])


def _respawn(durable: Durable, session: Any, ctx: Any) -> None:
    durable.spawn_with(session, durable.tasks["stops"], unique="poll", on_conflict="cancel", delay=3600)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("kind", ["def", "async def", "async function"])
@pytest.mark.parametrize("end", [_cancel, _cancel_parent, _respawn])
async def test_a_task_that_cancels_itself_is_cancelled(
    database_url: URL, engine: AsyncEngine, driver: str, kind: str, end: Any
):
    parents: list[Any] = []

    def work(session: Session) -> None:
        session.add(Entry(text="cancelled"))
        end(durable, session, current_context())

    async def work_async(session: AsyncSession) -> None:
        await session.run_sync(work)

    @task
    async def stops(ctx: TaskContext) -> str:
        await ctx.transaction("stop", work_async if kind == "async function" else work)
        return "not reached"

    @task("stops")
    def stops_too(ctx: SyncTaskContext) -> str:
        ctx.transaction("stop", work)
        return "not reached"

    stopping: Any = stops_too if kind == "def" else stops

    @task
    async def parent(ctx: TaskContext) -> None:
        parents.append(await ctx.spawn("child", stopping, headers={"parent": str(ctx.task_id)}))
        await ctx.join(parents[0])

    url = database_url.set(drivername=f"postgresql+{driver}")
    async with Durable(url, tasks=[stopping, parent]) as durable, durable.worker():
        if end is _cancel_parent:
            assert (await durable.wait_for_result(await durable.spawn(parent), timeout=10)).status == "cancelled"
            spawned = parents[0]
        else:
            spawned = await durable.spawn(stopping, unique="poll")
        assert (await durable.wait_for_result(spawned, timeout=10)).status == "cancelled"
        assert await entries(engine) == ["cancelled"]
        others = [item for item in (await durable.list_tasks()).items if item.status == "pending"]
        assert len(others) == (end is _respawn)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_task_that_restarts_itself_fails(database_url: URL, engine: AsyncEngine, driver: str):
    def work(session: Session) -> None:
        session.add(Entry(text="restarted"))
        durable.cancel_task_with(session, current_context().task_id)
        durable.retry_task_with(session, current_context().task_id)

    @task
    async def restarts(ctx: TaskContext) -> None:
        await ctx.transaction("restart", work)

    url = database_url.set(drivername=f"postgresql+{driver}")
    async with Durable(url, tasks=[restarts]) as durable, durable.worker():
        result = await durable.wait_for_result(await durable.spawn(restarts), timeout=10)
    assert result.error is not None
    assert (result.status, result.error.name) == ("failed", "InvalidState")
    assert await entries(engine) == []
