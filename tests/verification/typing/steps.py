"""What type checkers make of `@step`: read by them, never run. The ignored lines must be errors."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from durable_sa import RetryStrategy, TaskContext, step, transaction


@step
async def charge(order: int, *, currency: str = "EUR") -> float:
    return 1.0


@step("ship-it", max_attempts=3, retry_strategy=RetryStrategy.fixed(1), timeout=timedelta(seconds=1))
def ship(order: int) -> str:
    return ""


@step()
async def close() -> None: ...


async def calls() -> None:
    assert_type(await charge(1, currency="USD"), float)
    pending: Coroutine[Any, Any, float] = charge(1)
    await pending
    assert_type(ship(1), str)
    await close()
    assert_type(charge.name, str)
    assert_type(await charge.function(1), float)

    await charge("1")  # type: ignore[arg-type]
    await charge(1, curency="USD")  # type: ignore[call-arg]
    ship()  # type: ignore[call-arg]
    step(max_atempts=3)  # type: ignore[call-overload]
    charge.name = "other"  # type: ignore[misc]


async def through_the_context(ctx: TaskContext) -> None:
    assert_type(await ctx.step("charge", charge, 1, currency="USD"), float)
    assert_type(await ctx.step("ship", ship, 1), str)
    await ctx.step("charge", charge, "1")  # type: ignore[call-overload]


class ShopSession(AsyncSession):
    pass


class BlockingShopSession(Session):
    pass


@transaction
async def book(session: ShopSession, order: int) -> str:
    return ""


@transaction("book-it")
async def book_by_name(session: ShopSession, order: int) -> str:
    return ""


@transaction
def book_blocking(session: BlockingShopSession, order: int) -> int:
    return 1


@transaction
async def book_plainly(session: AsyncSession, order: int) -> str:
    return ""


@transaction
def book_in_any(session: Session | AsyncSession, order: int) -> int:
    return 1


@transaction  # type: ignore[arg-type]
def without_a_session(order: int) -> None: ...


async def transactions(session: ShopSession, blocking: BlockingShopSession) -> None:
    assert_type(await book(1), str)
    assert_type(await book(session, 1), str)
    assert_type(await book_by_name(1), str)
    assert_type(await book_plainly(1), str)
    assert_type(book_blocking(1), int)
    assert_type(book_in_any(1), int)
    assert_type(book_blocking(blocking, 1), int)
    await book("1")  # type: ignore[call-overload]
