"""A worker of tasks that write a stream in many steps, for tests that kill it."""

from __future__ import annotations

import asyncio
import os

from durable_sa import Durable, RetryStrategy, TaskContext, current_context, task
from durable_sa.ids import new_id

CHAPTERS = 3
LINES = 500


@task(max_attempts=1000, max_lost_workers=1000, retry_strategy=RetryStrategy.fixed(0.05))
async def tell(ctx: TaskContext) -> None:
    """Write chapter after chapter, each in a step, and the last line in the task's body."""
    for number in range(CHAPTERS):
        await ctx.step("chapter", chapter, number)
    async with ctx.stream("story") as stream:
        await stream.write([CHAPTERS, str(new_id()), 0])


async def chapter(number: int) -> None:
    """Write lines with the number of the chapter, an id of this try, and the number of the line."""
    author = str(new_id())
    async with current_context().stream("story", keep_open=True) as stream:
        for line in range(LINES):
            await stream.write([number, author, line])
            await asyncio.sleep(0.002)


async def main() -> None:
    async with Durable(os.environ["DURABLE_DATABASE_URL"], tasks=[tell]) as durable:
        await durable.run_worker(claim_timeout=3, concurrency=20, shutdown_timeout=0.1)


if __name__ == "__main__":
    asyncio.run(main())
