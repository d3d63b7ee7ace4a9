"""Changes of orders and of the stock, in the transaction of the caller."""

from sqlalchemy.ext.asyncio import AsyncSession

from .models import Order, Product


async def reserve(session: AsyncSession, order_id: int) -> bool:
    """Take what was ordered out of the stock, if there is enough."""
    order = await session.get_one(Order, order_id, with_for_update=True)
    product = await session.get_one(Product, order.sku, with_for_update=True)
    if product.stock < order.quantity:
        order.status = "rejected"
        return False
    product.stock -= order.quantity
    order.status = "reserved"
    return True


async def release(session: AsyncSession, order_id: int, status: str) -> None:
    """Put back what was reserved."""
    order = await session.get_one(Order, order_id, with_for_update=True)
    if order.status in ("reserved", "paid"):
        product = await session.get_one(Product, order.sku, with_for_update=True)
        product.stock += order.quantity
    order.status = status


async def mark_shipped(session: AsyncSession, order_id: int, tracking_code: str) -> None:
    order = await session.get_one(Order, order_id, with_for_update=True)
    order.status = "shipped"
    order.tracking_code = tracking_code
