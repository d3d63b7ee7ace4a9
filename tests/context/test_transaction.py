"""`ctx.transaction`: the writes of a function and the memory of it commit together, exactly once or not at all."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from sqlalchemy import URL, Connection, String, event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool

from durable_sa import Durable, InvalidState, RetryStrategy, SyncTaskContext, TaskContext, task, transaction
from durable_sa.models import Base as DurableBase
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "ledger"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String())


@pytest.fixture(autouse=True)
async def ledger(engine: AsyncEngine) -> AsyncGenerator["Ledger"]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield Ledger(engine)


class Ledger:
    """What the transactions of a test have committed. Nothing in it is unique, so doubles show."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def entries(self) -> list[str]:
        async with self.engine.connect() as connection:
            return list((await connection.execute(select(Entry.text).order_by(Entry.id))).scalars())


async def note(session: AsyncSession, entry: str) -> str:
    session.add(Entry(text=entry))
    return entry.upper()


async def test_writes_and_checkpoint_are_there_once_after_a_replay(run: Runner, ledger: Ledger):
    @task
    async def work(ctx: TaskContext) -> list[str]:
        found = [await ctx.transaction("note", note, "a"), await ctx.transaction("note", note, "b")]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == ["A", "B"]
    assert await ledger.entries() == ["a", "b"]


async def test_what_is_only_added_is_flushed_before_the_commit(run: Runner, ledger: Ledger):
    async def add(session: AsyncSession) -> None:
        session.add_all([Entry(text="x"), Entry(text="y")])

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("add", add)

    await run(work)
    assert await ledger.entries() == ["x", "y"]


async def test_exception_leaves_neither_writes_nor_checkpoint(run: Runner, ledger: Ledger, tally: Tally):
    async def fail_once(session: AsyncSession) -> None:
        tally.add("called")
        session.add(Entry(text=f"call {len(tally)}"))
        await session.flush()
        if len(tally) == 1:
            raise ValueError("after the write")

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("fail-once", fail_once)

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert await ledger.entries() == ["call 2"]
    assert [row.state for row in await Rows(run.durable, spawned).runs()] == ["failed", "completed"]


async def test_result_that_cannot_be_stored_leaves_nothing(run: Runner, ledger: Ledger, tally: Tally):
    async def give(session: AsyncSession) -> object:
        tally.add("called")
        session.add(Entry(text="x"))
        return object()

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("give", give)

    error = await run.failure(work)
    assert error.name == "SerializationError"
    assert "'give'" in error.message
    assert await ledger.entries() == []
    assert tally == ["called"]


async def test_plain_function_gets_a_session(run: Runner, ledger: Ledger):
    def plain(session: Session, entry: str, *, times: int) -> int:
        assert type(session) is Session
        for _ in range(times):
            session.add(Entry(text=entry))
        session.flush()
        return len(session.scalars(select(Entry)).all())

    @task
    async def work(ctx: TaskContext) -> int:
        found = await ctx.transaction("plain", plain, "p", times=2)
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == 2
    assert await ledger.entries() == ["p", "p"]


class Notary:
    async def __call__(self, session: AsyncSession, entry: str) -> str:
        return await note(session, entry)


async def test_object_that_is_called_asynchronously_is_awaited(run: Runner, ledger: Ledger):
    @task
    async def work(ctx: TaskContext) -> str:
        return await ctx.transaction("note", Notary(), "n")

    assert await run(work) == "N"
    assert await ledger.entries() == ["n"]


async def test_in_a_plain_task(run: Runner, ledger: Ledger):
    def plain(session: Session, entry: str) -> str:
        session.add(Entry(text=entry))
        return entry * 2

    @task
    def work(ctx: SyncTaskContext) -> str:
        found = ctx.transaction("plain", plain, "s")
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == "ss"
    assert await ledger.entries() == ["s"]


@pytest.mark.filterwarnings("ignore:nested transaction already deassociated")
@pytest.mark.parametrize("how", ["session", "connection", "begin", "connection in a savepoint", "COMMIT", " end;"])
async def test_commit_inside_is_refused_and_commits_nothing(run: Runner, ledger: Ledger, how: str):
    async def commits(session: AsyncSession) -> None:
        session.add(Entry(text="x"))
        await session.flush()
        if how == "session":
            await session.commit()
        elif how == "connection":
            await (await session.connection()).commit()
        elif how == "connection in a savepoint":
            async with session.begin_nested():
                await (await session.connection()).commit()
        elif how != "begin":
            await session.execute(text(how))
        else:
            transaction = (await session.connection()).get_transaction()
            assert transaction is not None
            await transaction.commit()

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("commits", commits)

    error = await run.failure(work)
    assert error.name == "InvalidState"
    assert "'commits'" in error.message
    assert await ledger.entries() == []


