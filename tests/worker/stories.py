"""A task that uses everything, for tests in which everything happens to it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, SpawnResult, TaskContext

from .conftest import Rows


class Parts(BaseModel):
    """How much a task does, and how slowly."""

    steps: int = 3
    pause: float = 0.01
    sleep: float = 0.05
    book: bool = True


class Story:
    """A task that uses everything, and notes how often each part of it was executed."""

    def __init__(self, durable: Durable) -> None:
        self.executed: dict[tuple[Any, str], int] = {}

        def count(key: Any, what: str) -> None:
            self.executed[key, what] = self.executed.get((key, what), 0) + 1

        async def step(key: str, number: int, pause: float) -> int:
            count(key, f"step-{number}")
            await asyncio.sleep(pause)
            return number

        async def book(session: AsyncSession, key: str) -> None:
            await session.execute(text("INSERT INTO public.bookings VALUES (:key)"), {"key": key})

        @durable.task(max_attempts=1)
        async def child(ctx: TaskContext, key: str) -> str:
            count(key, "child")
            return key

        @durable.task(max_attempts=1)
        async def story(ctx: TaskContext, parts: Parts) -> int:
            key = str(ctx.task_id)
            total = 0
            for number in range(parts.steps):
                total += await ctx.step("step", step, key, number, parts.pause)
            handle = await ctx.spawn("child", child, key)
            if parts.book:
                await ctx.transaction("book", book, key)
            await ctx.sleep_for("nap", parts.sleep)
            await ctx.emit_event(f"event-{key}", total)
            assert await ctx.await_event(f"event-{key}") == total
            assert await ctx.join(handle) == key
            return total

        self.task = story


async def create_bookings(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS public.bookings (key text)"))


@asynccontextmanager
async def named(url: URL, name: str, **options: Any) -> AsyncGenerator[Durable]:
    """A client whose connections can be told from others on the server."""
    about = {"application_name": name}
    arguments = {"server_settings": about} if url.get_driver_name() == "asyncpg" else about
    engine = create_async_engine(url, connect_args=arguments, **options)
    try:
        async with Durable(engine) as durable:
            yield durable
    finally:
        await engine.dispose()


async def assert_stories_ended_well(sql: Rows, spawned: list[SpawnResult[int]], *, booked: bool = True) -> None:
    failed = await sql("SELECT task_name, state, error::text FROM durable.tasks WHERE outcome <> 'completed'")
    assert failed == []
    assert await sql("SELECT count(*) FROM durable.tasks WHERE outcome IS NULL") == [(0,)]
    assert await sql("SELECT DISTINCT failures FROM durable.tasks") == [(0,)]
    # One child each, and what each has booked is there once.
    families = await sql("SELECT task_name, count(*) FROM durable.tasks GROUP BY 1 ORDER BY 1")
    assert families == [("child", len(spawned)), ("story", len(spawned))]
    bookings = await sql("SELECT key, count(*) FROM public.bookings GROUP BY 1")
    assert dict(bookings) == ({str(spawn.task_id): 1 for spawn in spawned} if booked else {})
    assert await sql("SELECT * FROM durable.waits") == []
    assert await sql("SELECT count(*) FROM durable.runs") == [
        ((await sql("SELECT sum(attempt) FROM durable.tasks"))[0][0],)
    ]
