"""What type checkers make of a context's calls: read by them, never run. The ignored lines must be errors."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

import asyncio
from collections.abc import Awaitable
from datetime import datetime, timedelta
from typing import Any, Literal, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from durable_sa import Durable, SyncTaskContext, TaskContext, TaskHandle

from .tasks import Params, Result, State, bare, optional, without_params


async def fetch(url: str, *, retries: int = 1) -> bytes:
    return b""


def parse(data: bytes) -> dict[str, int]:
    return {}


def later(number: int) -> Awaitable[float]:
    raise NotImplementedError


async def book(session: AsyncSession, order: int, *, twice: bool = False) -> str:
    return ""


def book_blocking(session: Session, order: int) -> int:
    return 1


class ShopSession(AsyncSession):
    pass


class BlockingShopSession(Session):
    pass


async def book_in_shop(session: ShopSession, order: int) -> str:
    return ""


def book_in_shop_blocking(session: BlockingShopSession, order: int) -> int:
    return 1


def book_in_any(session: Session | AsyncSession, order: int) -> int:
    return 1


async def in_a_task(ctx: TaskContext[State], plain: TaskContext) -> None:
    assert_type(ctx.state, State)
    assert_type(plain.state, Any)
    assert_type(await ctx.step("fetch", fetch, "x", retries=2), bytes)
    assert_type(await ctx.step("parse", parse, b""), dict[str, int])
    assert_type(await ctx.step("later", later, 1), float)
    assert_type(await ctx.step("lambda", lambda: 5), int)
    assert_type(await ctx.transaction("book", book, 1, twice=True), str)
    assert_type(await ctx.transaction("book", book_blocking, 1), int)

    assert_type(await ctx.transaction("book", book_in_shop, 1), str)
    assert_type(await ctx.transaction("book", book_in_shop_blocking, 1), int)
    assert_type(await ctx.transaction("book", book_in_any, 1), int)

    handle = await ctx.spawn("bare", bare, Params(query="x"), priority=1)
    assert_type(handle, TaskHandle[Result])
    assert_type(await ctx.spawn("none", without_params), TaskHandle[int])
    assert_type(await ctx.spawn("none", optional, max_attempts=1), TaskHandle[str])
    assert_type(await ctx.spawn_by_name("any", "bare", {}), TaskHandle[Any])
    assert_type(await ctx.join(handle, timeout=5), Result)
    assert_type(await ctx.await_event("e", type=Params, timeout=timedelta(days=1)), Params)
    assert_type(await ctx.await_event("e"), Any)
    letter: Literal["a", "b"] = await ctx.await_event("e", type=Literal["a", "b"])
    perhaps: Params | None = await ctx.await_event("e", type=Params | None)
    either: dict[str, Params] | list[int] = await ctx.await_event("e", type=dict[str, Params] | list[int])
    perhaps = await ctx.receive(letter, type=Params | None)
    assert perhaps or either
    assert_type(await ctx.await_event("e", type=dict[str, Params]), dict[str, Params])
    assert_type(await ctx.emit_event("e", {"a": 1}), bool)
    assert_type(await ctx.now(), datetime)
    assert_type(await ctx.uuid7(), UUID)
    assert_type(await ctx.rand(), float)

    # Each keeps its own type where several are gathered.
    assert_type(
        await asyncio.gather(
            ctx.step("fetch", fetch, "x"),
            ctx.transaction("book", book, 1),
            ctx.join(handle),
            ctx.sleep_for("nap", 1),
            ctx.await_event("e", type=int),
        ),
        tuple[bytes, str, Result, None, int],
    )
    assert_type(
        await asyncio.gather(
            ctx.spawn("bare", bare, Params(query="x")),
            ctx.emit_event("e"),
            ctx.now(),
            ctx.rand(),
            ctx.uuid7(),
        ),
        tuple[TaskHandle[Result], bool, datetime, float, UUID],
    )
    assert_type(await asyncio.gather(*[ctx.join(handle), ctx.join(handle)]), list[Result])
    async with asyncio.TaskGroup() as group:
        joined = group.create_task(ctx.join(handle))
    assert_type(joined.result(), Result)

    await ctx.step("fetch", fetch)  # type: ignore[call-overload]
    await ctx.step("fetch", fetch, 1)  # type: ignore[call-overload]
    await ctx.step("fetch", fetch, "x", retry=2)  # type: ignore[call-arg]
    await ctx.transaction("book", book)  # type: ignore[call-overload]
    await ctx.transaction("book", book, "1")  # type: ignore[call-overload]
    await ctx.transaction("fetch", fetch, "x")  # type: ignore[call-overload]
    await ctx.transaction("book", book_in_shop, "1")  # type: ignore[call-overload]
    await ctx.transaction("parse", parse, b"")  # type: ignore[call-overload]
    await ctx.spawn("bare", bare)  # type: ignore[arg-type]
    await ctx.spawn("bare", bare, "x")  # type: ignore[arg-type]
    await ctx.join(UUID(int=1))  # type: ignore[arg-type]
    await ctx.sleep_for("nap", "1 day")  # type: ignore[arg-type]
    await ctx.sleep_until("noon", 5)  # type: ignore[arg-type]


async def without_await(ctx: TaskContext, handle: TaskHandle[int]) -> None:
    """What would never happen."""
    ctx.step("fetch", fetch, "x")  # type: ignore[unused-coroutine]
    ctx.step("parse", parse, b"")  # type: ignore[unused-coroutine]
    ctx.transaction("book", book, 1)  # type: ignore[unused-coroutine]
    ctx.spawn("none", without_params)  # type: ignore[unused-coroutine]
    ctx.join(handle)  # type: ignore[unused-coroutine]
    ctx.sleep_for("nap", 1)  # type: ignore[unused-coroutine]
    ctx.await_event("e")  # type: ignore[unused-coroutine]
    ctx.emit_event("e")  # type: ignore[unused-coroutine]
    ctx.heartbeat()  # type: ignore[unused-coroutine]


def in_a_blocking_task(ctx: SyncTaskContext[State]) -> None:
    assert_type(ctx.state, State)
    assert_type(ctx.step("parse", parse, b""), dict[str, int])
    assert_type(ctx.step("fetch", fetch, "x"), bytes)
    assert_type(ctx.transaction("book", book_blocking, 1), int)
    handle = ctx.spawn("bare", bare, Params(query="x"))
    assert_type(ctx.join(handle), Result)
    assert_type(ctx.await_event("e", type=int), int)
    assert_type(ctx.now(), datetime)
    assert_type(ctx.transaction("book", book_in_shop_blocking, 1), int)
    assert_type(ctx.transaction("book", book_in_any, 1), int)
    perhaps: Params | None = ctx.await_event("e", type=Params | None)
    perhaps = ctx.receive("t", type=Params | None)
    assert perhaps

    ctx.transaction("book", book_blocking)  # type: ignore[call-overload]
    ctx.transaction("book", book_in_shop_blocking, "1")  # type: ignore[call-overload]
    ctx.transaction("parse", parse)  # type: ignore[call-overload]
    ctx.spawn("bare", bare)  # type: ignore[arg-type]


def clients(durable: Durable[State], anything: Durable) -> None:
    assert_type(durable.state, State | None)
    assert_type(anything.state, Any | None)


async def reading(durable: Durable[State], handle: TaskHandle[int]) -> None:
    assert_type(await durable.get_value(handle, "v", type=Params), Params | None)
    letter: Literal["a", "b"] | None = await durable.get_value(handle, "v", type=Literal["a", "b"])
    async for letter in durable.watch_value(handle, "v", type=Literal["a", "b"]):
        assert letter
    async for item in durable.read_stream(handle, "s", type=Literal["a", "b"]):
        assert item is not None
