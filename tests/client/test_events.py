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
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable, InvalidName, QueueNotFound, SerializationError, TaskContext
from durable_sa.models import Event
from tests.client.support import Application, Gate, count, with_some_callers


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
