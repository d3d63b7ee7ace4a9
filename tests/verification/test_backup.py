"""A backup taken while tasks run, restored elsewhere: everything in it goes on and comes to its end there."""

import asyncio
from collections.abc import Generator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable
from durable_sa.embedded import EmbeddedServer, temporary_server
from durable_sa.embedded.binaries import Binaries

from ..support import eventually
from ..worker.stories import Parts, Story, create_bookings


@pytest.fixture
def server() -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off"}) as embedded:
        yield embedded


async def test_a_backup_of_running_tasks_is_a_whole(server: EmbeddedServer) -> None:
    binaries, backup = Binaries(), server.data_dir / "backup"
    source = f"host={server.url().query['host']} port={server.url().query['port']} user=postgres"
    engine = create_async_engine(server.url())
    async with Durable(engine) as durable:
        await durable.migrate()
        await create_bookings(engine)
        story = Story(durable)
        async with durable.worker(concurrency=10, claim_timeout=1):
            spawned = await durable.spawn_many([(story.task, Parts(steps=10, pause=0.02, sleep=0.3))] * 20)
            await eventually(lambda: len(story.executed) > 60)
            await asyncio.to_thread(binaries.run, "pg_dump", "-d", f"{source} dbname=postgres", "-f", str(backup))
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=30)).output == sum(range(10))
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("CREATE DATABASE restored"))
    await engine.dispose()
    await asyncio.to_thread(binaries.run, "psql", "-q", "-d", f"{source} dbname=restored", "-f", str(backup))

    restored = create_async_engine(server.url(database="restored"))
    async with restored.connect() as connection:
        unfinished = text("SELECT count(*) FROM durable.tasks WHERE outcome IS NULL")
        assert (await connection.execute(unfinished)).scalar() > 0
    async with Durable(restored) as durable:
        story = Story(durable)
        async with durable.worker(concurrency=10, claim_timeout=1):
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=30)).output == sum(range(10))
    async with restored.connect() as connection:
        failed = text("SELECT count(*) FROM durable.tasks WHERE outcome <> 'completed' OR failures > 0")
        assert (await connection.execute(failed)).scalar() == 0
        bookings = (await connection.execute(text("SELECT key, count(*) FROM public.bookings GROUP BY 1"))).all()
    assert {tuple(row) for row in bookings} == {(str(spawn.task_id), 1) for spawn in spawned}
    await restored.dispose()
