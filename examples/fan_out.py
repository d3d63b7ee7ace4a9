"""Many pieces of work at once, as steps of one task and as subtasks on all workers.

It uses the database of DURABLE_DATABASE_URL, else the embedded one: python examples/fan_out.py
"""

import asyncio

from durable_sa import ChildFailed, Durable, TaskContext, UserError, task

BOOKS = {
    "emma": ["Emma Woodhouse, handsome, clever, and rich", "with a comfortable home and happy disposition"],
    "persuasion": ["Sir Walter Elliot, of Kellynch Hall", "in Somersetshire"],
    "sanditon": [],
}


async def count_words(page: str) -> int:
    return len(page.split())


@task
async def count_book(ctx: TaskContext, title: str) -> int:
    """Count the words of a book. Its pages are steps: they run concurrently, and each result is stored at once."""
    pages = BOOKS[title]
    if not pages:
        raise UserError(f"{title} has no pages")
    return sum(await asyncio.gather(*(ctx.step("count-words", count_words, page) for page in pages)))


@task
async def count_library(ctx: TaskContext, titles: list[str]) -> dict[str, int | str]:
    """Count the words of all books. Each is a subtask on any free worker; this task holds none while it waits."""
    children = [await ctx.spawn("count", count_book, title) for title in titles]
    counts: dict[str, int | str] = {}
    for title, child in zip(titles, children, strict=True):
        try:
            counts[title] = await ctx.join(child)
        except ChildFailed as error:
            counts[title] = error.message
    return counts


async def main() -> None:
    async with Durable(queue_name="library", tasks=[count_library, count_book]) as durable:
        await durable.migrate()
        await durable.create_queue()
        async with durable.worker(concurrency=8):
            spawned = await durable.spawn(count_library, list(BOOKS))
            result = await durable.wait_for_result(spawned, timeout=30)

            # Without a parent: all of them or none are spawned, with one statement.
            each = await durable.spawn_many([(count_book, title) for title in ("emma", "persuasion")])
            alone = [await durable.wait_for_result(book, timeout=30) for book in each]

    for title, count in (result.output or {}).items():
        print(f"{title}: {count}")
    print(f"in all: {sum(book.output or 0 for book in alone)} words")


if __name__ == "__main__":
    asyncio.run(main())