@pytest.mark.filterwarnings("ignore:nested transaction already deassociated")
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("how", ["session", "connection"])
async def test_nothing_is_left_open_where_the_end_was_refused(
    run: Runner, ledger: Ledger, database_url: URL, how: str, end: str, swallowed: bool
):
    """Otherwise the next user of the connection would commit it."""

    async def ends(session: AsyncSession) -> None:
        session.add(Entry(text="x"))
        await session.flush()
        ending: Any = session if how == "session" else await session.connection()
        try:
            await getattr(ending, end)()
        except InvalidState:
            if not swallowed:
                raise

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("ends", ends)

    assert (await run.failure(work)).name == "InvalidState"
    onlooker = create_async_engine(database_url)
    async with onlooker.connect() as connection:
        idle = text("SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in %'")
        assert (await connection.execute(idle)).scalars().all() == []
    await onlooker.dispose()
    assert await ledger.entries() == []


@pytest.mark.parametrize("how", ["session", "connection", "ROLLBACK", "abort"])
async def test_rollback_inside_is_refused(run: Runner, ledger: Ledger, how: str):
    """Otherwise it would be remembered as done although nothing was."""

    async def rolls_back(session: AsyncSession) -> None:
        session.add(Entry(text="x"))
        await session.flush()
        if how == "session":
            await session.rollback()
        elif how == "connection":
            await (await session.connection()).rollback()
        else:
            await session.execute(text(how))

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("rolls back", rolls_back)

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).error.name == "InvalidState"
    assert await ledger.entries() == []
    assert await Rows(run.durable, spawned).checkpoints() == []


@pytest.mark.parametrize("how", ["close", "async with", "with", "reset", "closed and used again"])
async def test_session_that_is_closed_inside_is_refused(run: Runner, ledger: Ledger, how: str):
    """That undoes what was written: it would be remembered as done although nothing was."""

    async def closes(session: AsyncSession) -> None:
        session.add(Entry(text="x"))
        await session.flush()
        if how == "async with":
            async with session:
                pass
        elif how == "reset":
            await session.reset()
        else:
            await session.close()
        if how == "closed and used again":
            session.add(Entry(text="y"))

    def closes_plainly(session: Session) -> None:
        with session:
            session.add(Entry(text="x"))
            session.flush()

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("closes", closes_plainly if how == "with" else closes)

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "InvalidState"
    assert "close()" in error.message
    assert await ledger.entries() == []
    assert await Rows(run.durable, spawned).checkpoints() == []


async def test_session_that_is_closed_for_an_exception_does_not_hide_it(run: Runner, ledger: Ledger):
    async def fails(session: AsyncSession) -> None:
        async with session:
            session.add(Entry(text="x"))
            await session.flush()
            raise ValueError

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("fails", fails)

    assert (await run.failure(work)).name == "ValueError"
    assert await ledger.entries() == []


async def test_lambda_that_calls_a_coroutine_function_is_told_what_to_write(run: Runner, ledger: Ledger):
    async def write(session: Any, text: str) -> None:
        session.add(Entry(text=text))

    def both(session: Session) -> Any:
        session.add(Entry(text="before"))
        return write(session, "x")

    @task(max_attempts=3)
    async def work(ctx: TaskContext, fn: str) -> None:
        await ctx.transaction("write", both if fn == "both" else lambda session: write(session, "x"))

    for fn in ("lambda", "both"):
        error = await run.failure(work, fn)
        assert error.name == "SerializationError"
        assert error.message.startswith("The result of transaction 'write' is a coroutine, which is never awaited")
        assert "Pass the coroutine function itself, followed by its arguments" in error.message
    assert await ledger.entries() == []


