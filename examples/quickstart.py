"""One task with two steps: spawned, run by a worker, awaited.

It uses the database of DURABLE_DATABASE_URL, else the embedded one: python examples/quickstart.py
"""

import asyncio

from pydantic import BaseModel

from durable_sa import Durable, TaskContext, task


class Question(BaseModel):
    topic: str


class Report(BaseModel):
    summary: str
    sources: list[str]


async def find_sources(topic: str) -> list[str]:
    print(f"looking for sources on {topic}")
    return [f"{topic}, volume {number}" for number in (1, 2)]


async def summarize(sources: list[str]) -> str:
    print(f"reading {len(sources)} sources")
    return f"{len(sources)} sources say: write a checkpoint after each step"


@task
async def research(ctx: TaskContext, question: Question) -> Report:
    # The result of each step is stored. After a crash the task continues after the last finished step.
    sources = await ctx.step("find-sources", find_sources, question.topic)
    summary = await ctx.step("summarize", summarize, sources)
    return Report(summary=summary, sources=sources)


async def main() -> None:
    async with Durable(queue_name="quickstart", tasks=[research]) as durable:
        await durable.migrate()
        await durable.create_queue()
        # In an application the worker is a process of its own: durable worker MODULE:DURABLE
        async with durable.worker():
            spawned = await durable.spawn(research, Question(topic="durable execution"))
            result = await durable.wait_for_result(spawned, timeout=30)
    print(f"the task has {result.status}")
    if result.output is not None:
        print(result.output.summary)


if __name__ == "__main__":
    asyncio.run(main())
