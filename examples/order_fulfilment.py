"""An order waits for its payment, then is shipped by a subtask for each parcel.

It uses the database of DURABLE_DATABASE_URL, else the embedded one: python examples/order_fulfilment.py
"""

import asyncio
import uuid

from pydantic import BaseModel

from durable_sa import Durable, TaskContext, UserError, task


class Order(BaseModel):
    order_id: uuid.UUID
    customer: str
    items: list[str]
    price: int


class Payment(BaseModel):
    amount: int


class Parcel(BaseModel):
    customer: str
    item: str


async def reserve(items: list[str]) -> None:
    print(f"reserving {', '.join(items)}")


async def hand_over(item: str) -> str:
    return f"tracking-{item}"


@task(max_attempts=3)
async def ship(ctx: TaskContext, parcel: Parcel) -> str:
    """Send one parcel: a subtask, with retries and checkpoints of its own."""
    return await ctx.step("hand-over", hand_over, parcel.item)


@task
async def fulfil(ctx: TaskContext, order: Order) -> list[str]:
    await ctx.step("reserve", reserve, order.items)

    # Nothing is held while the task waits, be it for a second or a month: no worker, no connection.
    payment = await ctx.await_event(f"paid:{order.order_id}", timeout=30 * 24 * 3600, type=Payment)
    if payment.amount < order.price:
        raise UserError({"message": "The payment is too low", "missing": order.price - payment.amount})

    parcels = [Parcel(customer=order.customer, item=item) for item in order.items]
    children = [await ctx.spawn("ship", ship, parcel) for parcel in parcels]
    return list(await asyncio.gather(*(ctx.join(child) for child in children)))


async def main() -> None:
    ada = Order(order_id=uuid.uuid4(), customer="Ada", items=["lamp", "desk"], price=120)
    bob = Order(order_id=uuid.uuid4(), customer="Bob", items=["chair"], price=80)

    async with Durable(queue_name="orders", tasks=[fulfil, ship]) as durable:
        await durable.migrate()
        await durable.create_queue()
        for order, amount in ((ada, 120), (bob, 50)):
            # The key makes a repeated request harmless: an order is fulfilled once.
            spawned = await durable.spawn(fulfil, order, idempotency_key=str(order.order_id))
            again = await durable.spawn(fulfil, order, idempotency_key=str(order.order_id))
            print(f"{order.customer} orders; asking again spawns a second task: {again.created}")

            # The event may come before or after the task waits for it.
            await durable.emit_event(f"paid:{order.order_id}", Payment(amount=amount))
            print(f"{order.customer} pays {amount}")

            async with durable.worker(concurrency=10):
                result = await durable.wait_for_result(spawned, timeout=30)
            if result.error is None:
                print(f"{order.customer} gets {', '.join(result.output or [])}")
            else:
                print(f"{order.customer} gets nothing: {result.error.message} ({result.error.raw['missing']} missing)")


if __name__ == "__main__":
    asyncio.run(main())