async def test_part_of_it_may_be_rolled_back(run: Runner, ledger: Ledger):
    async def partly(session: AsyncSession) -> None:
        session.add(Entry(text="kept"))
        try:
            async with session.begin_nested():
                session.add(Entry(text="undone"))
                await session.flush()
                raise ValueError
        except ValueError:
            pass
        async with session.begin_nested():
            session.add(Entry(text="kept, too"))
        nested = await session.begin_nested()
        session.add(Entry(text="also undone"))
        await nested.rollback()

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("partly", partly)

    await run(work)
    assert await ledger.entries() == ["kept", "kept, too"]


async def test_database_error_that_was_handled_in_a_savepoint_does_no_harm(run: Runner, ledger: Ledger):
    async def insist(session: AsyncSession) -> None:
        session.add(Entry(id=1, text="first"))
        await session.flush()
        try:
            async with session.begin_nested():
                await session.execute(text("INSERT INTO ledger VALUES (1, 'second')"))
        except Exception:  # noqa: BLE001 - whichever the driver has
            await session.execute(text("UPDATE ledger SET text = 'changed'"))

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("insist", insist)

    await run(work)
    assert await ledger.entries() == ["changed"]


async def test_session_is_of_the_applications_own_making(engine: AsyncEngine, ledger: Ledger):
    class OwnSession(Session):
        pass

    class OwnAsyncSession(AsyncSession):
        sync_session_class = OwnSession

    flushed: list[str] = []
    maker = async_sessionmaker(engine, class_=OwnAsyncSession, info={"app": "shop"})
    event.listen(OwnSession, "after_flush", lambda session, _: flushed.append(session.info["app"]))

    async def own(session: AsyncSession) -> list[str]:
        session.add(Entry(text="own"))
        return [type(session).__name__, type(session.sync_session).__name__]

    def plain(session: Session) -> str:
        return type(session).__name__

    async with Durable(maker) as durable, durable.worker():
        run = Runner(durable)

        @task
        async def work(ctx: TaskContext) -> list[Any]:
            return [await ctx.transaction("own", own), await ctx.transaction("plain", plain)]

        assert await run(work) == [["OwnAsyncSession", "OwnSession"], "OwnSession"]
    assert flushed == ["shop"]
    assert await ledger.entries() == ["own"]


