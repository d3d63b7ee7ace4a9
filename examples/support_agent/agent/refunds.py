"""Refunds: what may be refunded, and the payment, in the transaction of the caller."""

from sqlalchemy.ext.asyncio import AsyncSession

from .models import Order


async def refusal(session: AsyncSession, customer: str, order_id: int, cents: int) -> str | None:
    """Return why a refund is impossible, or None. The order is locked until the transaction ends."""
    order = await session.get(Order, order_id, with_for_update=True)
    if order is None or order.customer != customer:
        return f"There is no order {order_id} of this customer."
    left = order.cents - order.refunded
    return None if cents <= left else f"Only {left} cents of order {order_id} can be refunded."


async def pay_back(session: AsyncSession, customer: str, order_id: int, cents: int) -> str:
    """Refund a part of an order. A second call would pay a second time."""
    if reason := await refusal(session, customer, order_id, cents):
        return reason
    order = await session.get_one(Order, order_id)
    order.refunded += cents
    return f"{cents} cents of order {order_id} are refunded."
