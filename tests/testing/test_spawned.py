"""Tasks that an open transaction has spawned are listed, asserted, and run inside it."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from durable_sa import (
    CancellationPolicy,
    ChildFailed,
    Durable,
    Hooks,
    InvalidConfiguration,
    Limit,
    Rate,
    RateLimited,
    Retry,
    RetryStrategy,
    SyncTaskContext,
    TaskContext,
    TaskEnded,
    TaskNotFound,
    TaskNotRegistered,
    TaskRow,
    TaskStatus,
    TaskTimeout,
    UserError,
    current_context,
    heartbeat,
    migrations,
    step,
    task,
)
from durable_sa.testing import assert_spawned, run_spawned, spawned, task_context


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "ledger"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


@step(max_attempts=2)
def flaky(name: str) -> str:
    calls.append(name)
    if calls.count(name) == 1:
        raise ConnectionError
    return name.upper()


def note(session: Session, entry: str) -> str:
    session.add(Entry(text=entry))
    return entry


@task("square")
async def square(ctx: TaskContext, number: int) -> int:
    if number < 0:
        raise UserError("negative")
    return number * number


@task("order")
async def order(ctx: TaskContext, item: str) -> str:
    await ctx.sleep_for("a week", timedelta(days=7))
    found = await flaky(item)
    await ctx.transaction("note", note, item)
    if ctx.attempt == 1:
        raise LookupError("once")
    return found


@task("sync order")
def sync_order(ctx: SyncTaskContext, item: str) -> str:
    ctx.sleep_for("a week", 7 * 86400)
    found = flaky(item)
    ctx.transaction("note", note, item)
    if ctx.attempt == 1:
        raise LookupError("once")
    return found


@task("parent")
async def parent(ctx: TaskContext, numbers: list[int]) -> int:
    children = [await ctx.spawn(f"square {number}", square, number) for number in numbers]
    try:
        return sum(await asyncio.gather(*(ctx.join(child) for child in children)))
    except ChildFailed:
        return -1


@task("waiter")
async def waiter(ctx: TaskContext, limit: float | None) -> str:
    try:
        return await ctx.await_event("paid", timeout=limit, type=str)
    except TaskTimeout:
        return "too late"


@task("refused", max_attempts=1)
async def refused(ctx: TaskContext, times: int) -> int:
    await ctx.join(await ctx.spawn("child", square, 2, limit_key="acme"))
    if ctx.attempt <= times:
        raise RateLimited(retry_after=60)
    return ctx.attempt


@task("payer")
def payer(ctx: SyncTaskContext) -> None:
    ctx.emit_event("paid", "five")


TASKS = [square, order, sync_order, parent, waiter, payer, refused]


@pytest.fixture
def own(durable: Durable) -> Durable:
    """A client without a database, as a web process has one."""
    return Durable(tasks=TASKS, default_retry_strategy=RetryStrategy.fixed(60))


@pytest.fixture
def engine_of_tests(durable: Durable, database_url: URL) -> Generator[Engine]:
    engine = create_engine(database_url.set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine_of_tests: Engine) -> Generator[Session]:
    with engine_of_tests.connect() as connection, connection.begin() as transaction:
        session = Session(connection, join_transaction_mode="create_savepoint")
        yield session
        session.close()
        transaction.rollback()


@pytest.fixture
async def async_session(engine_of_tests: Engine, engine: AsyncEngine) -> AsyncGenerator[AsyncSession]:
    async with engine.connect() as connection, connection.begin() as transaction:
        session = AsyncSession(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
        yield session
        await session.close()
        await transaction.rollback()


async def test_only_those_of_the_transaction(own: Durable, durable: Durable, session: Session):
    before = await durable.spawn(square, 1)
    assert spawned(session) == []
    first = own.spawn_with(session, square, 2)
    session.commit()
    with session.begin_nested():
        second = own.spawn_with(session, square, 3, idempotency_key="k")
    with session.begin_nested() as savepoint:
        own.spawn_with(session, square, 4)
        savepoint.rollback()
    own.cancel_task_with(session, before)
    await durable.spawn(square, 5)
    found = spawned(session)
    assert [info.task_id for info in found] == [first.task_id, second.task_id]
    assert (found[1].task_name, found[1].status, found[1].key, found[1].params) == (
        "square",
        TaskStatus.PENDING,
        "k",
        3,
    )
    assert (found[0].attempt, found[0].error, found[0].waits_for, found[0].parent_task_id) == (0, None, None, None)


async def test_asserting(own: Durable, session: Session):
    when = datetime(2040, 1, 1, tzinfo=UTC)
    options: dict[str, Any] = {
        "priority": 3,
        "max_attempts": 4,
        "headers": {"tenant": "a", "n": [1]},
        "retry_strategy": RetryStrategy.exponential(2),
        "cancellation": CancellationPolicy(max_pending_time=60),
        "idempotency_key": "k",
        "available_at": when,
        "queue_name": "default",
    }
    own.spawn_with(session, parent, [1, 2], **options)
    own.spawn_with(session, square, 3, delay=timedelta(minutes=5))
    assert assert_spawned(session, parent).key == "k"
    assert_spawned(session, parent, [1, 2], **options)
    assert_spawned(session, "parent", params=[1, 2], headers={"tenant": "a"})
    assert_spawned(session, square, params=3, delay=300, cancellation=None)
    for wrong in (
        {"params": [2, 1]},
        {"priority": 4},
        {"headers": {"tenant": "b"}},
        {"retry_strategy": RetryStrategy.none()},
        {"cancellation": None},
        {"delay": 5},
        {"available_at": when + timedelta(seconds=1)},
        {"idempotency_key": None},
    ):
        with pytest.raises(AssertionError, match=r"'parent'.* was not spawned; spawned were 'parent' \(params=\[1"):
            assert_spawned(session, parent, **wrong)
    with pytest.raises(AssertionError, match="'order' was not spawned"):
        assert_spawned(session, order)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prority'"):
        assert_spawned(session, parent, prority=3)


async def test_limits_are_options_and_hold_nothing_up(own: Durable, durable: Durable, session: Session):
    await durable.create_queue("llm", limit_per_key=Limit(rate=Rate(1, per=3600)))
    options: dict[str, Any] = {"queue_name": "llm", "limit_key": "acme", "weight": 3, "unique": "k"}
    own.spawn_with(session, refused, 2, **options)
    own.spawn_with(session, square, 3, queue_name="llm")
    info = assert_spawned(session, refused, 2, **options)
    assert (info.key, info.limit_key) == ("k", "acme")
    assert assert_spawned(session, square, limit_key=None, unique=None, weight=1).limit_key is None
    for wrong in ({"limit_key": "other"}, {"weight": 1}, {"unique": None}):
        with pytest.raises(AssertionError, match="key='k', limit_key='acme'"):
            assert_spawned(session, refused, **wrong)
    found = {info.task_name: info for info in run_spawned(session, own)}
    assert (found["refused"].output, found["refused"].failures, found["square"].status) == (3, 0, "completed")


def test_a_task_that_is_always_refused_does_not_hang_the_test(own: Durable, session: Session):
    own.spawn_with(session, refused, 1000)
    with pytest.raises(AssertionError, match="'refused' was put off 100 times"):
        run_spawned(session, own)


async def test_asynchronous_executors_get_coroutines(own: Durable, async_session: AsyncSession):
    await own.spawn_with(async_session, square, 3)
    connection: AsyncConnection = await async_session.connection()
    for executor in (async_session, connection):
        assert len(await spawned(executor)) == 1
        assert (await assert_spawned(executor, square, 3)).params == 3
        with pytest.raises(AssertionError):
            await assert_spawned(executor, square, 4)
    assert [info.output for info in await run_spawned(async_session, own)] == [9]


def check(info: Any, item: str, entries: list[str]) -> None:
    assert (info.status, info.output, info.attempt, info.failures) == (TaskStatus.COMPLETED, item.upper(), 2, 1)
    assert info.first_started_at is not None
    assert info.finished_at is not None
    assert calls == [item, item]
    assert entries == [item]


@pytest.mark.parametrize("kind", [order, sync_order])
@pytest.mark.parametrize("in_loop", [False, True])
def test_running_with_a_session(own: Durable, session: Session, kind: Any, in_loop: bool):
    own.spawn_with(session, kind, "lamp", delay=3600)

    async def run() -> list[Any]:
        return run_spawned(session, own)

    (info,) = asyncio.run(run()) if in_loop else run_spawned(session, own)
    check(info, "lamp", list(session.scalars(select(Entry.text))))
    assert session.scalars(select(TaskRow.state)).all() == ["completed"]
    assert run_spawned(session, own) == [info]


@pytest.mark.parametrize("kind", [order, sync_order])
async def test_running_with_an_asynchronous_session(own: Durable, async_session: AsyncSession, kind: Any):
    await own.spawn_with(async_session, kind, "lamp")
    (info,) = await run_spawned(async_session, own)
    check(info, "lamp", list((await async_session.scalars(select(Entry.text))).all()))


def test_nothing_is_left_after_the_rollback(own: Durable, engine_of_tests: Engine):
    with engine_of_tests.connect() as connection:
        own.spawn_with(connection, sync_order, "lamp")
        assert [info.status for info in run_spawned(connection, own)] == ["completed"]
        assert connection.execute(select(Entry.text)).scalars().all() == ["lamp"]
        connection.rollback()
        for table in ("ledger", "durable.tasks", "durable.events"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 0


def test_children_are_rows_and_run_as_well(own: Durable, session: Session):
    own.spawn_with(session, parent, [1, 2, 3])
    own.spawn_with(session, parent, [1, -1])
    found = run_spawned(session, own)
    parents = [info for info in found if info.parent_task_id is None]
    assert [info.output for info in parents] == [14, -1]
    assert sorted(info.params for info in found if info.parent_task_id is not None) == [-1, 1, 1, 2, 3]
    (failed,) = [info for info in found if info.status == "failed"]
    assert failed.error is not None
    assert (failed.error.name, failed.error.message) == ("UserError", "negative")


def test_events_of_another_task_come_before_a_timeout(own: Durable, session: Session):
    own.spawn_with(session, waiter, 60.0)
    own.spawn_with(session, waiter, None)
    assert [info.output for info in run_spawned(session, own)] == ["too late", None]
    assert [info.status for info in spawned(session)] == ["completed", "sleeping"]
    own.spawn_with(session, waiter, 60.0)
    own.spawn_with(session, payer)
    found = run_spawned(session, own)
    assert [info.status for info in found] == ["completed"] * 4
    assert [info.output for info in found] == ["too late", "five", "five", None]


def test_the_client_is_found(session: Session):
    @task("only here")
    async def only(ctx: TaskContext) -> int:
        return 7

    first = Durable(tasks=[only], queue_name="default")
    second = Durable(tasks=[only, square])
    first.spawn_with(session, only)
    assert [info.output for info in run_spawned(session)] == [7]

    @task("only here")
    async def other(ctx: TaskContext) -> int:
        return 8

    third = Durable(tasks=[other])
    first.spawn_with(session, only)
    with pytest.raises(InvalidConfiguration, match="several clients"):
        run_spawned(session)
    assert [info.output for info in run_spawned(session, third)] == [7, 8]
    first.spawn_by_name_with(session, "nobody's", unchecked=True)
    with pytest.raises(TaskNotRegistered, match="nobody's"):
        run_spawned(session)
    assert second.tasks


def test_code_that_catches_the_suspension(own: Durable, session: Session):
    @task
    async def stubborn(ctx: TaskContext) -> str:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(ctx.await_event("paid"))
        except BaseException:  # noqa: BLE001
            return "caught"
        return "paid"

    own.register(stubborn)
    own.spawn_with(session, stubborn)
    assert [info.status for info in run_spawned(session, own)] == ["sleeping"]
    own.spawn_with(session, payer)
    assert [info.output for info in run_spawned(session, own)] == ["paid", None]


def test_a_task_that_cannot_be_retried(own: Durable, session: Session):
    own.spawn_with(session, square, -2, max_attempts=9)
    (info,) = run_spawned(session, own)
    assert (info.status, info.attempt) == ("failed", 1)


async def test_a_scoped_session_in_a_unit_test(engine_of_tests: Engine):
    with engine_of_tests.connect() as connection, connection.begin() as transaction:
        sessions = scoped_session(sessionmaker(connection, join_transaction_mode="create_savepoint"))

        def place(session: Session) -> int:
            assert session is sessions()
            session.add(Entry(text="x"))
            session.flush()
            return session.scalar(select(func.count(Entry.id))) or 0

        @task
        async def first(ctx: TaskContext) -> int:
            return await ctx.transaction("place", place)

        @task
        def second(ctx: SyncTaskContext) -> int:
            return ctx.transaction("place", place)

        assert await first(task_context(session=sessions)) == 1
        assert second(task_context(sync=True, session=sessions)) == 2
        sessions.remove()
        transaction.rollback()


def test_hooks_that_remove_a_scoped_session_leave_that_of_the_test(engine_of_tests: Engine):
    with engine_of_tests.connect() as connection, connection.begin() as transaction:
        sessions = scoped_session(sessionmaker(engine_of_tests))

        def place(_: Session) -> None:
            sessions.add(Entry(text="kept"))

        @task
        def work(ctx: SyncTaskContext) -> None:
            ctx.transaction("place", place)
            sessions.flush()

        class Removing(Hooks):
            """As the application context of Flask does at its end."""

            @contextmanager
            def around_step(self, ctx: TaskContext, name: str) -> Generator[None]:
                yield
                sessions.remove()

            @asynccontextmanager
            async def around_task(self, ctx: TaskContext) -> AsyncGenerator[None]:
                yield
                sessions.remove()

        client = Durable(sync_bind=sessions, hooks=[Removing()], tasks=[work])
        sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
        client.spawn_with(sessions, work)
        before = sessions()
        (info,) = run_spawned(sessions, client)
        assert (info.status, info.error) == ("completed", None)
        assert sessions() is before
        assert "kept" in sessions.scalars(select(Entry.text)).all()
        sessions.remove()
        transaction.rollback()


@task("asker")
async def asker(ctx: TaskContext) -> list[Any]:
    await ctx.publish("state", "asking")
    helper = await ctx.spawn("helper", "helper", str(ctx.task_id))
    await ctx.send(helper, "question", 6)
    first = await ctx.race("answer", late=ctx.sleep_for("a day", 86400), given=ctx.receive("answer"))
    second = await ctx.race("none", missing=ctx.receive("answer"), late=ctx.sleep_for("a day", 86400))
    with pytest.raises(TaskTimeout):
        await ctx.race("timeout", missing=ctx.receive("answer", timeout=60), event=ctx.await_event("never"))
    await ctx.publish("state", "done")
    return [first.winner, first.value, second.winner]


@task("helper")
def helper(ctx: SyncTaskContext, asker: str) -> None:
    race = ctx.race("question", asked=lambda: ctx.receive("question", type=int), paid=lambda: ctx.await_event("paid"))
    ctx.send(uuid.UUID(asker), "answer", race.value * 7)
    if ctx.attempt == 1:
        raise LookupError("once")


@task("ends badly", on_failure="alert")
async def ends_badly(ctx: TaskContext, number: int) -> None:
    try:
        await ctx.send(uuid.uuid4(), "question")
    except TaskNotFound:
        raise UserError("nobody") from None


@task("alert")
async def alert(ctx: TaskContext, ended: TaskEnded) -> list[Any]:
    assert ended.error is not None
    return [ended.task_name, ended.params, ended.error.message]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_messages_values_races_and_follow_ups(
    own: Durable, session: Session, async_session: AsyncSession, asynchronous: bool
):
    failed: list[TaskEnded] = []

    class Watch(Hooks):
        def on_failed(self, ended: TaskEnded) -> None:
            failed.append(ended)

    talking = Durable(tasks=[asker, helper, ends_badly, alert], hooks=[Watch()])
    if asynchronous:
        spawned = await talking.spawn_with(async_session, asker)
        await talking.spawn_with(async_session, ends_badly, 3)
        found = await run_spawned(async_session, talking)
        assert await talking.get_value_with(async_session, spawned, "state") == "done"
    else:
        spawned = talking.spawn_with(session, asker)
        talking.spawn_with(session, ends_badly, 3)
        found = run_spawned(session, talking)
        assert talking.get_value_with(session, spawned, "state") == "done"
    ended = {info.task_name: info for info in found}
    assert len(found) == len(ended) == 4
    assert ended["asker"].output == ["given", 42, "late"]
    assert (ended["helper"].status, ended["helper"].attempt) == ("completed", 2)
    assert ended["alert"].output == ["ends badly", 3, "nobody"]
    assert [each.task_id for each in failed] == [ended["ends badly"].task_id]


async def test_options_are_those_of_a_spawn(own: Durable, session: Session):
    options: dict[str, Any] = {"unique": "k", "on_conflict": "replace", "max_delay": 60, "max_lost_workers": 5}
    own.spawn_with(session, square, 3, **options)
    assert_spawned(session, square, 3, **options)
    nothing = dict.fromkeys(("max_attempts", "retry_strategy", "max_lost_workers", "queue_name", "priority", "weight"))
    assert_spawned(session, square, 3, **nothing, delay=None, limit_key=None, available_at=None)
    with pytest.raises(AssertionError):
        assert_spawned(session, square, max_lost_workers=4)
    with pytest.raises(TypeError, match=r"takes a task, made by @task, or the name of one, not note"):
        assert_spawned(session, note)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


@dataclass
class Size:
    width: int
    height: int = 1


async def test_params_by_name_are_those_of_the_task(own: Durable, session: Session):
    @task("measure")
    async def measure(ctx: TaskContext, size: Size | None) -> None:
        pass

    own.register(measure)
    own.spawn_with(session, measure, Size(2))
    own.spawn_with(session, measure, None)
    own.spawn_by_name_with(session, "elsewhere", None, unchecked=True)
    assert assert_spawned(session, "measure", Size(2), durable=own).params == {"width": 2, "height": 1}
    assert assert_spawned(session, "measure", {"width": 2, "height": 1}).params is not None
    assert assert_spawned(session, "measure", None).params is None
    assert_spawned(session, "elsewhere", None)
    with pytest.raises(AssertionError):
        assert_spawned(session, "measure", Size(3))


async def test_a_client_with_a_schema_of_its_own(engine_of_tests: Engine):
    other = Durable(tasks=[square], schema="other")
    with engine_of_tests.connect() as connection, connection.begin() as transaction:
        migrations.migrate(connection, schema="other")
        session = Session(connection, join_transaction_mode="create_savepoint")
        other.spawn_with(session, square, 3)
        assert spawned(session) == []
        assert [info.params for info in spawned(session, durable=other)] == [3]
        assert assert_spawned(session, square, 3, durable=other)
        assert [info.output for info in run_spawned(session, other)] == [9]
        session.close()
        transaction.rollback()


@pytest.mark.parametrize("wrong", [create_engine("postgresql+psycopg:///"), sessionmaker(), None])
def test_what_is_neither_a_session_nor_a_connection_is_refused(wrong: Any):
    with pytest.raises(TypeError, match=r"expected a Session, .*, not "):
        run_spawned(wrong)


async def test_a_later_call_continues_where_a_task_was(own: Durable, session: Session):
    @task("parts")
    async def parts(ctx: TaskContext) -> str:
        await ctx.step("first", lambda: calls.append("first"))
        await ctx.transaction("second", lambda _: calls.append("second"))
        child = await ctx.spawn("child", square, 3)
        await ctx.sleep_for("a week", timedelta(days=7))
        slept = await ctx.now()
        await ctx.await_event("paid")
        assert await ctx.now() >= slept
        return f"{await ctx.join(child)} in attempt {ctx.attempt}"

    own.register(parts)
    own.spawn_with(session, parts)
    assert [info.status for info in run_spawned(session, own)] == ["sleeping", "completed"]
    own.spawn_with(session, payer)
    assert [info.output for info in run_spawned(session, own)] == ["9 in attempt 1", 9, None]
    assert calls == ["first", "second"]


def test_a_savepoint_that_is_rolled_back_takes_the_progress_with_it(own: Durable, session: Session):
    own.spawn_with(session, waiter, None)
    with session.begin_nested() as savepoint:
        assert [info.status for info in run_spawned(session, own)] == ["sleeping"]
        savepoint.rollback()
    own.emit_event_with(session, "paid", "five")
    assert [(info.output, info.attempt) for info in run_spawned(session, own)] == [("five", 1)]


def test_a_task_without_retries_fails_at_once(own: Durable, session: Session):
    @task("once", retry_strategy=RetryStrategy.none())
    async def once(ctx: TaskContext, again: bool) -> int:
        if ctx.attempt == 1:
            raise Retry(after=60) if again else LookupError
        return ctx.attempt

    own.register(once)
    own.spawn_with(session, once, False)
    own.spawn_with(session, once, True)
    assert [(info.status, info.attempt) for info in run_spawned(session, own)] == [("failed", 1), ("completed", 2)]


@pytest.mark.parametrize("ending", ["return", "raise", "wait", "catch"])
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_task_that_was_cancelled_stays_so(
    own: Durable, session: Session, async_session: AsyncSession, ending: str, asynchronous: bool
):
    def cancel(session: Session, task_id: uuid.UUID) -> None:
        own.cancel_task_with(session, task_id)

    @task("cancels")
    async def cancels(ctx: TaskContext) -> None:
        await ctx.transaction("cancel", cancel, ctx.task_id)
        if ending == "return":
            return
        if ending == "raise":
            raise LookupError
        if ending == "wait":
            await ctx.await_event("never")
        try:
            await ctx.step("after", lambda: calls.append("after"))
        except BaseException:  # noqa: BLE001
            await ctx.step("and after", lambda: calls.append("and after"))

    own.register(cancels)
    if asynchronous:
        await own.spawn_with(async_session, cancels)
        ran = await run_spawned(async_session, own)
    else:
        own.spawn_with(session, cancels)
        ran = run_spawned(session, own)
    assert [(info.status, info.error) for info in ran] == [("cancelled", None)]
    assert calls == []


async def test_a_cancelled_error_is_a_failure(own: Durable, session: Session, async_session: AsyncSession):
    @task("gives up", max_attempts=2)
    async def gives_up(ctx: TaskContext) -> None:
        raise asyncio.CancelledError

    own.register(gives_up)
    own.spawn_with(session, gives_up)
    await own.spawn_with(async_session, gives_up)
    for (ran,) in (run_spawned(session, own), await run_spawned(async_session, own)):
        assert ran.error is not None
        assert (ran.status, ran.attempt, ran.error.name) == ("failed", 2, "CancelledError")


async def test_heartbeats_of_a_def_task(own: Durable, session: Session, async_session: AsyncSession):
    def beat(_: Any = None) -> None:
        heartbeat()
        current_context().heartbeat(5)

    @task("beats")
    def beats(ctx: SyncTaskContext) -> str:
        beat()
        ctx.step("step", beat)
        ctx.transaction("transaction", beat)
        return "goes on"

    own.register(beats)
    own.spawn_with(session, beats)
    await own.spawn_with(async_session, beats)
    assert [info.output for info in run_spawned(session, own)] == ["goes on"]
    assert [info.output for info in await run_spawned(async_session, own)] == ["goes on"]
    with task_context(sync=True, session=session) as ctx:
        assert beats(ctx) == "goes on"
