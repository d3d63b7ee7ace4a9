"""One task with its history, and pages of tasks: the client's view of what is stored."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Select, Text, Uuid, cast, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import (
    Durable,
    HistoryEntry,
    InvalidConfiguration,
    RetryStrategy,
    SchemaMismatch,
    TaskContext,
    TaskFilter,
    TaskHandle,
    TaskInfo,
    TaskNotFound,
    TaskRow,
    TaskStatus,
    UserError,
    step,
)
from durable_sa.client.wording import call_text
from tests.client.support import Application, Order, with_some_callers
from tests.support import eventually

SECRET = "hunter2"
AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR = datetime(2200, 1, 1, tzinfo=UTC)


class Payment(BaseModel):
    amount: int


async def spawn_names(durable: Durable, *names: str, **options: str) -> list[uuid.UUID]:
    return [(await durable.spawn_by_name(name, unchecked=True, **options)).task_id for name in names]  # type: ignore[arg-type]


async def ids(durable: Durable, where: TaskFilter | Select[Any] | None = None, **options: object) -> list[uuid.UUID]:
    return [task.task_id for task in (await durable.list_tasks(where, **options)).items]  # type: ignore[arg-type]


def times(history: list[HistoryEntry], kind: str) -> list[tuple[str, float]]:
    return [
        (entry.name, entry.duration.total_seconds())
        for entry in history
        if entry.kind == kind and entry.duration is not None
    ]


async def test_a_task_that_was_spawned(durable: Durable) -> None:
    spawned = await durable.spawn_by_name(
        "pack", {"secret": SECRET}, unchecked=True, idempotency_key="order-17", priority=3, headers={"tenant": SECRET}
    )
    task = await durable.get_task(spawned)
    assert task == await durable.get_task(spawned.task_id) == await durable.get_task(TaskHandle(spawned.task_id))
    assert (task.task_id, task.task_name, task.queue_name) == (spawned.task_id, "pack", "default")
    assert (task.status, task.attempt, task.key, task.priority) == (TaskStatus.PENDING, 0, "order-17", 3)
    assert task.created_at <= datetime.now(UTC)
    assert task.available_at is not None
    nothing = (task.version, task.limit_key, task.parent_task_id, task.first_started_at, task.finished_at)
    assert (*nothing, task.error, task.waits_for, task.worker, task.params, task.headers) == (None,) * 10
    assert type(task.task_id) is uuid.UUID
    whole = await durable.get_task(spawned, payloads=True)
    assert (whole.params, whole.headers) == ({"secret": SECRET}, {"tenant": SECRET})
    assert SECRET not in repr(whole)
    assert await durable.get_history(spawned) == []


async def test_tasks_that_do_not_exist(durable: Durable) -> None:
    unknown = uuid.uuid4()
    for call in (durable.get_task, durable.get_history):
        with pytest.raises(TaskNotFound):
            await call(unknown)
    with pytest.raises(TypeError, match="named by its UUID"):
        await durable.get_task("order-17")  # type: ignore[arg-type]
    assert (await durable.list_tasks()).items == []


async def test_what_a_task_waits_for(durable: Durable) -> None:
    child = durable.task("child")(wait_for_ever)

    @durable.task
    async def waiter(ctx: TaskContext) -> None:
        handle = await ctx.spawn("child", child)
        await asyncio.gather(ctx.await_event("approved:letter", timeout=3600), ctx.join(handle))

    @durable.task
    async def sleeper(ctx: TaskContext) -> None:
        await ctx.sleep_for("cool down", 3600)

    async with durable.worker(concurrency=4):
        waiting, sleeping = await durable.spawn(waiter), await durable.spawn(sleeper)
        for spawned in (waiting, sleeping):

            async def waits(task: uuid.UUID = spawned.task_id) -> bool:
                return (await durable.get_task(task)).status is TaskStatus.SLEEPING

            await eventually(waits)
    task = await durable.get_task(waiting)
    (child_id,) = await ids(durable, TaskFilter(parent=waiting))
    assert task.waits_for is not None
    assert set(task.waits_for.split(", ")) == {"event 'approved:letter'", f"task {child_id}"}
    history = await durable.get_history(waiting)
    assert {(entry.kind, entry.name, entry.status) for entry in history} == {
        ("attempt", "", "waiting"),
        ("child", "child", "sleeping"),
        ("event", "approved:letter", "waiting"),
        ("join", "", "waiting"),
    }
    (event,) = [entry for entry in history if entry.kind == "event"]
    assert (event.ended_at, event.duration, event.attempt) == (None, None, 1)
    assert event.began_at is not None
    assert event.detail["until"] - event.began_at > timedelta(seconds=3500)
    nap = await durable.get_task(sleeping)
    assert nap.available_at is not None
    assert nap.waits_for == f"sleep 'cool down' until {nap.available_at:%Y-%m-%d %H:%M:%S}Z"
    (entry,) = [entry for entry in await durable.get_history(sleeping) if entry.kind == "sleep"]
    assert (entry.name, entry.status, entry.ended_at, entry.detail["until"]) == (
        "cool down",
        "waiting",
        None,
        nap.available_at,
    )
    assert nap.parent_task_id is None
    assert (await durable.get_task(child_id)).parent_task_id == waiting.task_id


async def test_sleeps_that_end_early_or_at_once(durable: Durable) -> None:
    @durable.task
    async def sleeper(ctx: TaskContext) -> None:
        await ctx.sleep_for("blink", 0.0001)
        await ctx.sleep_for("cool down", 0.5)

    async def slept() -> list[HistoryEntry]:
        return [entry for entry in await durable.get_history(spawned) if entry.kind == "sleep"]

    async def is_sleeping() -> bool:
        return len(await slept()) == 2

    async with durable.worker():
        spawned = await durable.spawn(sleeper)
        await eventually(is_sleeping)
        await durable.cancel_task(spawned)
        task = await durable.get_task(spawned)
    blink, nap = await slept()
    assert (blink.status, blink.duration) == ("completed", timedelta())
    assert (nap.status, nap.ended_at) == ("cancelled", task.finished_at)
    # Nor is it over when its time has come.
    async with durable.engine.connect() as connection:
        await connection.execute(text("SELECT pg_sleep_until(:until)"), {"until": nap.detail["until"]})
    assert await slept() == [blink, nap]


async def wait_for_ever(ctx: TaskContext) -> None:
    await ctx.await_event("never")


@step(max_attempts=2, retry_strategy=RetryStrategy.none())
async def nothing(*_: object) -> None: ...


async def test_messages_and_races(durable: Durable) -> None:
    @durable.task
    async def talk(ctx: TaskContext) -> None:
        await ctx.send(ctx.task_id, "note", SECRET)
        await ctx.receive("note")
        await ctx.race("first", paid=ctx.receive("paid"), late=ctx.sleep_for("grace", 3600))
        await ctx.receive("second", timeout=3600)

    async with durable.worker():
        spawned = await durable.spawn(talk)

        async def waits_for(topic: str) -> bool:
            return f"message '{topic}'" in ((await durable.get_task(spawned)).waits_for or "")

        await eventually(lambda: waits_for("paid"))
        [waiting] = [
            entry for entry in await durable.get_history(spawned) if entry.kind == "message" and entry.name == "paid"
        ]
        assert waiting.status == "waiting"
        await durable.send(spawned, "paid", SECRET)
        await eventually(lambda: waits_for("second"))
    history = await durable.get_history(spawned)
    assert sorted((entry.kind, entry.name, entry.status) for entry in history if entry.kind != "attempt") == [
        ("message", "note", "completed"),
        ("message", "paid", "completed"),
        ("message", "second", "waiting"),
        ("race", "first", "completed"),
        ("send", "note", "completed"),
    ]
    details = {(entry.kind, entry.name): dict(entry.detail) for entry in history}
    assert details["race", "first"] == {"winner": "paid"}
    assert set(details["message", "note"]) == {"message_id"}
    assert SECRET not in str(history)
    assert SECRET in str(await durable.get_history(spawned, payloads=True))


async def test_the_history_of_a_task_that_has_failed_twice(durable: Durable) -> None:
    @step(max_attempts=2, retry_strategy=RetryStrategy.fixed(0.01))
    async def charge(secret: str) -> None:
        await asyncio.sleep(0.02)
        raise ConnectionError("the bank is away")

    async def check(secret: str) -> Payment:
        return Payment.model_validate({"amount": secret})

    @durable.task(max_attempts=2, retry_strategy=RetryStrategy.fixed(0.01))
    async def order(ctx: TaskContext, secret: str) -> None:
        await ctx.step("reserve", nothing)
        try:
            await ctx.step("charge", charge, secret)
        except ConnectionError:
            await ctx.step("check", check, secret)

    async with durable.worker(worker_id="packer"):
        spawned = await durable.spawn(order, SECRET)
        await durable.wait_for_result(spawned, timeout=20)
    task, history = await durable.get_task(spawned), await durable.get_history(spawned)
    assert (task.status, task.attempt, task.failures, task.max_attempts) == (TaskStatus.FAILED, 2, 2, 2)
    assert [(entry.kind, entry.name, entry.status, entry.attempt) for entry in history] == [
        ("attempt", "", "failed", 1),
        ("step", "reserve", "completed", 1),
        ("try", "charge", "failed", 1),
        ("try", "charge", "failed", 1),
        ("attempt", "", "failed", 2),
        ("try", "charge", "failed", 2),
        ("try", "charge", "failed", 2),
    ]
    assert all(0.02 <= seconds < 5 for _, seconds in times(history, "try"))
    assert history[0].detail["worker"] == "packer"
    assert history[2].detail["error"].message == "the bank is away"
    error = history[0].detail["error"]
    assert (error.name, error.step, error.raw) == ("ValidationError", "check", None)
    assert "input_value=..." in error.message
    assert "in check" in history[0].detail["traceback"]
    assert task.error == history[4].detail["error"]
    assert SECRET not in str((task, history))
    whole = await durable.get_history(spawned, payloads=True)
    assert f"input_value='{SECRET}'" in whole[0].detail["error"].message
    assert whole[1].detail == {"value": None}
    secret = {"args": [SECRET], "kwargs": {}, "cut": False}
    assert [entry.detail.get("arguments") for entry in whole if entry.kind != "step"] == [secret] * 6
    assert f"input_value='{SECRET}'" in str((await durable.get_task(spawned, payloads=True)).error)


async def test_the_arguments_of_steps_and_transactions(durable: Durable) -> None:
    async def write(session: AsyncSession, number: int) -> None: ...

    async def charge(amount: int, *, currency: str = "EUR") -> int:
        return amount

    async def retrying(session: AsyncSession, secret: str) -> None:
        raise ConnectionError("the disk is away")

    @durable.task(max_attempts=1)
    async def order(ctx: TaskContext) -> None:
        await ctx.step("charge", charge, 17, currency="NOK")
        await ctx.step("charge", charge, 18)
        await ctx.transaction("write", write, 5)
        await ctx.step("large", nothing, "x" * 1000)
        await ctx.transaction("retrying", retrying, SECRET)

    async with durable.worker():
        spawned = await durable.spawn(order)
        await durable.wait_for_result(spawned, timeout=20)
    assert not any("arguments" in entry.detail for entry in await durable.get_history(spawned))
    found = [
        (entry.kind, entry.name, call_text(entry.detail["arguments"]))
        for entry in await durable.get_history(spawned, payloads=True)
    ]
    assert found == [
        ("attempt", "", f'("{SECRET}")'),
        ("step", "charge", '(17, currency="NOK")'),
        ("step", "charge", "(18)"),
        ("transaction", "write", "(5)"),
        ("step", "large", f'("{"x" * 97}", ...)'),
    ]


async def test_data_of_a_user_error_is_a_value(durable: Durable) -> None:
    @durable.task
    async def refuse(ctx: TaskContext) -> None:
        raise UserError({"message": SECRET, "code": 404})

    async with durable.worker():
        spawned = await durable.spawn(refuse)
        await durable.wait_for_result(spawned, timeout=20)
    error = (await durable.get_task(spawned)).error
    assert error is not None
    assert (error.name, error.message, error.raw) == ("UserError", "(its message is data)", None)
    error = (await durable.get_task(spawned, payloads=True)).error
    assert error is not None
    assert error.raw == {"message": SECRET, "code": 404}


async def test_parallel_steps_and_waits_have_their_own_durations(durable: Durable) -> None:
    async def take(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @durable.task
    async def both(ctx: TaskContext) -> None:
        await asyncio.gather(ctx.step("long", take, 0.3), ctx.step("short", take, 0.01))
        await ctx.await_event("go")

    async with durable.worker():
        spawned = await durable.spawn(both)

        async def waits() -> bool:
            return (await durable.get_task(spawned)).waits_for == "event 'go'"

        await eventually(waits)
        await asyncio.sleep(0.1)
        await durable.emit_event("go")
        await durable.wait_for_result(spawned, timeout=20)
    history = await durable.get_history(spawned)
    assert [entry.kind for entry in history] == ["attempt", "step", "step", "event"]
    durations = dict(times(history, "step"))
    assert 0.3 <= durations["long"] < 0.3 + durations["long"] / 2
    assert 0.01 <= durations["short"] < 0.3
    assert times(history, "event")[0][1] >= 0.1
    (long,) = [entry for entry in history if entry.name == "long"]
    assert long.began_at is not None
    assert history[0].began_at is not None
    assert history[0].began_at <= long.began_at < history[0].began_at + timedelta(seconds=0.3)


async def test_a_step_in_progress_and_the_labels_of_workers(durable: Durable) -> None:
    release = asyncio.Event()

    async def block() -> None:
        await release.wait()

    @durable.task
    async def hang(ctx: TaskContext) -> None:
        await ctx.step("block", block)

    async with durable.worker(worker_id="packer"):
        spawned = await durable.spawn(hang)

        async def shown() -> HistoryEntry | None:
            return next((entry for entry in await durable.get_history(spawned) if entry.kind == "step"), None)

        entry = await eventually(shown)
        assert entry is not None
        assert (entry.name, entry.status, entry.attempt, entry.ended_at) == ("block", "running", 1, None)
        task = await durable.get_task(spawned)
        assert (task.status, task.worker) == (TaskStatus.RUNNING, "packer")
        (attempt, _) = await durable.get_history(spawned)
        assert (attempt.kind, attempt.status, attempt.detail["worker"]) == ("attempt", "running", "packer")
        release.set()
        await durable.wait_for_result(spawned, timeout=20)
    (attempt, _) = await durable.get_history(spawned)
    assert (attempt.status, attempt.detail["worker"]) == ("completed", "packer")
    # Labels are kept for as long as the tasks.
    await durable.create_queue(retention=0.0)
    async with durable.worker(worker_id="other") as other:
        # asyncpg 0.30 leaves a connection open whose opening is cancelled.
        await eventually(lambda: other._listening())
    async with durable.engine.connect() as connection:
        names = await connection.execute(text("SELECT name FROM durable.ended_workers"))
        assert [row.name for row in names] == ["other"]


async def test_each_field_of_a_filter(durable: Durable) -> None:
    @durable.task(max_attempts=1)
    async def fail(ctx: TaskContext) -> None:
        raise ConnectionError

    @durable.task
    async def plain(ctx: TaskContext) -> None: ...

    @durable.task
    async def parent(ctx: TaskContext) -> None:
        await ctx.spawn("child", plain, delay=3600)

    await durable.create_queue("mail")
    async with durable.worker(concurrency=5):
        failed, origin = await durable.spawn(fail), await durable.spawn(parent)
        await durable.wait_for_result(failed, timeout=20)
        await durable.wait_for_result(origin, timeout=20)
    (first,) = await spawn_names(durable, "plain", idempotency_key="order-17")
    (second,) = await spawn_names(durable, "plain", queue_name="mail", idempotency_key="order-17")
    (third,) = await spawn_names(durable, "other", limit_key="acme", unique="report")
    await durable.cancel_task(third)
    assert ((info := await durable.get_task(third)).key, info.limit_key) == ("report", "acme")
    (child,) = await ids(durable, TaskFilter(parent=origin))
    everything = {failed.task_id, origin.task_id, first, second, third, child}
    ended = {failed.task_id, origin.task_id, third}
    for where, expected in (
        (TaskFilter(), everything),
        (TaskFilter(task_name="plain"), {first, second, child}),
        (TaskFilter("plain", "mail"), {second}),
        (TaskFilter(queue_name="mail"), {second}),
        (TaskFilter(state="failed"), {failed.task_id}),
        (TaskFilter(state=[TaskStatus.CANCELLED, "pending"]), {first, second, third, child}),
        (TaskFilter(state=[TaskStatus.COMPLETED]), {origin.task_id}),
        (TaskFilter(state={"running", "sleeping"}), set()),
        (TaskFilter(key="order-17"), {first, second}),
        (TaskFilter(key="order-17", queue_name="mail"), {second}),
        (TaskFilter(key="order-18"), set()),
        (TaskFilter(error_name="ConnectionError"), {failed.task_id}),
        (TaskFilter(error_name="ConnectionError", state="pending"), set()),
        (TaskFilter(spawned_after=AGO, spawned_before=FAR), everything),
        (TaskFilter(spawned_after=FAR), set()),
        (TaskFilter(spawned_before=datetime.now(UTC) + timedelta(minutes=5)), everything),
        (TaskFilter(spawned_before=AGO), set()),
        (TaskFilter(ended_after=AGO), ended),
        (TaskFilter(ended_before=FAR, state="failed"), {failed.task_id}),
        (TaskFilter(ended_before=AGO), set()),
        (TaskFilter(ended_after=AGO, state="pending"), set()),
        (TaskFilter(running_longer_than=0), set()),
        (TaskFilter(parent=origin.task_id, task_name="plain"), {child}),
        (TaskFilter(parent=first), set()),
        (TaskFilter(limit_key="acme"), {third}),
        (TaskFilter(limit_key="acme", queue_name="mail"), set()),
        (TaskFilter(key="report"), {third}),
        (TaskFilter(version=2), set()),
    ):
        assert set(await ids(durable, where)) == expected, where
        # Also where the newest tasks have no match.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("durable_sa.statements.reading.RECENT", 1)
            assert set(await ids(durable, where)) == expected, where
            assert set(await ids(durable, where, order="oldest")) == expected, where


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"state": "done"}, "'done' is none of pending, running"),
        ({"state": []}, "names no state"),
        ({"state": [1]}, "an object of type int"),
        ({"state": 5}, "an object of type int"),
        ({"key": "a\x00"}, r"key: 'a\\x00' has a NUL"),
        ({"error_name": "\ud800"}, r"error_name: '\\ud800' has"),
        ({"spawned_after": datetime(2026, 1, 1)}, "no time zone"),
        ({"ended_before": "yesterday"}, "must be a datetime"),
        ({"running_longer_than": -1}, "not between"),
        ({"task_name": 7}, "must be a str"),
        ({"version": 0}, "not between"),
    ],
)
def test_filters_that_make_no_sense(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidConfiguration, match=problem):
        TaskFilter(**fields)  # type: ignore[arg-type]


async def test_arguments_that_make_no_sense(durable: Durable) -> None:
    for options, problem in (
        ({"limit": 0}, "limit: 0 is not between"),
        ({"order": "random"}, "'random' is none of newest"),
        ({"after": "nonsense"}, "'nonsense' is not the end of a page"),
        ({"after": str(uuid.uuid4()), "order": "running"}, "order='running'"),
        ({"after": f"0001-01-01T00:00:00+23:59/{uuid.uuid4()}", "order": "running"}, "is not the end of a page"),
    ):
        with pytest.raises(InvalidConfiguration, match=problem):
            await durable.list_tasks(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not str"):
        await durable.list_tasks("failed")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alone"):
        await durable.list_tasks(select(TaskRow))


@pytest.mark.parametrize("recent", [3, 20_000])
@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_pages_have_each_task_once_while_others_come_and_go(
    durable: Durable, monkeypatch: pytest.MonkeyPatch, order: str, recent: int
) -> None:
    monkeypatch.setattr("durable_sa.statements.reading.RECENT", recent)
    spawned = await spawn_names(durable, *"ab" * 10)
    wanted = spawned[::2]
    found: list[uuid.UUID] = []
    after = None
    while True:
        page = await durable.list_tasks(TaskFilter("a"), order=order, limit=3, after=after)  # type: ignore[arg-type]
        found += [task.task_id for task in page.items]
        if page.next is None:
            break
        assert len(page.items) == 3
        after = page.next
        # One of this page is deleted, and others are spawned.
        async with durable.engine.begin() as connection:
            await connection.execute(text("DELETE FROM durable.tasks WHERE task_id = :id"), {"id": found[-1]})
        if order == "newest":
            await spawn_names(durable, "a")
    assert found == (wanted if order == "oldest" else wanted[::-1])


async def test_the_longest_running_come_first(durable: Durable) -> None:
    spawned = await spawn_names(durable, *"abcde")
    async with durable.engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE durable.tasks SET state = 'running', started_at = now() - interval '1 h' * ascii(task_name) "
                "WHERE task_name < 'e'"
            )
        )
    page = await durable.list_tasks(order="running", limit=3)
    rest = await durable.list_tasks(order="running", limit=3, after=page.next)
    assert [task.task_id for task in (*page.items, *rest.items)] == spawned[3::-1]
    assert rest.next is None
    longer = TaskFilter(running_longer_than=timedelta(hours=98, minutes=30))
    assert await ids(durable, longer) == [spawned[3], spawned[2]]
    assert await ids(durable, select(TaskRow.task_id).where(TaskRow.task_name == "b"), order="running") == [spawned[1]]


@pytest.mark.parametrize("order", ["newest", "running"])
async def test_a_select_of_two_tables_keeps_its_limit(
    durable: Durable, engine: AsyncEngine, orders: None, order: str
) -> None:
    """SQLAlchemy would take the tasks of the select for those of the statement around it."""
    spawned = await spawn_names(durable, *"abcd")
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO orders (item) VALUES ('a'), ('b'), ('c'), ('d')"))
        await connection.execute(text("UPDATE durable.tasks SET state = 'running', started_at = now()"))
    both = select(TaskRow.task_id).where(Order.item == TaskRow.task_name)
    latest = both.order_by(TaskRow.task_id.desc()).limit(2)
    assert set(await ids(durable, latest, order=order)) == set(spawned[2:])
    greatest = cast(func.max(cast(TaskRow.task_id, Text)), Uuid)
    assert await ids(durable, both.with_only_columns(greatest), order=order) == spawned[3:]


async def test_errors_whose_texts_are_about_nul(durable: Durable) -> None:
    """A message with the six characters of an escape is none with NUL, which the server cannot take apart."""

    @durable.task(max_attempts=1)
    async def fail(ctx: TaskContext, message: str) -> None:
        raise ValueError(message)

    about = ["unsupported Unicode escape sequence: \\u0000 cannot be converted", "\\u0000", "a\\\\u0000"]
    async with durable.worker(concurrency=5):
        spawned = [(await durable.spawn(fail, message)).task_id for message in about]
        with_nul = [await durable.spawn_by_name("fail", "", unchecked=True)]
        for task_id in [*spawned, with_nul[0].task_id]:
            await durable.wait_for_result(task_id, timeout=20)
    async with durable.engine.begin() as connection:
        await connection.execute(
            text("UPDATE durable.tasks SET error = CAST(:error AS json) WHERE task_id = :id"),
            {"error": '{"name": "ValueError", "message": "a\\\\\\u0000"}', "id": with_nul[0].task_id},
        )
    where = TaskFilter(error_name="ValueError")
    assert set(await ids(durable, where)) == set(spawned)
    assert (await durable.get_task(with_nul[0])).error is not None


@with_some_callers
async def test_reading_in_the_transaction_of_the_application(application: Application) -> None:
    """What was spawned in it is seen, and joined with tables of the application."""
    durable = Durable()
    async with application.caller() as caller:
        spawned = await caller.call(durable.spawn_by_name_with, "pack", 1, unchecked=True)
        await caller.insert("hat")
        task: TaskInfo = await caller.call(durable.get_task_with, spawned)
        assert (task.task_id, task.task_name, task.status) == (spawned.task_id, "pack", TaskStatus.PENDING)
        assert (await caller.call(durable.list_tasks_with, TaskFilter(task_name="pack"))).items == [task]
        joined = select(TaskRow.task_id).join(Order, Order.id == TaskRow.priority + 1).where(Order.item.in_(["hat"]))
        assert (await caller.call(durable.list_tasks_with, joined)).items == [task]
        assert (await caller.call(durable.list_tasks_with, joined.where(Order.item == "tie"))).items == []
        with pytest.raises(TaskNotFound):
            await caller.call(durable.get_task_with, uuid.uuid4())
    async with application.caller() as caller:
        with pytest.raises(SchemaMismatch, match="not installed"):
            await caller.call(Durable(schema="elsewhere").list_tasks_with)


async def test_another_schema(engine: AsyncEngine) -> None:
    async with Durable(engine, schema="other") as durable:
        await durable.migrate()
        (task_id,) = await spawn_names(durable, "a")
        assert await ids(durable, TaskFilter("a")) == [task_id]
        assert await ids(durable, select(TaskRow.task_id).where(TaskRow.task_name == "a")) == [task_id]
        assert (await durable.get_task(task_id)).task_name == "a"
