"""Two versions of an application's code: the second has a step more in one task, and another name for a second task.

The former name stays registered for as long as tasks of it may be under way; the first version knows only that.
"""

from __future__ import annotations

from typing import Any

from durable_sa import Task, TaskContext, task

from .workload import TASKS, Op, book, compute


@task("grown", max_attempts=1)
async def grown_before(ctx: TaskContext, op: Op) -> list[int]:
    done = [await ctx.step("one", compute, op, "one", op.number)]
    await ctx.transaction("book", book, "book")
    await ctx.sleep_for("nap", 0.3)
    return [*done, await ctx.step("two", compute, op, "two", op.number + 1)]


@task("grown", max_attempts=1)
async def grown_since(ctx: TaskContext, op: Op) -> list[int]:
    done = [await ctx.step("one", compute, op, "one", op.number)]
    await ctx.transaction("book", book, "book")
    await ctx.sleep_for("nap", 0.3)
    done.append(await ctx.step("two", compute, op, "two", op.number + 1))
    return [*done, await ctx.step("three", compute, op, "three", op.number + 2)]


async def twice(ctx: TaskContext, op: Op) -> int:
    await ctx.step("one", compute, op, "one", op.number)
    await ctx.sleep_for("nap", 0.3)
    return await ctx.step("two", compute, op, "two", op.number)


former = task("former", max_attempts=1)(twice)
latter = task("latter", max_attempts=1)(twice)

VERSIONS: dict[int, tuple[Task[Any, Any], ...]] = {
    1: (*TASKS, grown_before, former),
    2: (*TASKS, grown_since, former, latter),
}
