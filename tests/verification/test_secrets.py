"""What a task is given and gives is in the tables, and nowhere else: a secret that is looked for everywhere."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import Durable, RetryStrategy, TaskContext, UserError, task

CANARY = "canary-5c1d"


class Order(BaseModel):
    card: str


async def charge(card: str) -> str:
    return f"charged {card}"


async def refuse(card: str) -> str:
    raise ValueError(card)


async def book(session: AsyncSession, card: str) -> str:
    return str((await session.execute(text("SELECT CAST(:card AS text)"), {"card": card})).scalar())


@task
async def leaf(ctx: TaskContext, order: Order) -> str:
    return order.card


@task
async def everything(ctx: TaskContext, order: Order) -> str:
    await ctx.step("charge", charge, order.card)
    await ctx.transaction("book", book, order.card)
    await ctx.emit_event(f"event-{ctx.task_id}", order.card)
    await ctx.publish("card", order.card)
    async with ctx.stream("card") as stream:
        await stream.write(order.card)
    await ctx.send(ctx.task_id, "card", order.card)
    await ctx.race("card", card=ctx.receive("card"), never=ctx.receive("never"))
    await ctx.sleep_for("nap", 0.01)
    return await ctx.join(await ctx.spawn("leaf", leaf, order)) + await ctx.await_event(
        f"event-{ctx.task_id}", type=str
    )


@task(max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
async def failing(ctx: TaskContext, order: Order) -> str:
    return await ctx.step("refuse", refuse, order.card)


@task
async def giving_up(ctx: TaskContext, order: Order) -> None:
    raise UserError({"message": order.card})


@task
async def unstorable(ctx: TaskContext, order: Order) -> Any:
    return {"card": order.card, "other": object()}


TASKS = (leaf, everything, failing, giving_up, unstorable)


class Spy:
    """Hears every notification and sees every statement of the database."""

    def __init__(self, connection: Any) -> None:
        self.seen: set[str] = set()
        self._connection = connection

    async def watch(self) -> None:
        await self._connection.add_listener("durable", lambda *heard: self.seen.add(str(heard[-1])))
        while True:
            rows = await self._connection.fetch("SELECT query FROM pg_stat_activity WHERE datname = current_database()")
            self.seen |= {row["query"] for row in rows}
            await asyncio.sleep(0.002)


@pytest.fixture
async def spy(database_url: URL) -> AsyncGenerator[Spy]:
    url = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    spy = Spy(connection)
    watching = asyncio.create_task(spy.watch())
    yield spy
    watching.cancel()
    await asyncio.wait([watching])
    await connection.close()


async def test_values_are_in_no_log_notification_statement_or_repr(
    durable: Durable, engine: AsyncEngine, spy: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    assert not engine.sync_engine.hide_parameters
    caplog.set_level(logging.DEBUG, "durable_sa")
    for each in TASKS:
        durable.register(each)
    order = Order(card=CANARY)
    async with durable.worker(concurrency=5) as worker:
        spawned = [
            await durable.spawn(each, order, headers={"card": CANARY}, idempotency_key=f"{each.name} {CANARY}")
            for each in TASKS
        ]
        await durable.create_schedule("s", task=leaf, params=order, cron_expression="0 0 1 1 *", metadata={"m": CANARY})
        results = [await durable.wait_for_result(spawn, timeout=15) for spawn in spawned]
        shown = [durable, worker, *spawned, *await durable.list_schedules(), results[1]]
        assert [result.status for result in results] == ["completed", "completed", "failed", "failed", "failed"]
    assert not [repr(thing) for thing in shown if CANARY in repr(thing)]
    assert "failed" in caplog.text
    assert CANARY not in caplog.text
    assert len(spy.seen) > 5
    assert not [seen for seen in spy.seen if CANARY in seen]


@pytest.mark.parametrize(
    "column",
    [
        "tasks.output",
        "tasks.error",
        "checkpoints.value",
        "messages.payload",
        "task_values.value",
        "stream_items.items",
    ],
)
async def test_what_the_database_says_of_a_row_that_it_refuses_is_not_repeated(
    durable: Durable, engine: AsyncEngine, caplog: pytest.LogCaptureFixture, column: str
) -> None:
    """A constraint of the application's own: the server quotes the row then, and SQLAlchemy the parameters."""
    caplog.set_level(logging.DEBUG, "durable_sa")
    table, name = column.split(".")
    async with engine.begin() as connection:
        await connection.exec_driver_sql(
            f"ALTER TABLE durable.{table} ADD CONSTRAINT mine CHECK ({name}::text NOT LIKE '%canary%')"
        )
    for each in TASKS:
        durable.register(each)
    async with durable.worker(concurrency=5):
        if column == "tasks.error":
            await durable.spawn(giving_up, Order(card=CANARY))
            async with asyncio.timeout(10):
                while "cannot be stored" not in caplog.text:
                    await asyncio.sleep(0.01)
        else:
            chosen = leaf if column == "tasks.output" else everything
            result = await durable.wait_for_result(
                await durable.spawn(chosen, Order(card=CANARY), max_attempts=1), timeout=10
            )
            if column == "task_values.value":
                # The value is for others to see; the task does not depend on it.
                assert result.error is None
                assert "published a value that the database refuses: IntegrityError" in caplog.text
                assert CANARY not in caplog.text
                return
            assert result.error is not None
            assert result.error.name == "IntegrityError"
            assert 'violates check constraint "mine"' in result.error.message
            assert CANARY not in result.error.message
    assert CANARY not in caplog.text
