"""Limits as an application sets them, unique keys, and what is refused before anything is written."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from pydantic import BaseModel
from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    CancellationPolicy,
    Durable,
    IdempotencyConflict,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    Limit,
    LimitKeyInfo,
    QueueNotFound,
    Rate,
    RateLimited,
    Spawn,
    TaskContext,
    TaskFilter,
    TaskRow,
    TaskStatus,
    task,
)
from durable_sa.client import inserting
from durable_sa.models import LimitArrivalRow, LimitRow
from durable_sa.testing import run_until_idle

from ..support import eventually

CALLS: list[Any] = []


class Question(BaseModel):
    tenant: str
    text: str = ""


@task("answer", limit_key=lambda question: question.tenant)
async def answer(ctx: TaskContext, question: Question) -> str:
    CALLS.append(question.text)
    return question.text


@task("note")
async def note(ctx: TaskContext, text: str) -> str:
    CALLS.append(text)
    return text


@task("raising", limit_key=lambda params: params["missing"])
async def raising(ctx: TaskContext, params: dict[str, str]) -> None: ...


@task("numbered", limit_key=lambda params: 7)  # type: ignore[arg-type]
async def numbered(ctx: TaskContext, params: dict[str, str]) -> None: ...


@task("patient")
async def patient(ctx: TaskContext, text: str) -> str:
    await ctx.await_event("go")
    return text


@task("parent", queue_name="q")
async def parent(ctx: TaskContext) -> str:
    handle = await ctx.spawn("ask", answer, Question(tenant="child", text="from a parent"))
    return await ctx.join(handle)


@pytest.fixture
async def client(engine: AsyncEngine) -> Any:
    CALLS.clear()
    async with Durable(engine, queue_name="q", tasks=[answer, note, raising, numbered, patient, parent]) as durable:
        yield durable


async def rows(engine: AsyncEngine, statement: Any) -> list[Any]:
    async with engine.connect() as connection:
        return list(await connection.execute(statement))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limit(),
        lambda: Limit(concurrency=0),
        lambda: Limit(concurrency=-1),
        lambda: Limit(concurrency=10**12),
        lambda: Limit(concurrency=math.nan),  # type: ignore[arg-type]
        lambda: Limit(concurrency=True),
        lambda: Limit(concurrency=1, hold="ever"),  # type: ignore[arg-type]
        lambda: Limit(rate=60),  # type: ignore[arg-type]
        lambda: Rate(0, per=1),
        lambda: Rate(1, per=0),
        lambda: Rate(1, per=-1),
        lambda: Rate(1, per=math.nan),
        lambda: Rate(1, per=math.inf),
        lambda: Rate(10**9, per=1),
        lambda: Rate(1, per=1, burst=0),
        lambda: Rate(1000, per=timedelta(microseconds=1)),
        lambda: Rate(1, per=timedelta(days=3653)),
        lambda: RateLimited(0),
        lambda: RateLimited(-1),
        lambda: RateLimited(math.nan),
        lambda: RateLimited("soon"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidConfiguration):
        make()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"limit_key": 7}, InvalidConfiguration),
        ({"limit_key": ""}, InvalidName),
        ({"limit_key": "ü" * 101}, InvalidName),
        ({"limit_key": "a\0b"}, InvalidName),
        ({"weight": -1}, InvalidConfiguration),
        ({"weight": 1001}, InvalidConfiguration),
        ({"weight": 1.5}, InvalidConfiguration),
        ({"unique": "a", "idempotency_key": "b"}, InvalidConfiguration),
        ({"unique": "a", "max_delay": 5}, InvalidConfiguration),
        ({"max_delay": 5, "idempotency_key": "b"}, InvalidConfiguration),
        ({"on_conflict": "return"}, InvalidConfiguration),
        ({"unique": "a", "on_conflict": "wait"}, InvalidConfiguration),
        ({"unique": "a", "on_conflict": "replace", "max_delay": -1}, InvalidConfiguration),
        ({"unique": "a" * 256}, InvalidName),
    ],
)
async def test_bad_options_of_a_spawn_are_refused_before_anything_is_written(
    client: Durable, engine: AsyncEngine, options: dict[str, Any], error: type[Exception]
) -> None:
    await client.create_queue("q")
    with pytest.raises(error):
        await client.spawn(note, "hello", **options)
    with pytest.raises(error):
        await client.spawn_many([(note, "first"), Spawn(note, "second", **options)])
    assert await rows(engine, select(TaskRow.task_id)) == []


async def test_a_function_for_keys_that_raises_or_gives_no_text_is_refused(
    client: Durable, engine: AsyncEngine
) -> None:
    await client.create_queue("q")
    with pytest.raises(InvalidConfiguration, match="'raising' has raised KeyError"):
        await client.spawn(raising, {})
    with pytest.raises(InvalidConfiguration, match="must be a str or None, not int"):
        await client.spawn_many([(numbered, {})])
    with pytest.raises(InvalidName):
        await client.spawn(answer, Question(tenant="x" * 201))
    assert await rows(engine, select(TaskRow.task_id)) == []


async def test_arguments_of_limits_that_do_not_go_together_are_refused(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    for arguments in (
        {"key": "a", "per_key": True},
        {"weight": 2},
        {"key": "a", "weight": 0},
        {"key": "a", "weight": 10**6},
    ):
        with pytest.raises(InvalidConfiguration):
            await client.set_limit("q", Limit(concurrency=1), **arguments)
    with pytest.raises(InvalidConfiguration):
        await client.set_limit("q", 5)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration):
        await client.create_queue("q2", limit=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="time zone"):
        await client.close_limit_key("q", "a", datetime(2030, 1, 1))
    with pytest.raises(InvalidConfiguration, match="open, full, throttled, closed"):
        await client.list_limit_keys("q", state="busy")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="must be a str"):
        await client.list_limit_keys("q", after=cast("Any", 7))
    with pytest.raises(InvalidName):
        await client.list_limit_keys("q", after="a\0")
    for call in (
        client.set_limit("nowhere", Limit(concurrency=1)),
        client.set_limit("nowhere", None),
        client.close_limit_key("nowhere", "a", None),
        client.list_limit_keys("nowhere"),
    ):
        with pytest.raises(QueueNotFound):
            await call
    assert await rows(engine, select(LimitRow.queue_name)) == []


async def test_limits_are_refused_while_workers_that_know_none_are_alive(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)"
                " VALUES (gen_random_uuid(), 'old', '{q}', '1 min', now() + interval '1 min')"
            )
        )
    for call in (
        client.set_limit("q", Limit(concurrency=1)),
        client.create_queue("new", limit=Limit(concurrency=1)),
        client.close_limit_key("q", "a", None),
    ):
        with pytest.raises(InvalidState, match="'old' is of a version of durable_sa that knows no limits"):
            await call
    await client.set_limit("q", None)
    assert await client.list_queues() == ["default", "q"]


async def test_limits_of_a_queue_are_set_once_more_or_left(client: Durable, engine: AsyncEngine) -> None:
    each = Limit(concurrency=2, rate=Rate(60, per=60, burst=10))
    await client.create_queue("q", limit=Limit(concurrency=200), limit_per_key=each)
    await client.create_queue("q")
    await client.set_limit("q", Limit(concurrency=20), key="acme", weight=3)
    columns: tuple[Any, ...] = (
        LimitRow.scope,
        LimitRow.limit_key,
        LimitRow.concurrency,
        LimitRow.rate_count,
        LimitRow.weight,
    )
    found = {tuple(row) for row in await rows(engine, select(*columns))}
    assert found == {
        ("queue", "", 200, None, None),
        ("per_key", "", 2, 60, None),
        ("key", "acme", 20, None, 3),
    }
    await client.set_limit("q", None, key="acme")
    await client.create_queue("q", limit=None)
    columns = (LimitRow.scope, LimitRow.limit_key, LimitRow.limited, LimitRow.weight)
    found = {tuple(row) for row in await rows(engine, select(*columns))}
    assert found == {("per_key", "", True, None), ("key", "acme", False, 3)}


async def test_keys_come_from_the_params_from_the_spawn_and_from_schedules(
    client: Durable, engine: AsyncEngine
) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    await client.spawn(answer, Question(tenant="acme"))
    await client.spawn(answer, {"tenant": "as a dict"})  # type: ignore[arg-type]
    await client.spawn(answer, Question(tenant="acme"), limit_key="own", weight=5)
    await client.spawn(note, "none")
    await client.spawn_by_name("answer", {"tenant": "by name"})
    await client.spawn_by_name("answer", {"nothing": 1}, unchecked=True)
    async with engine.begin() as connection:
        await client.spawn_with(connection, answer, Question(tenant="in a transaction"))
    await client.create_schedule(
        "hourly", task=answer, params=Question(tenant="scheduled"), cron_expression="0 * * * *", weight=2
    )
    await client.trigger_schedule("hourly")
    found = {tuple(row) for row in await rows(engine, select(TaskRow.limit_key, TaskRow.weight))}
    keys = {"acme", "as a dict", "by name", "", "in a transaction"}
    assert found == {*((key, None) for key in keys), ("own", 5), ("scheduled", 2)}
    assert len(await rows(engine, select(LimitArrivalRow))) == 8
    infos = await client.list_limit_keys("q")
    assert [info for info in infos if info.key in ("acme", None)] == [
        LimitKeyInfo(None, "open", 0, 2, None),
        LimitKeyInfo("acme", "open", 0, 1, None),
    ]
    assert len(await client.list_limit_keys("q", limit=3)) == 3
    assert await client.list_limit_keys("q", limit=1) == infos[:1]
    assert await client.list_limit_keys("q", after="", limit=2) == infos[1:3]
    assert await client.list_limit_keys("q", after=infos[2].key) == infos[3:]
    assert await client.list_limit_keys("q", state="open", after=infos[2].key, limit=1) == infos[3:4]
    assert await client.list_limit_keys("q", after=infos[-1].key) == []


async def test_children_have_keys(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q", limit=Limit(concurrency=5))
    spawned = await client.spawn(parent)
    await run_until_idle(client)
    assert (await client.wait_for_result(spawned, timeout=5)).output == "from a parent"
    assert {row.limit_key for row in await rows(engine, select(TaskRow.limit_key))} == {"", "child"}


async def test_a_keyed_task_in_a_queue_without_limits_makes_its_keys_take_turns(
    client: Durable, engine: AsyncEngine
) -> None:
    await client.create_queue("q")
    spawned = [await client.spawn(answer, Question(tenant=f"t{n}")) for n in range(3)]
    plain = await client.spawn(note, "plain")
    async with client.worker(concurrency=1):
        for each in [*spawned, plain]:
            await client.wait_for_result(each, timeout=10)

        ready = text("SELECT 1 FROM durable.queues WHERE limits_ready_at IS NOT NULL")
        await eventually(lambda: rows(engine, ready))
        more = [await client.spawn(answer, Question(tenant="t1")), await client.spawn(note, "more")]
        for each in more:
            await client.wait_for_result(each, timeout=10)


async def test_spawns_without_keys_need_not_know_that_a_queue_has_limits(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q", limit=Limit(concurrency=1))
    async with Durable(engine, queue_name="q", tasks=[note]) as another:
        assert (await another.spawn(note, "one")).created
        assert another.limited_queues == {"q"}
        assert len(await another.spawn_many([(note, str(n)) for n in range(3)])) == 3
        kept = await another.spawn(note, "key", idempotency_key="k")
        assert (await another.spawn(note, "key", idempotency_key="k")).task_id == kept.task_id
    assert {row.limit_key for row in await rows(engine, select(TaskRow.limit_key))} == {""}
    assert len(await rows(engine, select(LimitArrivalRow))) == 5


async def test_one_unfinished_task_has_a_unique_key(client: Durable) -> None:
    await client.create_queue("q")
    first = await client.spawn(note, "one", unique="order-7")
    second = await client.spawn(note, "two", unique="order-7")
    assert (second.task_id, second.created) == (first.task_id, False)
    with pytest.raises(IdempotencyConflict, match="unique key 'order-7' belongs to the unfinished task"):
        await client.spawn(patient, "one", unique="order-7")
    await run_until_idle(client)
    third = await client.spawn(note, "three", unique="order-7")
    assert third.created
    await client.cancel_task(third)
    fourth = await client.spawn(note, "four", unique="order-7")
    assert fourth.created
    with pytest.raises(InvalidState, match="without its unique key"):
        await client.retry_task(third.task_id)
    await client.cancel_task(fourth)
    await client.retry_task(third.task_id)


async def test_a_unique_key_waits_for_the_transaction_that_has_it(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    async with engine.connect() as connection:
        first = await client.spawn_with(connection, note, "one", unique="k")
        second = asyncio.create_task(client.spawn(note, "two", unique="k"))
        # Others do not wait with it.
        await client.spawn(note, "other", unique="another")
        assert not second.done()
        await connection.commit()
    assert (await second).task_id == first.task_id


async def test_an_unstarted_task_is_replaced(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))

    async def replace(text: str, **options: Any) -> None:
        again = await client.spawn(note, text, unique="k", on_conflict="replace", limit_key="a", **options)
        assert (again.task_id, again.created) == (first.task_id, False)

    async def delay() -> float:
        (row,) = await rows(engine, select(TaskRow.created_at, TaskRow.available_at))
        return float((row.available_at - row.created_at) / timedelta(seconds=1))

    first = await client.spawn(note, "one", unique="k", on_conflict="replace", limit_key="a", delay=60)
    await replace("two", delay=600)
    assert 600 <= await delay() < 660
    await replace("three", delay=600, max_delay=90)
    assert await delay() == 90
    async with client.worker(concurrency=2):
        await replace("four")
        assert (await client.wait_for_result(first, timeout=20)).output == "four"
    assert CALLS == ["four"]


async def test_a_started_task_is_not_replaced(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    first = await client.spawn(patient, "one", unique="k")
    await run_until_idle(client)
    again = await client.spawn(patient, "two", unique="k", on_conflict="replace")
    assert (again.task_id, again.created) == (first.task_id, False)
    await client.emit_event("go")
    await run_until_idle(client)
    assert (await client.wait_for_result(first, timeout=5)).output == "one"


async def test_a_task_that_was_retried_is_not_replaced(client: Durable) -> None:
    await client.create_queue("q")
    first = await client.spawn(patient, "one", unique="k")
    await run_until_idle(client)
    await client.cancel_task(first)
    await client.retry_task(first)
    await client.spawn(patient, "two", unique="k", on_conflict="replace")
    await client.emit_event("go")
    await run_until_idle(client)
    assert (await client.wait_for_result(first, timeout=5)).output == "one"


async def test_a_replaced_task_has_the_limit_key_and_the_weight_of_its_params(
    client: Durable, engine: AsyncEngine
) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    options: dict[str, Any] = {"unique": "k", "on_conflict": "replace"}
    first = await client.spawn(answer, Question(tenant="a"), delay=60, weight=7, **options)
    await client.close_limit_key("q", "a", datetime(2999, 1, 1, tzinfo=UTC))
    async with client.worker(concurrency=2):
        await client.spawn(answer, Question(tenant="b", text="two"), **options)
        assert (await client.wait_for_result(first, timeout=20)).output == "two"
    (row,) = await rows(engine, select(TaskRow.limit_key, TaskRow.weight))
    assert tuple(row) == ("b", None)
    await client.spawn(note, "three", limit_key="c", delay=60, **options)
    await client.spawn(note, "four", **options)
    assert [row.limit_key for row in await rows(engine, select(TaskRow.limit_key).order_by(TaskRow.task_id))][1:] == [
        ""
    ]


async def test_a_replaced_task_may_be_pending_from_its_new_time_on(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    policy = CancellationPolicy(max_pending_time=5)
    for delay in (10, 100):
        await client.spawn(note, "a", unique="k", on_conflict="replace", delay=delay, cancellation=policy)
    (row,) = await rows(engine, select(TaskRow.available_at, TaskRow.cancel_at, TaskRow.created_at))
    assert row.available_at - row.created_at >= timedelta(seconds=100)
    assert abs(row.cancel_at - row.available_at - timedelta(seconds=5)) < timedelta(seconds=1)


async def test_the_first_delay_is_bounded_as_well(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    await client.spawn(note, "a", unique="k", on_conflict="replace", delay=10, max_delay=5)
    (row,) = await rows(engine, select(TaskRow.available_at, TaskRow.created_at))
    assert row.available_at - row.created_at == timedelta(seconds=5)


async def test_a_contended_key_is_tried_until_it_is_had(client: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.create_queue("q")
    old = await client.spawn(note, "old", unique="k", delay=60)
    # One try finds the key taken, and has no second one to insert the task.
    monkeypatch.setattr(inserting, "_TRIES", 1)
    spawning = asyncio.create_task(client.spawn(note, "new", unique="k", on_conflict="cancel"))
    many = asyncio.create_task(client.spawn_many([Spawn(note, "new", unique="k", on_conflict="cancel")] * 2))
    await asyncio.sleep(0.2)
    assert not spawning.done()
    assert not many.done()
    assert (await client.get_task_result(old)).status is TaskStatus.PENDING
    monkeypatch.undo()
    assert (await spawning).created
    assert all(result.created for result in await many)


async def test_calls_with_the_same_unique_keys_in_another_order_do_not_deadlock(
    client: Durable, engine: AsyncEngine
) -> None:
    await client.create_queue("q")
    items = [Spawn(note, "x", unique=f"k{number}") for number in range(900)]

    async def spawn(items: list[Spawn[Any]]) -> None:
        async with engine.begin() as connection:
            await client.spawn_many_with(connection, items)

    for _ in range(3):
        await asyncio.gather(spawn(items), spawn(items[::-1]))
        assert len(await rows(engine, select(TaskRow.task_id))) == 900
        async with engine.begin() as connection:
            await connection.execute(delete(TaskRow))


async def test_a_descendant_whose_unique_key_is_taken_is_not_retried(client: Durable) -> None:
    await client.create_queue("q")

    @client.task
    async def delegating(ctx: TaskContext) -> None:
        await ctx.spawn("child", patient, "one", unique="k")
        await ctx.await_event("go")

    old, other = await client.spawn(delegating), await client.spawn(patient, "other")
    await run_until_idle(client)
    await client.cancel_task(old)
    await client.cancel_task(other)
    holder = await client.spawn(patient, "two", unique="k")
    with pytest.raises(InvalidState, match=f"A descendant of task {old.task_id} is without its unique key"):
        await client.retry_task(old)
    result = await client.retry_tasks(TaskFilter(state="cancelled"))
    assert (result.matched, result.done) == (3, 1)
    await client.cancel_task(holder)
    assert await client.retry_task(old) is TaskStatus.PENDING


async def test_a_child_cannot_be_the_task_that_has_its_unique_key(client: Durable) -> None:
    await client.create_queue("q")

    @client.task(max_attempts=1)
    async def delegating(ctx: TaskContext) -> None:
        await ctx.spawn("child", note, "one", unique="k")

    holder = await client.spawn(note, "one", unique="k", delay=60)
    failed = await client.spawn(delegating)
    async with client.worker():
        error = (await client.wait_for_result(failed, timeout=20)).error
    assert error is not None
    assert error.name == "IdempotencyConflict"
    assert (
        f"the unfinished task {holder.task_id} in queue 'q', and a child cannot be a task that exists" in error.message
    )


async def test_the_old_task_is_cancelled(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q")
    first = await client.spawn(patient, "one", unique="k")
    await run_until_idle(client)
    second = await client.spawn(patient, "two", unique="k", on_conflict="cancel")
    assert second.created
    assert second.task_id != first.task_id
    assert (await client.wait_for_result(first, timeout=5)).status is TaskStatus.CANCELLED
    async with engine.begin() as connection:
        third = await client.spawn_with(connection, patient, "three", unique="k", on_conflict="cancel")
    states = {row.task_id: row.state for row in await rows(engine, select(TaskRow.task_id, TaskRow.state))}
    assert states == {first.task_id: "cancelled", second.task_id: "cancelled", third.task_id: "pending"}


async def test_a_wrong_count_is_repaired(client: Durable, engine: AsyncEngine) -> None:
    await client.create_queue("q", limit=Limit(concurrency=1), limit_per_key=Limit(concurrency=1))
    spawned = await client.spawn(answer, Question(tenant="a", text="at last"))
    async with engine.begin() as connection:
        await connection.execute(
            text("INSERT INTO durable.limit_keys (queue_name, limit_key, running) VALUES ('q', 'a', 1)")
        )
        await connection.execute(text("UPDATE durable.limit_totals SET running = 1"))
    async with client.worker(concurrency=1):
        await asyncio.sleep(0.1)
        assert CALLS == []
        assert await client.recount_limit_keys(0.0) == 2
        await client.wait_for_result(spawned, timeout=5)
