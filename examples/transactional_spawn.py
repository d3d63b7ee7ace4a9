"""A row and the task that works on it, in one transaction: both exist, or neither.

It uses the database of DURABLE_DATABASE_URL, else the embedded one: python examples/transactional_spawn.py
"""

import asyncio

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from durable_sa import Durable, TaskContext, task


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "example_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    status: Mapped[str] = mapped_column(default="new")


async def mark_packed(session: AsyncSession, order_id: int) -> str:
    order = await session.get_one(Order, order_id)
    order.status = "packed"
    return order.item


@task
async def pack(ctx: TaskContext, order_id: int) -> str:
    # The change of the order commits together with the checkpoint of this step: it happens exactly once.
    item = await ctx.transaction("mark-packed", mark_packed, order_id)
    return f"packed: {item}"


async def main() -> None:
    durable = Durable(queue_name="packing", tasks=[pack])
    sessions = async_sessionmaker(durable.engine)
    async with durable:
        await durable.migrate()
        await durable.create_queue()
        async with durable.engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)

        async with sessions.begin() as session:
            order = Order(item="lamp")
            session.add(order)
            await session.flush()
            spawned = await durable.spawn_with(session, pack, order.id)
            print(f"before the commit nobody can see the task: {await durable.get_task_result(spawned)}")

        async with sessions() as session:
            order = Order(item="desk")
            session.add(order)
            await session.flush()
            lost = await durable.spawn_with(session, pack, order.id)
            await session.rollback()
        print(f"after a rollback there is no task either: {await durable.get_task_result(lost)}")

        async with durable.worker():
            result = await durable.wait_for_result(spawned, timeout=30)
        print(result.output)

        async with sessions() as session:
            for order in await session.scalars(select(Order)):
                print(f"order {order.id}: {order.item} is {order.status}")
        async with durable.engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


if __name__ == "__main__":
    asyncio.run(main())
