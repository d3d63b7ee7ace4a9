"""A worker of tasks that receive messages from many senders, for tests that kill it."""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import Any

from durable_sa import Durable, RetryStrategy, TaskContext, task


@task(max_attempts=1000, retry_strategy=RetryStrategy.fixed(0.05))
async def inbox(ctx: TaskContext, params: tuple[int, uuid.UUID]) -> list[Any]:
    """Receive so many messages, some of them in races, and send what came to another task."""
    count, sink = params
    received: list[Any] = []
    while len(received) < count:
        if len(received) % 5 == 0:
            race = await ctx.race("next", note=ctx.receive("note"), never=ctx.receive("never"))
            received.append(race.value)
        else:
            received.append(await ctx.receive("note"))
    await ctx.send(sink, "done", [str(ctx.task_id), received])
    return received


@task(max_attempts=1000, retry_strategy=RetryStrategy.fixed(0.05))
async def sink(ctx: TaskContext, count: int) -> list[Any]:
    """Receive what so many tasks have received."""
    return [await ctx.receive("done") for _ in range(count)]


async def main() -> None:
    async with Durable(os.environ["DURABLE_DATABASE_URL"], tasks=[inbox, sink]) as durable:
        await durable.run_worker(claim_timeout=2, concurrency=50, shutdown_timeout=0.1)


if __name__ == "__main__":
    asyncio.run(main())
