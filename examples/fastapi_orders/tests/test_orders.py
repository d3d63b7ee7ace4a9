"""Orders, from their beginning to each of their ends."""

from datetime import timedelta

from durable_sa.testing import run_until_idle, time_travel
from orders.tasks import PAYMENT_DEADLINE

from .conftest import Shop


async def test_an_order_is_reserved_paid_and_shipped(shop: Shop) -> None:
    order_id = await shop.order()
    assert await shop.status(order_id) == ("new", "pending")
    await run_until_idle(shop.durable)
    assert await shop.status(order_id) == ("reserved", "sleeping")
    assert await shop.stock() == 3

    assert (await shop.http.post(f"/orders/{order_id}/payment")).status_code == 202
    await run_until_idle(shop.durable)
    assert await shop.status(order_id) == ("shipped", "completed")
    assert shop.courier.asked == [order_id]
    assert (await shop.http.get(f"/orders/{order_id}")).json()["tracking_code"] == f"TRACK-{order_id}"
    assert (await shop.http.post(f"/orders/{order_id}/payment")).status_code == 409


async def test_a_reference_that_is_taken_makes_neither_an_order_nor_a_task(shop: Shop) -> None:
    await shop.order("A-1")
    body = {"reference": "A-1", "sku": "lamp", "quantity": 1}
    assert (await shop.http.post("/orders", json=body)).status_code == 409
    assert await shop.durable.count_unclaimed_ready_tasks() == 1


async def test_what_is_not_in_stock_is_not_sold(shop: Shop) -> None:
    order_id = await shop.order(quantity=6)
    await run_until_idle(shop.durable)
    assert await shop.status(order_id) == ("rejected", "completed")
    assert await shop.stock() == 5


async def test_an_order_that_nobody_pays_for_gives_its_stock_back(shop: Shop) -> None:
    order_id = await shop.order()
    await run_until_idle(shop.durable)
    async with time_travel(shop.durable) as clock:
        await clock.advance(PAYMENT_DEADLINE - timedelta(minutes=1))
        await run_until_idle(shop.durable)
        assert await shop.stock() == 3
        await clock.advance(timedelta(minutes=1))
        await run_until_idle(shop.durable)
    assert await shop.status(order_id) == ("expired", "completed")
    assert await shop.stock() == 5


async def test_a_cancelled_order_gives_its_stock_back(shop: Shop) -> None:
    order_id = await shop.order()
    await run_until_idle(shop.durable)
    assert (await shop.http.delete(f"/orders/{order_id}")).status_code == 204
    await run_until_idle(shop.durable)
    assert await shop.status(order_id) == ("cancelled", "cancelled")
    assert await shop.stock() == 5
    assert (await shop.http.post(f"/orders/{order_id}/payment")).status_code == 409


async def test_a_shipped_order_cannot_be_cancelled(shop: Shop) -> None:
    order_id = await shop.order()
    await shop.http.post(f"/orders/{order_id}/payment")
    await run_until_idle(shop.durable)
    assert (await shop.http.delete(f"/orders/{order_id}")).status_code == 409
    assert await shop.status(order_id) == ("shipped", "completed")


async def test_a_carrier_that_does_not_answer_is_asked_again_and_nothing_else_is(shop: Shop) -> None:
    shop.courier.failures = 2
    order_id = await shop.order()
    await shop.http.post(f"/orders/{order_id}/payment")
    async with time_travel(shop.durable) as clock:
        for _ in range(3):
            await run_until_idle(shop.durable)
            await clock.advance(timedelta(minutes=10))
    assert shop.courier.asked == [order_id] * 3
    assert await shop.status(order_id) == ("shipped", "completed")
    assert await shop.stock() == 3
