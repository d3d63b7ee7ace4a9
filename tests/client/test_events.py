"""Events that a client emits: the first of a name in a queue counts, and what is stored is what was given."""

from __future__ import annotations

import asyncio
import math
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, InvalidName, InvalidState, QueueNotFound, SerializationError, TaskContext
from durable_sa.models import Event
from durable_sa.testing import run_until_idle
from tests.client.support import Application, Gate, count, with_some_callers
from tests.support import eventually


class Amount(BaseModel):
    amount: int


class Payment(BaseModel):
    amount: int
    paid_at: datetime


async def payload(engine: AsyncEngine, name: str, queue_name: str = "default") -> Any:
    async with engine.connect() as connection:
        text = sa.select(sa.cast(Event.payload, sa.Text)).where(Event.name == name, Event.queue_name == queue_name)
        return (await connection.execute(text)).scalar_one()


async def test_the_first_emit_of_a_name_counts(durable: Durable, engine: AsyncEngine) -> None:
    assert await durable.emit_event("paid", {"amount": 1}) is True
    assert await durable.emit_event("paid", {"amount": 2}) is False
    assert await durable.emit_event("paid", {"amount": 1}) is False
    assert await payload(engine, "paid") == '{"amount":1}'


async def test_an_event_belongs_to_a_queue(durable: Durable, engine: AsyncEngine) -> None:
    await durable.create_queue("mails")
    assert await durable.emit_event("paid", 1)
    assert await durable.emit_event("paid", 2, queue_name="mails")
    assert await Durable(engine, queue_name="mails").emit_event("paid", 3) is False
    assert (await payload(engine, "paid"), await payload(engine, "paid", "mails")) == ("1", "2")


