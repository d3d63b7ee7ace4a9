"""The grants of the page on deployment are enough for what it says."""

import re
import secrets
from collections.abc import AsyncGenerator
from typing import NamedTuple

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, TaskContext, task

from .snippets import DOCS, blocks

PAGE = DOCS / "guides/deploying.md"


class Roles(NamedTuple):
    owner: AsyncEngine
    worker: AsyncEngine
    spawner: AsyncEngine


def acting_as(role: str, url: URL) -> AsyncEngine:
    return create_async_engine(url, connect_args={"server_settings": {"role": role}})


@pytest.fixture
async def roles(database_url: URL) -> AsyncGenerator[Roles]:
    (script,) = [block.text for block in blocks(PAGE) if block.language == "sql"]
    sentence = re.search(r"only calls\s`spawn_with`\sneeds\s(.*?)\.\n", PAGE.read_text(), re.DOTALL)
    assert sentence is not None
    rights = re.findall(r"`([A-Z, and`]+)` on `(durable\.\w+)`", sentence[1].replace("\n", " "))
    worker, spawner = (f"docs_{kind}_{secrets.token_hex(4)}" for kind in ("worker", "spawner"))
    owner = create_async_engine(database_url)
    async with owner.begin() as connection:
        statements = [part.strip() for part in script.replace("shop_worker", worker).split(";") if part.strip()]
        statements += [f"CREATE ROLE {spawner}", f"GRANT USAGE ON SCHEMA durable TO {spawner}"]
        assert [table for _, table in rights] == ["durable.tasks", "durable.queues"]
        for words, table in rights:
            statements.append(f"GRANT {', '.join(re.findall('[A-Z]+', words))} ON {table} TO {spawner}")
        for statement in statements:
            await connection.execute(text(statement))
    engines = Roles(owner, acting_as(worker, database_url), acting_as(spawner, database_url))
    yield engines
    for engine in engines[1:]:
        await engine.dispose()
    async with owner.begin() as connection:
        for role in (worker, spawner):
            await connection.execute(text(f"DROP OWNED BY {role}"))
            await connection.execute(text(f"DROP ROLE {role}"))
    await owner.dispose()


@task
async def parent(ctx: TaskContext, number: int) -> int:
    await ctx.emit_event(f"begun:{number}")
    await ctx.sleep_for("a moment", 0.01)
    child = await ctx.spawn("child", double, number)
    return await ctx.join(child) + await ctx.transaction("one", one)


@task
async def double(ctx: TaskContext, number: int) -> int:
    return 2 * number


async def one(session: AsyncSession) -> int:
    return 1


async def test_a_worker_gets_along_with_its_grants(roles: Roles) -> None:
    async with Durable(roles.worker, tasks=[parent, double]) as durable:
        await durable.create_queue("another", retention=3600)
        await durable.create_schedule("nightly", task=parent, params=1, cron_expression="0 3 * * *")
        async with durable.worker(queue_names=["default", "another"]):
            spawned = await durable.spawn(parent, 4, queue_name="another")
            assert (await durable.wait_for_result(spawned, timeout=20)).output == 9
        await durable.cancel_task(await durable.spawn(parent, 5))
        assert await durable.cleanup_tasks(0, queue_name="another") == 2
        await durable.drop_queue("another")


async def test_spawn_with_gets_along_with_less(roles: Roles) -> None:
    durable = Durable(tasks=[parent])
    for created in (True, False):
        async with AsyncSession(roles.spawner) as session, session.begin():
            spawned = await durable.spawn_with(session, parent, 1, idempotency_key="one", headers={"tenant": "x"})
            assert spawned.created is created
