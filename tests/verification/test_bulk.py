"""Many tasks at once, beside a fleet at work: a command that is killed and given again ends right; pages miss nothing."""

import asyncio
import os
import signal
import sys
import uuid
from typing import Literal

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, select

from durable_sa import BulkResult, Durable, Spawn, TaskContext, TaskFilter, TaskRow, task
from durable_sa.models import Checkpoint, RunRow
from tests.support import eventually

TASKS = 10_500
"""More than a page of ids."""
UNSERVED = "unserved"


@task
async def wait(ctx: TaskContext) -> None: ...


@task
async def pass_by(ctx: TaskContext) -> None:
    await ctx.step("nothing", nothing)


async def nothing() -> None: ...


async def spawn(durable: Durable, number: int) -> set[uuid.UUID]:
    spawns = [Spawn(wait, queue_name=UNSERVED) for _ in range(number)]
    return {each.task_id for each in await durable.spawn_many(spawns)}


async def come_and_go(durable: Durable) -> None:
    """Spawn, run and delete other tasks until cancelled."""
    while True:
        spawned = await durable.spawn_many([Spawn(pass_by) for _ in range(10)])
        for each in spawned:
            await durable.wait_for_result(each, timeout=60)
        await durable.delete_tasks(TaskFilter(task_name="pass_by", state="completed"))


async def count(durable: Durable, *conditions: sa.ColumnElement[bool]) -> int:
    async with durable.engine.connect() as connection:
        statement = select(sa.func.count()).select_from(TaskRow).where(*conditions)
        return (await connection.scalars(statement)).one()


async def command(url: URL, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "durable_sa.cli", "tasks", *arguments),
        env={**os.environ, "DURABLE_DATABASE_URL": url.render_as_string(hide_password=False)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.timeout(400)  # it changes ten thousand tasks five times
async def test_commands_that_are_killed_go_on_when_they_are_repeated(durable: Durable, database_url: URL) -> None:
    for each in (wait, pass_by):
        durable.register(each)
    await durable.create_queue(UNSERVED)
    chosen = await spawn(durable, TASKS)
    others = {
        each.task_id for each in await durable.spawn_many([Spawn(pass_by, queue_name=UNSERVED) for _ in range(1000)])
    }
    unfinished, cancelled = TaskRow.finished_at.is_(None), TaskRow.outcome == "cancelled"
    async with durable.worker(concurrency=5):
        beside = asyncio.create_task(come_and_go(durable))
        for action, is_done in (("cancel", cancelled), ("retry", unfinished)):
            state = "cancelled" if action == "retry" else "pending"
            arguments = (action, "--all", "--name", "wait", "--state", state)
            killed = await command(database_url, *arguments)

            async def has_begun(is_done: sa.ColumnElement[bool] = is_done) -> bool:
                return await count(durable, TaskRow.task_name == "wait", is_done) > 1000

            await eventually(has_begun, within=60)
            killed.send_signal(signal.SIGKILL)
            printed, _ = await killed.communicate()
            done = await count(durable, TaskRow.task_name == "wait", is_done)
            assert 1000 < done < TASKS, "it was killed too late"
            # What was printed was done.
            printed_ids = {uuid.UUID(line) for line in printed.decode().splitlines()[:-1]}
            assert printed_ids <= chosen

            repeated = await command(database_url, *arguments)
            printed, errors = await repeated.communicate()
            assert repeated.returncode == 0, errors
            rest = {uuid.UUID(line) for line in printed.decode().split() if "-" in line}
            assert len(rest) == TASKS - done
            assert rest.isdisjoint(printed_ids)
            assert await count(durable, TaskRow.task_name == "wait", is_done) == TASKS
        assert not beside.done()
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
    assert await count(durable, TaskRow.task_id.in_(others), unfinished) == len(others)
    assert await durable.cancel_tasks(TaskFilter("wait")) == BulkResult(TASKS, TASKS, 0)
    assert await durable.delete_tasks(TaskFilter("wait")) == BulkResult(TASKS, TASKS, 0)
    await durable.cancel_tasks(TaskFilter("pass_by", "default"))
    await durable.delete_tasks(TaskFilter("pass_by", "default"))
    async with durable.engine.connect() as connection:
        left = {row.task_id for row in await connection.execute(select(TaskRow.task_id))}
        assert left == others
        for table in (RunRow, Checkpoint):
            assert (await connection.scalars(select(sa.func.count()).select_from(table))).one() == 0


async def test_pages_have_each_task_once_beside_a_fleet_at_work(durable: Durable) -> None:
    for each in (wait, pass_by):
        durable.register(each)
    await durable.create_queue(UNSERVED)
    stay = await spawn(durable, 1500)
    async with durable.worker(concurrency=5):
        beside = asyncio.create_task(come_and_go(durable))
        for number in range(4):
            stay |= await spawn(durable, 20)
            where = None if number % 2 else TaskFilter(state=["pending", "running", "completed"])
            order: Literal["newest", "oldest"] = "newest" if number % 4 < 2 else "oldest"
            found: list[uuid.UUID] = []
            page = await durable.list_tasks(where, order=order, limit=43)
            found += [item.task_id for item in page.items]
            while page.next is not None:
                page = await durable.list_tasks(where, order=order, limit=43, after=page.next)
                found += [item.task_id for item in page.items]
            assert len(found) == len(set(found))
            assert stay <= set(found)
            assert found == sorted(found, reverse=order == "newest")
        assert not beside.done()
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
