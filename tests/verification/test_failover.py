"""A primary that is lost: whoever has a URL that names both servers goes on with the standby that takes its place, and
writes nothing to the old one should that come back as if nothing had happened."""

import asyncio
import random
from collections.abc import Iterator

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable, InvalidState

from ..support import eventually
from ..worker.stories import Parts, Story, create_bookings
from .proxy import Proxy
from .server import Server, private_server, promote, standby


def of_both(servers: Iterator[Server], driver: str) -> URL:
    """A URL that leads to whichever of the servers can be written to."""
    urls = [server.url("postgres") for server in servers]
    hosts = tuple(f"{url.host}:{url.port}" for url in urls)
    query = {"host": hosts, "target_session_attrs": "read-write"}
    return URL.create(f"postgresql+{driver}", "postgres", urls[0].password, database="postgres", query=query)


TABLES = ("durable.tasks", "durable.runs", "durable.checkpoints", "durable.waits", "durable.workers", "public.bookings")


async def everything_in(server: Server) -> dict[str, list[str]]:
    """All rows, as text."""
    return {
        table: [row["found"] for row in await server.sql(f"SELECT found::text AS found FROM {table} found ORDER BY 1")]
        for table in TABLES
    }


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_workers_and_clients_follow_to_the_new_primary(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    async with private_server() as primary:
        engine = create_async_engine(primary.url("postgres"))
        async with Durable(engine) as durable:
            await durable.migrate()
            await create_bookings(engine)
        await engine.dispose()
        async with standby(primary) as replica:
            await what_a_standby_says_is_not_believed(primary, replica, driver)
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
                    await eventually(
                        lambda: replica.sql(f"SELECT 1 FROM durable.workers WHERE worker_id = '{worker.worker_id}'")
                    )
                    await waiting.close()
                    if driver == "asyncpg":
                        await the_old_one_comes_back(durable, story, primary, replica, caplog)
                    last = await durable.spawn(story.task, Parts())
                    assert (await durable.wait_for_result(last, timeout=20)).output == 3
            async with engine.connect() as connection:
                rows = await connection.execute(
                    text("SELECT outcome, max(attempt), sum(failures) FROM durable.tasks GROUP BY 1")
                )
                assert rows.all() == [("completed", 1, 0)]
                bookings = await connection.execute(text("SELECT count(*), count(DISTINCT key) FROM public.bookings"))
                booked = 21 if driver == "asyncpg" else 11
                assert bookings.all() == [(booked, booked)]
            await engine.dispose()


async def what_a_standby_says_is_not_believed(primary: Server, replica: Server, driver: str) -> None:
    """By one that has been connected to the primary: it may be behind."""
    async with Proxy(*primary.address) as proxy:
        engine = create_async_engine(primary.url("postgres", proxy.port).set(drivername=f"postgresql+{driver}"))
        async with Durable(engine) as durable:
            assert await durable.count_unclaimed_ready_tasks() == 0
            proxy.target = replica.address
            proxy.cut_all()
            with pytest.raises(ConnectionError, match="leads to a standby"):
                await durable.count_unclaimed_ready_tasks()
            proxy.target = primary.address
            assert await durable.count_unclaimed_ready_tasks() == 0
        await engine.dispose()


async def the_old_one_comes_back(
    durable: Durable, story: Story, primary: Server, replica: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Writable, and first in the URL, when all connections to the new one are lost, and something is in progress."""
    begun = len(story.executed)
    spawned = await durable.spawn_many([(story.task, Parts(steps=10, pause=0.05))] * 10)
    await eventually(lambda: len(story.executed) > begun + 20)
    await primary.start()
    await primary.configure("synchronous_standby_names", None)
    before = await everything_in(primary)
    await replica.strike("pg_terminate_backend", "postgres", random.Random(1), 1.0)
    await eventually(lambda: "is not used" in caplog.text)
    with pytest.raises(ConnectionError, match="failover has left behind"):
        await durable.spawn(story.task, Parts())
    executed = len(story.executed)
    assert await everything_in(primary) == before
    await primary.stop("immediate")
    for spawn in spawned:
        assert (await durable.wait_for_result(spawn, timeout=30)).output == sum(range(10))
    assert executed < len(story.executed)
