"""The shop over HTTP."""

from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import Durable, TaskRow, TaskStatus
from durable_sa.dashboard import dashboard

from .carrier import Carrier
from .models import Order, Product
from .operators import operator
from .stock import release
from .tasks import fulfil, payment_event


class NewOrder(BaseModel):
    reference: str
    sku: str
    quantity: Annotated[int, Field(gt=0)]


class Stock(BaseModel):
    stock: Annotated[int, Field(ge=0)]


class OrderView(BaseModel):
    id: int
    status: str
    tracking_code: str | None = None
    task_id: UUID | None = None
    task_state: str | None = None


def create_app(sessions: async_sessionmaker[AsyncSession], durable: Durable[Carrier]) -> FastAPI:
    app = FastAPI(title="Orders")
    app.mount("/durable", dashboard(durable, auth=operator))

    @app.put("/products/{sku}")
    async def put_product(sku: str, body: Stock) -> Stock:
        async with sessions.begin() as session:
            await session.merge(Product(sku=sku, stock=body.stock))
        return body

    @app.get("/products/{sku}")
    async def get_product(sku: str) -> Stock:
        async with sessions() as session:
            return Stock(stock=(await session.get_one(Product, sku)).stock)

    @app.post("/orders", status_code=201)
    async def create_order(body: NewOrder) -> OrderView:
        try:
            async with sessions.begin() as session:
                order = Order(**body.model_dump())
                session.add(order)
                await session.flush()  # for order.id
                spawned = await durable.spawn_with(session, fulfil, order.id)
                order.task_id = spawned.task_id
            # Both rows exist now. If the reference had been taken, the task would have been rolled back, too.
        except IntegrityError as error:
            raise HTTPException(409, "That reference is taken, or there is no such product.") from error
        return OrderView(id=order.id, status="new", task_id=order.task_id, task_state="pending")

    @app.get("/orders/{order_id}")
    async def get_order(order_id: int) -> OrderView:
        query = select(Order, TaskRow.state).outerjoin(Order.task).where(Order.id == order_id)
        async with sessions() as session:
            found = (await session.execute(query)).one_or_none()
        if found is None:
            raise HTTPException(404)
        order, state = found
        return OrderView(
            id=order.id,
            status=order.status,
            tracking_code=order.tracking_code,
            task_id=order.task_id,
            task_state=state,
        )

    @app.post("/orders/{order_id}/payment", status_code=202)
    async def pay(order_id: int) -> None:
        async with sessions.begin() as session:
            order = await locked(session, order_id)
            if order.status not in ("new", "reserved"):
                raise HTTPException(409, f"The order is {order.status}.")
            if order.status == "reserved":
                order.status = "paid"
            await durable.emit_event_with(session, payment_event(order_id))

    @app.delete("/orders/{order_id}", status_code=204)
    async def cancel(order_id: int) -> None:
        async with sessions.begin() as session:
            order = await locked(session, order_id)
            if order.task_id is None or await durable.cancel_task_with(session, order.task_id) != TaskStatus.CANCELLED:
                raise HTTPException(409, f"The order is {order.status}.")
            # From the commit on the task writes nothing more.
            await release(session, order_id, "cancelled")

    async def locked(session: AsyncSession, order_id: int) -> Order:
        order = await session.get(Order, order_id, with_for_update=True)
        if order is None:
            raise HTTPException(404)
        return order

    return app
