"""A worker as a process of its own, with the tasks that tests need there.

Started by `processes.WorkerProcess`: its arguments are a ledger, a file outside the database in which the tasks write
down what they do, and the worker's options as JSON.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from durable_sa import Durable, TaskContext, current_context, task
from durable_sa.worker import interrupts


class Work(BaseModel):
    steps: int = 1
    seconds: float = 0.0


ledger: str | None = None
"""Of this process; None where the tasks run in that of the tests."""


def note(what: str, **details: Any) -> None:
    """Append a line to the ledger; a line is written at once, whoever writes."""
    if ledger is None:
        return
    line = json.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **details})
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


async def perform(number: int, seconds: float) -> int:
    context = current_context()
    details = {"task": str(context.task_id), "attempt": context.attempt, "step": number}
    note("begin", **details)
    await asyncio.sleep(seconds)
    note("end", **details)
    return os.getpid()


executed: list[str] = []


@task
async def count(ctx: TaskContext) -> int:
    executed.append(str(ctx.task_id))
    return os.getpid()


@task
async def work(ctx: TaskContext, params: Work) -> list[int]:
    return [await ctx.step(f"step-{number}", perform, number, params.seconds) for number in range(params.steps)]


@task
async def block(ctx: TaskContext, seconds: float) -> int:
    """Keeps the event loop from turning."""
    note("begin", task=str(ctx.task_id), attempt=ctx.attempt)
    if ctx.attempt == 1:
        time.sleep(seconds)  # noqa: ASYNC251 - what this task is for
        note("unblocked", task=str(ctx.task_id))
    await ctx.step("after", perform, 0, 0.0)
    return os.getpid()


@task
async def die(ctx: TaskContext) -> None:
    note("begin", task=str(ctx.task_id), attempt=ctx.attempt)
    os.kill(os.getpid(), signal.SIGKILL)


@task
async def stubborn(ctx: TaskContext, seconds: float) -> None:
    """Does not end when it is cancelled."""
    note("begin", task=str(ctx.task_id), attempt=ctx.attempt)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            await asyncio.sleep(deadline - time.monotonic())
        except asyncio.CancelledError:
            note("cancelled", task=str(ctx.task_id))


def hang(seconds: float) -> None:
    context = current_context()
    note("begin", task=str(context.task_id), attempt=context.attempt)
    time.sleep(seconds)


@task
async def hung(ctx: TaskContext, seconds: float) -> None:
    """Has a step in a thread, which nothing can interrupt."""
    await ctx.step("hang", hang, seconds)


@task
async def nap(ctx: TaskContext, seconds: float) -> int:
    await ctx.sleep_for("nap", seconds)
    note("woken", task=str(ctx.task_id), attempt=ctx.attempt)
    return os.getpid()


@task
async def hoard(ctx: TaskContext, size: int) -> int:
    """Asks for so many bytes, but only in its first attempt."""
    note("begin", task=str(ctx.task_id), attempt=ctx.attempt)
    return len(bytearray(size)) if ctx.attempt == 1 else os.getpid()


@task
async def insatiable(ctx: TaskContext) -> None:
    """Swallows everything, whatever it calls."""
    note("begin", task=str(ctx.task_id), attempt=ctx.attempt)
    while True:
        with contextlib.suppress(BaseException):
            await ctx.step("nothing", asyncio.sleep, 0)


@task
async def hog(ctx: TaskContext) -> None:
    """Blocks the event loop, and swallows what its signal handlers raise."""
    note("begin", task=str(ctx.task_id), attempt=ctx.attempt)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(0.001)  # noqa: ASYNC251 - what this task is for


TASKS = (count, work, block, die, stubborn, hung, nap, hoard, insatiable, hog)


async def main(options: dict[str, Any]) -> None:
    interrupts.ENDING_TIMEOUT = options.pop("ending_timeout", interrupts.ENDING_TIMEOUT)
    async with Durable(tasks=TASKS) as durable:
        await durable.run_worker(**options)
    note("executed", count=len(executed))


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    ledger = sys.argv[1]
    assert Path(ledger).parent.is_dir()
    asyncio.run(main(json.loads(sys.argv[2])))
