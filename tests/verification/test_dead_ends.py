"""A worker whose connections are dead ends ends all the same: within its shutdown_timeout and 30 seconds of SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import URL

from durable_sa import Durable

from ..support import eventually
from ..worker import program
from ..worker.conftest import Ledger, Rows, Start, ledger, observer, sql, start_process
from .proxy import Proxy

__all__ = ["ledger", "observer", "sql", "start_process"]


@pytest.fixture
async def proxy(database_url: URL) -> AsyncGenerator[Proxy]:
    host = database_url.host or str(database_url.query["host"])
    port = database_url.port or int(str(database_url.query.get("port", 5432)))
    async with Proxy(host, port) as proxy:
        yield proxy


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("state", ["idle", "busy", "starting"])
async def test_a_worker_of_dead_ends_ends(
    durable: Durable,
    database_url: URL,
    proxy: Proxy,
    start_process: Start,
    ledger: Ledger,
    sql: Rows,
    driver: str,
    state: str,
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=proxy.port, query={})
    if state == "starting":
        proxy.stall()
    process = await start_process(
        "one", wait=state != "starting", url=url, shutdown_timeout=1.0, claim_timeout=6, concurrency=4
    )
    if state == "busy":
        await durable.spawn_many([(program.work, program.Work(steps=50, seconds=0.05))] * 40)
        await eventually(lambda: len(ledger.entries("end")) > 20)
    elif state == "idle":
        await eventually(lambda: proxy.seen > 10)
    else:
        await eventually(lambda: proxy.waiting)
    proxy.stall()
    process.send(signal.SIGTERM)
    await process.exit_code(31)
