"""What type checkers make of `@step`: read by them, never run. The ignored lines must be errors."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, assert_type

from durable_sa import RetryStrategy, TaskContext, step


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