SESSIONMAKERS: dict[str, Callable[[AsyncEngine], dict[str, Any]]] = {
    "classes bound": lambda engine: {"binds": {Base: engine, DurableBase: engine}},
    "classes bound to a variant": lambda engine: {"binds": {Entry: engine.execution_options(tenant=1)}},
    "two phases": lambda _: {"twophase": True},
    "another mode of joining": lambda _: {"join_transaction_mode": "control_fully"},
    "nothing by itself": lambda _: {"autoflush": False, "autobegin": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SESSIONMAKERS.values(), ids=SESSIONMAKERS)
async def test_sessions_of_any_kind_commit_with_the_checkpoint(
    engine: AsyncEngine, ledger: Ledger, options: Callable[[AsyncEngine], dict[str, Any]]
):
    async def spawning(session: AsyncSession) -> int:
        session.add(Entry(text="written"))
        await session.flush()
        await durable.spawn_with(session, bystander)
        return len((await session.scalars(select(Entry))).all())

    @task
    async def bystander(ctx: TaskContext) -> None: ...

    @task
    async def work(ctx: TaskContext) -> int:
        found = await ctx.transaction("spawning", spawning)
        if ctx.attempt == 1:
            raise Crash
        return found

    maker = async_sessionmaker(engine, **options(engine))
    durable = Durable(maker, default_retry_strategy=RetryStrategy.fixed(0), tasks=[bystander])
    async with durable, durable.worker(concurrency=2):
        assert await Runner(durable)(work) == 1
    assert await ledger.entries() == ["written"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["write", "read", "read, and the refusal is swallowed"])
@pytest.mark.parametrize("kind", ["another database", "an engine of its own choice"])
async def test_what_would_not_commit_with_it_is_refused(
    engine: AsyncEngine, ledger: Ledger, database_url: URL, kind: str, first: str
):
    """Otherwise it would be remembered as done, and never be committed."""
    other = create_async_engine(database_url.set(username="postgres", password="secret"))

    class Choosing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return other.sync_engine

    if kind == "another database":
        maker = async_sessionmaker(engine, binds={Base: other})
    else:
        maker = async_sessionmaker(engine, sync_session_class=Choosing)

    async def goes_elsewhere(session: AsyncSession) -> None:
        if first == "write":
            session.add(Entry(text="lost"))
            return
        try:
            await session.scalars(select(Entry))
        except InvalidState:
            if first == "read":
                raise

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("goes elsewhere", goes_elsewhere)

    async with Durable(maker) as durable, durable.worker():
        error = await Runner(durable).failure(work)
    assert error.name == "InvalidState"
    assert "another connection" in error.message
    assert "secret" not in error.message
    assert isinstance(other.pool, AsyncAdaptedQueuePool)
    assert other.pool.checkedout() == 0
    assert await ledger.entries() == []
    await other.dispose()


async def test_spawn_and_emit_on_the_session_commit_with_it(run: Runner, ledger: Ledger, tally: Tally):
    @run.durable.task
    async def child(ctx: TaskContext, params: str) -> None:
        tally.add(params)

    async def order(session: AsyncSession, name: str) -> None:
        tally.add("order")
        session.add(Entry(text=name))
        await run.durable.spawn_with(session, child, name)
        assert await run.durable.emit_event_with(session, f"ordered-{name}", name)
        if tally.count("order") == 1:
            raise ConnectionError

    @task
    async def work(ctx: TaskContext) -> str:
        await ctx.transaction("order", order, "tea")
        return await ctx.await_event("ordered-tea")

    assert await run(work) == "tea"
    await eventually(lambda: "tea" in tally)
    assert tally.count("tea") == 1
    assert await ledger.entries() == ["tea"]


async def test_spawn_and_emit_work_on_a_plain_session_as_well(run: Runner, tally: Tally):
    @run.durable.task
    async def child(ctx: TaskContext, params: str) -> None:
        tally.add(params)

    def order(session: Session) -> None:
        run.durable.spawn_with(session, child, "tea")
        assert run.durable.emit_event_with(session, "ordered")

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("order", order)
        await ctx.await_event("ordered")

    await run(work)
    await eventually(lambda: tally == ["tea"])


@pytest.mark.slow
async def test_serialization_failure_runs_the_function_again(engine: AsyncEngine, ledger: Ledger, tally: Tally):
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO ledger VALUES (1, '0')"))
    strict = engine.execution_options(isolation_level="SERIALIZABLE")

    async def add(session: AsyncSession) -> int:
        tally.add("called")
        entry = (await session.scalars(select(Entry))).one()
        if len(tally) == 1:
            async with engine.begin() as connection:
                await connection.execute(text("UPDATE ledger SET text = '10'"))
        entry.text = str(int(entry.text) + 1)
        return int(entry.text)

    async with Durable(strict) as durable, durable.worker():
        run = Runner(durable)

        @task(max_attempts=1)
        async def work(ctx: TaskContext) -> int:
            return await ctx.transaction("add", add)

        assert await run(work) == 11
    assert await ledger.entries() == ["11"]
    assert tally == ["called", "called"]


async def test_a_pooler_that_mixes_up_prepared_statements_is_no_failure_of_the_task(
    run: Runner, ledger: Ledger, tally: Tally
):
    """The server's error is that of a statement which another of its connections has prepared."""

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        async def mixed_up(session: AsyncSession) -> str:
            tally.add("called")
            await session.execute(text("SELECT 1"))
            if len(tally) <= 2:
                await session.execute(text("EXECUTE of_another_connection"))
            return await note(session, "a")

        return await ctx.transaction("note", mixed_up)

    assert await run(work) == "A"
    assert await ledger.entries() == ["a"]
    assert tally == ["called"] * 3


async def test_what_the_function_asks_of_its_context_is_the_same_when_it_is_run_again(run: Runner, tally: Tally):
    async def inner() -> str:
        tally.add("inner")
        return "kept"

    @run.durable.task
    async def child(ctx: TaskContext) -> None: ...

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> list[Any]:
        async def conflicts(session: AsyncSession) -> list[Any]:
            seen = [await ctx.step("inner", inner), (await ctx.spawn("child", child)).task_id, await ctx.rand()]
            tally.add(seen)
            if len(tally) == 2:
                await session.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))
            return seen

        return await ctx.transaction("conflicts", conflicts)

    spawned = await run.spawn(work)
    await run.wait(spawned)
    _, first, second = tally
    assert first == second
    assert len(await Rows(run.durable, spawned).children()) == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
