"""The life of an order, from its reservation to the carrier."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import Durable, RetryStrategy, TaskContext, TaskTimeout, task

from .carrier import Carrier
from .stock import mark_shipped, release, reserve

PAYMENT_DEADLINE = timedelta(days=3)


def payment_event(order_id: int) -> str:
    return f"payment of order {order_id}"


@task("fulfil-order", retry_strategy=RetryStrategy.exponential(base_delay=1, max_backoff=600))
async def fulfil(ctx: TaskContext[Carrier], order_id: int) -> str:
    """Each transaction commits with its checkpoint: however often the task is interrupted, stock is taken once."""
    if not await ctx.transaction("reserve", reserve, order_id):
        return "rejected"
    try:
        await ctx.await_event(payment_event(order_id), timeout=PAYMENT_DEADLINE)
    except TaskTimeout:
        await ctx.transaction("expire", release, order_id, "expired")
        return "expired"
    tracking_code = await ctx.step("ship", ctx.state.ship, order_id)
    await ctx.transaction("mark-shipped", mark_shipped, order_id, tracking_code)
    return "shipped"


def make_durable(
    sessions: async_sessionmaker[AsyncSession], carrier: Callable[[], AbstractAsyncContextManager[Carrier]]
) -> Durable[Carrier]:
    return Durable(sessions, lifespan=carrier, tasks=[fulfil])
