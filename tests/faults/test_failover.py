"""A primary that is lost: whoever has a URL that names both servers goes on with the standby that takes its place."""

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable, InvalidState

from ..support import eventually
from ..worker.stories import Parts, Story, create_bookings
from .server import Server, private_server, promote, standby


def of_both(servers: Iterator[Server], driver: str) -> URL:
    """A URL that leads to whichever of the servers can be written to."""
    urls = [server.url("postgres") for server in servers]
    hosts = tuple(f"{url.host}:{url.port}" for url in urls)
    query = {"host": hosts, "target_session_attrs": "read-write"}
    return URL.create(f"postgresql+{driver}", "postgres", urls[0].password, database="postgres", query=query)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_workers_and_clients_follow_to_the_new_primary(driver: str) -> None:
    async with private_server() as primary:
        engine = create_async_engine(primary.url("postgres"))
        async with Durable(engine) as durable:
            await durable.migrate()
            await create_bookings(engine)
        await engine.dispose()
        async with standby(primary) as replica:
            engine = create_async_engine(of_both(iter((primary, replica)), driver))
            async with Durable(engine) as durable:
                story = Story(durable)
                # Its database takes writes only later.
                waiting = Durable(replica.url("postgres").set(drivername=f"postgresql+{driver}"))
                with pytest.raises(InvalidState, match="The database is read-only"):
                    await waiting.emit_event("early")
                worker = await waiting.start_worker()
                async with durable.worker(concurrency=10, claim_timeout=60):
                    spawned = await durable.spawn_many([(story.task, Parts(steps=20, pause=0.05))] * 10)
                    await eventually(lambda: len(story.executed) > 50)
                    await primary.stop("immediate")
                    await promote(replica)
                    for spawn in spawned:
                        assert (await asyncio.wait_for(durable.wait_for_result(spawn), 30)).output == sum(range(20))
                    assert (
                        await durable.wait_for_result(await durable.spawn(story.task, Parts()), timeout=20)
                    ).output == 3
                    await eventually(
                        lambda: replica.sql(f"SELECT 1 FROM durable.workers WHERE worker_id = '{worker.worker_id}'")
                    )
                    await waiting.close()
            async with engine.connect() as connection:
                rows = await connection.execute(
                    text("SELECT outcome, max(attempt), sum(failures) FROM durable.tasks GROUP BY 1")
                )
                assert rows.all() == [("completed", 1, 0)]
                bookings = await connection.execute(text("SELECT count(*), count(DISTINCT key) FROM public.bookings"))
                assert bookings.all() == [(11, 11)]
            await engine.dispose()