async def test_guarantees_hold_at_every_isolation_level_of_the_engine(
    engine: AsyncEngine, ledger: Ledger, tally: Tally, level: Any
):
    async def fail_once(session: AsyncSession) -> str:
        tally.add("called")
        await session.execute(text("INSERT INTO ledger (text) VALUES ('x')"))
        if len(tally) == 1:
            raise ConnectionError
        return "done"

    own = create_async_engine(engine.url, isolation_level=level)
    async with Durable(own, default_retry_strategy=RetryStrategy.fixed(0)) as durable, durable.worker():
        run = Runner(durable)

        @task
        async def work(ctx: TaskContext) -> list[str]:
            found = await asyncio.gather(*(ctx.transaction("fail-once", fail_once) for _ in range(3)))
            if ctx.attempt < 3:
                raise Crash
            return found

        assert await run(work) == ["done"] * 3
    await own.dispose()
    assert await ledger.entries() == ["x"] * 3


async def test_lost_connection_runs_the_function_again(run: Runner, ledger: Ledger, tally: Tally):
    async def interrupted(session: AsyncSession) -> None:
        tally.add("called")
        session.add(Entry(text=f"call {len(tally)}"))
        await session.flush()
        if len(tally) <= 2:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            async with run.durable.engine.connect() as connection:
                await connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            await session.execute(text("SELECT 1"))

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("interrupted", interrupted)

    await run(work)
    assert await ledger.entries() == ["call 3"]


@pytest.fixture
async def lossy(engine: AsyncEngine) -> AsyncGenerator["Lossy"]:
    own = create_async_engine(engine.url)
    yield Lossy(own)
    await own.dispose()