@pytest.mark.slow
async def test_an_emit_into_another_queue_than_that_of_the_waiter_is_noticed_once_for_each_name(
    durable: Durable, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    @durable.task("wait")
    async def wait(ctx: TaskContext, name: str) -> Any:
        return await ctx.await_event(name)

    @durable.task("emit")
    async def emit(ctx: TaskContext, name: str) -> bool:
        return await ctx.emit_event(name)

    def warned() -> list[str]:
        return [record.getMessage() for record in caplog.records if "was emitted into queue" in record.getMessage()]

    await durable.create_queue("mails")
    await durable.create_queue("others")
    names = [f"{kind}:{uuid.uuid4()}" for kind in ("paid", "shipped", "both", "early", "task")]
    for name in (*names[:3], names[4]):
        await durable.spawn(wait, name, queue_name="mails")
    await durable.spawn(wait, names[2])
    await run_until_idle(durable)
    assert await durable.emit_event(names[0], 1)
    (message,) = warned()
    assert f"event {names[0]!r} was emitted into queue 'default'" in message
    assert "waits for it in queue 'mails'" in message
    # Once for each name; in a caller's transaction, too; and not where its own queue has a waiter, or no queue has one.
    assert await durable.emit_event(names[0], 1, queue_name="others")
    assert not await durable.emit_event(names[0], 2)
    async with AsyncSession(engine) as session, session.begin():
        assert await durable.emit_event_with(session, names[1])
    await durable.emit_event(names[2])
    await durable.emit_event(names[3])
    assert len(warned()) == 2
    assert names[1] in warned()[1]
    # A worker says the same of what a task emits.
    await durable.spawn(emit, names[4])
    async with durable.worker():
        # The search for undelivered events finds it, as its emit has no waiter to announce; that takes up to 20 seconds.
        await eventually(lambda: len(warned()) > 2, within=100.0)
    assert len(warned()) == 3
    assert names[4] in warned()[2]


async def test_an_emit_is_two_statements_on_the_tables(durable: Durable, engine: AsyncEngine) -> None:
    statements: list[str] = []
    await durable.emit_event("first")
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    await durable.emit_event("second")
    assert len([each for each in statements if "durable." in each]) == 2


@pytest.mark.slow
async def test_a_replaced_event_is_what_later_waits_get(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("wait", max_attempts=5)
    async def wait(ctx: TaskContext) -> int:
        amount = (await ctx.await_event("paid", type=Amount)).amount
        again = (await ctx.await_event("paid", type=Amount)).amount
        await ctx.sleep_for("replay", 0.01)
        return 10 * amount + again

    await durable.create_queue("mails")
    await durable.emit_event("paid", {"amount": 1}, queue_name="mails")
    waiting = await durable.spawn(wait)
    await run_until_idle(durable)
    await durable.emit_event("paid", {"amount": "a lot"})
    await run_until_idle(durable)
    failed = await durable.wait_for_result(waiting, timeout=10)
    assert failed.error is not None
    assert (failed.status, failed.error.name) == ("failed", "SerializationError")
    # As long as the event is the same, a retry fails again; the first emit has counted.
    assert not await durable.emit_event("paid", {"amount": 2})
    await durable.retry_task(waiting.task_id)
    assert (await finished(durable, waiting.task_id)).status == "failed"
    # One that does not fit either is not recorded.
    await durable.replace_event("paid", {"amount": None})
    await durable.retry_task(waiting.task_id)
    assert (await finished(durable, waiting.task_id)).status == "failed"
    await durable.replace_event("paid", {"amount": 3})
    await durable.retry_task(waiting.task_id)
    assert (await finished(durable, waiting.task_id)).output == 33
    # What has been read well stays; what comes later reads the new one; the other queue has its own.
    await durable.replace_event("paid", {"amount": 4})
    assert (await finished(durable, (await durable.spawn(wait)).task_id)).output == 44
    assert await payload(engine, "paid", "mails") == '{"amount":1}'
    await durable.replace_event("paid", {"amount": 5}, "mails")
    assert await payload(engine, "paid", "mails") == '{"amount":5}'


async def test_a_payload_read_anew_stays_when_the_event_is_replaced_once_more(durable: Durable) -> None:
    replaced = asyncio.Event()

    @durable.task("wait")
    async def wait(ctx: TaskContext) -> int:
        amount = (await ctx.await_event("paid", type=Amount)).amount
        replaced.set()
        await ctx.await_event("go")
        return amount

    await durable.emit_event("paid", "nothing")
    waiting = await durable.spawn(wait)
    assert (await finished(durable, waiting.task_id)).status == "failed"
    await durable.replace_event("paid", {"amount": 1})
    await durable.retry_task(waiting.task_id)
    await run_until_idle(durable)
    assert replaced.is_set()
    await durable.replace_event("paid", {"amount": 2})
    await durable.emit_event("go")
    assert (await finished(durable, waiting.task_id)).output == 1


async def test_what_cannot_replace_an_event_is_refused(durable: Durable, engine: AsyncEngine) -> None:
    with pytest.raises(InvalidState, match=r"Event 'never' of queue 'default' is not emitted. Emit it"):
        await durable.replace_event("never", 1)
    with pytest.raises(QueueNotFound, match="nowhere"):
        await durable.replace_event("paid", 1, queue_name="nowhere")
    with pytest.raises(InvalidName):
        await durable.replace_event("$paid", 1)
    await durable.emit_event("paid", 1)
    with pytest.raises(SerializationError, match="payload of event 'paid' cannot be stored"):
        await durable.replace_event("paid", math.nan)
    assert await payload(engine, "paid") == "1"


async def finished(durable: Durable, task_id: uuid.UUID) -> Any:
    async with durable.worker():
        return await durable.wait_for_result(task_id, timeout=20)


async def test_null_and_nothing_are_a_payload(durable: Durable, engine: AsyncEngine) -> None:
    assert await durable.emit_event("nothing")
    assert await durable.emit_event("null", None)
    assert await durable.emit_event("false", False)
    assert [await payload(engine, name) for name in ("nothing", "null", "false")] == ["null", "null", "false"]


async def test_a_model_is_emitted_as_what_awaits_it_reads(durable: Durable) -> None:
    sent = Payment(amount=5, paid_at=datetime(2026, 1, 1, tzinfo=UTC))

    @durable.task("wait")
    async def wait(ctx: TaskContext) -> Payment:
        return await ctx.await_event("paid", type=Payment)

    await durable.emit_event("paid", sent)
    spawned = await durable.spawn(wait)
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=20)).output == sent


