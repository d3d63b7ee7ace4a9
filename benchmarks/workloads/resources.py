"""What a worker costs that has nothing to do, and what tasks cost in memory that run or sleep."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..driver import Driver
from ..profiles import Profile
from .common import Case, Outcome, client, load, share, until_suspended, working

SETTLING_SECONDS = 2.0
"""After a worker's start, before its statements are counted."""


async def idle(bench: Bench, system: System, *, workers: int) -> Outcome:
    """Statements a second on the whole server, with default settings and an empty queue."""
    profile = bench.profile
    settings = system.worker("default")
    async with bench.server.database(system) as database, AsyncExitStack() as stack:
        await database.log_statements()
        for index in range(workers):
            driver = await bench.driver(system, settings["loop"], index)
            await stack.enter_async_context(working(driver, database, settings))
        await asyncio.sleep(SETTLING_SECONDS)
        position = bench.server.log_position
        await asyncio.sleep(profile.idle_seconds)
        statements = bench.server.statements_logged(position, database.name)
    return Outcome({"statements": statements / profile.idle_seconds}, 0)


async def running(bench: Bench, system: System) -> Outcome:
    """Tasks that all run at once, each waiting for the same thing in memory."""
    count = share(bench.profile.held, system)
    settings = {**system.worker(count), "loop": "asyncio"}
    async with bench.server.database(system) as database:
        driver = await load(bench, system, database, "noop", count, {}, "asyncio")
        async with working(driver, database, settings):
            await _until(driver, "ended", count)
            before = driver.resident_bytes
            async with client(bench, system, database, loop="asyncio", index=1) as spawner:
                await spawner.call("load", task="hold", count=count, params={})
            await _until(driver, "started", 2 * count)
            grown = driver.resident_bytes - before
            await driver.call("release")
            await _until(driver, "ended", 2 * count)
    return Outcome({"memory": grown / count / 1000}, count)


async def sleeping(bench: Bench, system: System) -> Outcome:
    """Tasks that sleep for an hour."""
    count = share(bench.profile.held, system)
    settings = {**system.worker(100), "loop": "asyncio"}
    async with bench.server.database(system) as database:
        driver = await load(bench, system, database, "noop", count, {}, "asyncio")
        async with working(driver, database, settings):
            await _until(driver, "ended", count)
            before = driver.resident_bytes
            async with client(bench, system, database, loop="asyncio", index=1) as spawner:
                await spawner.call("load", task="nap", count=count, params={})
            await until_suspended(driver, system, database, count)
            grown = driver.resident_bytes - before
    return Outcome({"memory": grown / count / 1000}, count)


async def _until(driver: Driver, what: str, count: int) -> None:
    while (await driver.call("progress"))[what] < count:
        await asyncio.sleep(0.02)


def cases(profile: Profile) -> list[Case]:
    return [
        *(
            Case("idle", f"{workers} worker{'s' if workers > 1 else ''}", "results", partial(idle, workers=workers))
            for workers in profile.idle_workers
        ),
        Case("memory", "running", "memory", running),
        Case("memory", "sleeping", "nap", sleeping),
    ]