class Lossy:
    """An engine on which the reply to some commits is lost, or the commit itself is."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.plan: list[str] = []
        self.lost: list[str] = []
        dialect = engine.sync_engine.dialect
        self._commit = dialect.do_commit
        dialect.do_commit = self.commit

    def commit(self, dbapi_connection: Any) -> None:
        what = self.plan.pop(0) if self.plan else "commit"
        if what != "before":
            self._commit(dbapi_connection)
        if what != "commit":
            self.lost.append(what)
            dbapi_connection.terminate()
            raise self.engine.sync_engine.dialect.loaded_dbapi.InterfaceError("connection is closed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [["after"], ["before"], ["after", "after"], ["before", "after"], ["before", "before", "after"]]
)
async def test_commit_whose_reply_is_lost_happens_once(lossy: Lossy, ledger: Ledger, tally: Tally, plan: list[str]):
    async def number(session: AsyncSession) -> int:
        tally.add("called")
        session.add(Entry(text=f"call {len(tally)}"))
        await session.flush()
        if not lossy.lost:
            lossy.plan = list(plan)
        return len(tally)

    async with Durable(lossy.engine) as durable, durable.worker():
        run = Runner(durable)

        @task(max_attempts=1)
        async def work(ctx: TaskContext) -> list[int]:
            return [await ctx.transaction("number", number), await ctx.transaction("number", number)]

        output = await run(work)
    assert lossy.lost == plan
    entries = await ledger.entries()
    assert len(entries) == 2
    # What the task sees is what was committed, by whichever call.
    assert entries == [f"call {call}" for call in output]


@pytest.mark.slow
async def test_run_that_was_taken_over_commits_nothing(run: Runner, ledger: Ledger, tally: Tally):
    async def slow(session: AsyncSession) -> str:
        tally.add("called")
        session.add(Entry(text=f"call {len(tally)}"))
        await session.flush()
        if len(tally) == 1:
            await rows.take_over()
        return f"result {len(tally)}"

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        await ready.wait()
        return await ctx.transaction("slow", slow)

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    ready.set()
    assert (await run.wait(spawned)).output == "result 2"
    assert await ledger.entries() == ["call 2"]


async def test_task_that_was_cancelled_commits_nothing_more(run: Runner, ledger: Ledger):
    began = asyncio.Event()

    async def slow(session: AsyncSession) -> None:
        session.add(Entry(text="x"))
        await session.flush()
        await run.durable.cancel_task(spawned)
        began.set()

    @task
    async def work(ctx: TaskContext) -> None:
        await ready.wait()
        await ctx.transaction("slow", slow)

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    ready.set()
    assert (await run.wait(spawned)).status == "cancelled"
    await began.wait()
    await eventually(lambda: run.durable.engine.pool.checkedout() <= 4)
    assert await ledger.entries() == []
    assert await Rows(run.durable, spawned).checkpoints() == []


async def test_long_transaction_does_not_hold_up_other_branches(run: Runner):
    release = asyncio.Event()

    async def slow(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO ledger (text) VALUES ('x')"))
        await release.wait()

    async def quick(number: int) -> int:
        return number

    @task
    async def work(ctx: TaskContext) -> int:
        async def others() -> int:
            found = [await ctx.step("quick", quick, number) for number in range(5)]
            release.set()
            return sum(found)

        _, total = await asyncio.gather(ctx.transaction("slow", slow), others())
        return total

    async with asyncio.timeout(10):
        assert await run(work) == 10


@pytest.mark.slow
async def test_connections_of_transactions_go_back_to_the_pool(run: Runner, ledger: Ledger):
    async def fail(session: AsyncSession) -> None:
        session.add(Entry(text="x"))
        await session.flush()
        raise ValueError

    @task(max_attempts=20)
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("note", note, str(ctx.attempt))
        if ctx.attempt < 20:
            await ctx.transaction("fail", fail)

    spawned = [await run.spawn(work) for _ in range(3)]
    for each in spawned:
        await run.wait(each)
    assert len(await ledger.entries()) == 60
    async with run.durable.engine.connect() as connection:
        idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
        assert (await connection.execute(text(idle))).scalar() == 0


async def test_events_of_the_connection_see_one_commit(run: Runner, ledger: Ledger):
    commits: list[Connection] = []

    async def watched(session: AsyncSession) -> None:
        connection = await session.connection()
        event.listen(connection.sync_connection, "commit", commits.append)
        session.add(Entry(text="x"))

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.transaction("watched", watched)

    await run(work)
    assert len(commits) == 1


@transaction
async def write_down(session: AsyncSession, entry: str, *, twice: bool = False) -> str:
    """Write an entry."""
    await session.execute(text("SELECT 1"))
    session.add_all([Entry(text=entry)] * (1 + twice))
    return entry.upper()


@Durable.transaction("write-plainly")
def write_plainly(session: Session, entry: str) -> str:
    session.add(Entry(text=entry))
    return entry.upper()


async def test_the_call_of_a_decorated_function_is_a_transaction(run: Runner, ledger: Ledger):
    @task
    async def work(ctx: TaskContext) -> list[str]:
        found = [await write_down("a"), await write_down("a"), await write_plainly("b")]  # type: ignore[misc]
        if ctx.attempt == 1:
            raise Crash
        return [*found, await ctx.transaction("other name", write_down, "c")]

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == ["A", "A", "B", "C"]
    assert await ledger.entries() == ["a", "a", "b", "c"]
    stored = await Rows(run.durable, spawned).checkpoints()
    assert [(row.kind, row.name) for row in stored] == [
        ("transaction", "write_down"),
        ("transaction", "write_down"),
        ("transaction", "write-plainly"),
        ("transaction", "other name"),
    ]


async def test_in_a_def_task_too(run: Runner, ledger: Ledger):
    @task
    def work(ctx: SyncTaskContext) -> str:
        return write_plainly("a") + write_plainly("b")

    assert await run(work) == "AB"
    assert await ledger.entries() == ["a", "b"]


async def test_with_a_session_it_is_the_plain_function(run: Runner, ledger: Ledger, engine: AsyncEngine):
    @transaction
    async def both(session: AsyncSession) -> str:
        return await write_down(session, "a") + await write_down(session, "b", twice=True)

    @task
    async def work(ctx: TaskContext) -> str:
        return await both()

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == "AB"
    assert [row.name for row in await Rows(run.durable, spawned).checkpoints()] == ["both"]
    async with AsyncSession(engine) as session:
        assert await write_down(session, "outside") == "OUTSIDE"
        assert await session.run_sync(write_plainly, "plain") == "PLAIN"
        await session.commit()
    assert await ledger.entries() == ["a", "b", "outside", "plain"]
    with pytest.raises(InvalidState, match=r"Transaction 'write_down' is called without a session.*pass a session"):
        await write_down("nowhere")


def test_what_cannot_be_a_transaction_is_refused() -> None:
    class Service:
        def method(self, session: Session) -> None: ...

    for wrong in (Service, Service.method, lambda: None, write_down):
        with pytest.raises(TypeError, match="@transaction decorates a function"):
            transaction(wrong)  # type: ignore[call-overload]