async def test_of_many_emits_at_once_one_counts(database_url: Any, engine: AsyncEngine) -> None:
    app = create_async_engine(database_url, pool_size=10)
    client = Durable(app)
    emitted = await asyncio.gather(*(client.emit_event("paid", number) for number in range(30)))
    assert emitted.count(True) == 1
    assert await payload(engine, "paid") == str(emitted.index(True))
    await client.close()
    await app.dispose()


async def test_an_emit_whose_commit_was_not_heard_of_was_the_first(durable: Durable, gate: Gate) -> None:
    async with Durable(gate.url) as client:
        await client.list_queues()
        gate.lose_reply_to = b"COMMIT"
        assert await client.emit_event("payment", 1)
        assert gate.lose_reply_to is None
        assert not await client.emit_event("payment", 1)
        assert await durable.emit_event("refund", 1)
        gate.lose_reply_to = b"COMMIT"
        assert not await client.emit_event("refund", 1)


@with_some_callers
async def test_an_emit_that_is_rolled_back_leaves_the_name_free(
    application: Application, durable: Durable, engine: AsyncEngine
) -> None:
    async with application.caller() as caller:
        assert await caller.call(durable.emit_event_with, "paid", 1)
        assert await count(engine, "durable.events") == 0
        await caller.rollback()
        assert await durable.emit_event("paid", 2)
        assert await caller.call(durable.emit_event_with, "paid", 3) is False
        await caller.commit()
    assert await payload(engine, "paid") == "2"


@pytest.mark.slow
async def test_events_in_any_order_of_their_names_do_not_deadlock(database_url: Any, engine: AsyncEngine) -> None:
    """Single emits, each a transaction of its own."""
    app = create_async_engine(database_url, pool_size=8)
    client = Durable(app)
    names = [f"event {number}" for number in range(40)]
    await asyncio.gather(*(client.emit_event(name) for name in [*names, *reversed(names)] * 3))
    await client.close()
    await app.dispose()
    assert await count(engine, "durable.events") == 40


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("$child", r"'\$child' is not valid: names that start with '\$' are reserved"),
        (f"$child:{uuid.UUID(int=7)}", "reserved"),
        ("a\0b", r"U\+0000"),
        ("é" * 101, "202 bytes"),
        ("\ud800", "surrogate"),
        (5, "not int"),
    ],
)
async def test_names_that_break_the_rules_are_refused(
    durable: Durable, engine: AsyncEngine, name: Any, reason: str
) -> None:
    with pytest.raises(InvalidName, match=f"event name .*{reason}"):
        await durable.emit_event(name)
    async with engine.connect() as connection:
        with pytest.raises(InvalidName):
            await durable.emit_event_with(connection, name)
        await connection.commit()
    assert await count(engine, "durable.events") == 0


async def test_reserved_names_are_refused_by_the_table_as_well(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        with pytest.raises(IntegrityError, match="events_name_check"):
            await connection.execute(sa.insert(Event).values(queue_name="default", name="$child", payload=1))


async def test_names_are_taken_as_they_are(durable: Durable, engine: AsyncEngine) -> None:
    names = [
        "a",
        "A",
        "a ",
        " a",
        "a$",
        "é",
        "e\u0301",
        "'; DROP TABLE durable.events; --",
        "%s :x",
        "x" * 200,
        "é" * 100,
    ]
    assert all([await durable.emit_event(name, name) for name in names])
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(Event.name, Event.payload))
        assert {row.name: row.payload for row in rows} == {name: name for name in names}


async def test_what_cannot_be_stored_is_refused(durable: Durable, engine: AsyncEngine) -> None:
    for value in (math.nan, "\ud800", object(), {1j: 2}):
        with pytest.raises(SerializationError, match="payload of event 'paid'"):
            await durable.emit_event("paid", value)
    with pytest.raises(QueueNotFound, match="'nowhere'"):
        await durable.emit_event("paid", queue_name="nowhere")
    with pytest.raises(InvalidName, match="queue name ''"):
        await durable.emit_event("paid", queue_name="")
    assert await count(engine, "durable.events") == 0
