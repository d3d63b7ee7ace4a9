"""Workers that are killed at every point where they talk to the database: `python -m tests.verification.crashes.crashing`.

One process imports everything and forks a worker for each point, so that hundreds of kills take seconds.
"""

import asyncio
import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, SyncTaskContext, TaskContext, TaskTimeout, current_context, step, task

SIDE_BY_SIDE = 3


class Process:
    """This one: where it writes, and when it is killed."""

    ledger = Path(os.devnull)
    """Outside of the database: a line for each execution of a plain step."""
    countdown = 0
    """How many points there are from the beginning of the task to the one where the process is killed. 0 is never."""
    counting = False

    @classmethod
    def pass_point(cls, *_: Any) -> None:
        if cls.counting and cls.countdown:
            cls.countdown -= 1
            if not cls.countdown:
                os.kill(os.getpid(), signal.SIGKILL)


def note(what: str) -> None:
    with Process.ledger.open("a") as file:
        file.write(f"{current_context().task_id} {what}\n")


@step
async def plain(value: int) -> int:
    note("plain")
    return value + 1


@step
def threaded(value: int) -> int:
    note("threaded")
    return value + 2


async def write(session: AsyncSession, value: int) -> int:
    """Gives back what only the commit that counts can have written."""
    statement = text("INSERT INTO ledger (task_id, what) VALUES (:task_id, :what) RETURNING id")
    task_id = current_context().task_id
    return (await session.execute(statement, {"task_id": task_id, "what": f"write {value}"})).scalar_one()


@task(max_attempts=1)
async def child(ctx: TaskContext, params: int) -> int:
    return await ctx.transaction("write", write, params)


@task(max_attempts=1)
async def work(ctx: TaskContext, params: int) -> list[Any]:
    """Does a bit of everything. No crash is a failure of it, and none may change what it comes to."""
    Process.counting = True
    found: list[Any] = [await plain(params), await ctx.transaction("write", write, 1)]
    await ctx.sleep_for("nap", 0.005)
    handle = await ctx.spawn("child", child, 7)
    found.append(await ctx.join(handle))
    await ctx.emit_event(f"event-{ctx.task_id}", params)
    found.append(await ctx.await_event(f"event-{ctx.task_id}"))
    try:
        await ctx.await_event(f"never-{ctx.task_id}", timeout=0.005)
    except TaskTimeout:
        found.append("timeout")
    found += await asyncio.gather(plain(params), ctx.transaction("write", write, 2), ctx.rand())
    return found


@task(max_attempts=1)
def plain_work(ctx: SyncTaskContext, params: int) -> list[Any]:
    """The same in a thread."""
    Process.counting = True
    found: list[Any] = [threaded(params), ctx.transaction("write", lambda session: _write(session))]
    ctx.sleep_for("nap", 0.005)
    found.append(ctx.join(ctx.spawn("child", child, 7)))
    return [*found, ctx.rand()]


def _write(session: Any) -> int:
    statement = text("INSERT INTO ledger (task_id, what) VALUES (:task_id, 'write 1') RETURNING id")
    return int(session.execute(statement, {"task_id": current_context().task_id}).scalar_one())


TASKS = (work, plain_work, child)


async def run(engine: AsyncEngine, queue_name: str, task_id: str) -> None:
    async with Durable(engine, tasks=TASKS, queue_name=queue_name) as durable, durable.worker(concurrency=4):
        await durable.wait_for_result(uuid.UUID(task_id), timeout=20)


async def warm_up(engine: AsyncEngine) -> None:
    """Have all statements compiled once, instead of in each process."""
    async with Durable(engine, tasks=TASKS, queue_name="warm-up") as durable:
        await durable.create_queue()
        async with durable.worker():
            for each in (work, plain_work):
                await durable.wait_for_result(await durable.spawn(each, 0), timeout=20)
        await durable.drop_queue()
    await engine.dispose()


def fork(engine: AsyncEngine, queue_name: str, task_id: str, countdown: int) -> int:
    """A worker that is killed at one point."""
    if (pid := os.fork()) != 0:
        return pid
    Process.countdown = countdown
    for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
        event.listen(Engine, name, Process.pass_point)
    try:
        asyncio.run(run(engine, queue_name, task_id))
    except BaseException as error:  # noqa: BLE001 - this is a process of its own
        sys.stderr.write(f"{queue_name}: {error!r}\n")
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Read lists of (queue, task, point) from standard input, and write how each of these processes has ended."""
    engine, Process.ledger = create_async_engine(sys.argv[1]), Path(sys.argv[2])
    asyncio.run(warm_up(engine))
    Process.counting = False
    for line in sys.stdin:
        waiting = json.loads(line)
        running: list[int] = []
        ended: dict[int, int] = {}
        for queue_name, task_id, countdown in waiting:
            if len(running) - len(ended) == SIDE_BY_SIDE:
                pid, status = os.wait()
                ended[pid] = status
            running.append(fork(engine, queue_name, task_id, countdown))
        while len(ended) < len(running):
            pid, status = os.wait()
            ended[pid] = status
        statuses = [os.waitstatus_to_exitcode(ended[pid]) for pid in running]
        sys.stdout.write(json.dumps(statuses) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
