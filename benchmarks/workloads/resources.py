"""The statements of idle workers, and the memory of running and sleeping tasks."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..profiles import Profile
from .common import Case, Outcome, client, drain, until, until_suspended, working

SETTLING_SECONDS = 2.0
"""Seconds between the start of a worker and the count of its statements."""


async def idle(bench: Bench, system: System, *, workers: int) -> Outcome:
    """Count the statements per second of workers with default settings and an empty queue."""
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


WARM_UP_TASKS = 20
"""Tasks that run before the measurement: enough to load all code, too few to leave much free memory behind."""


async def memory(bench: Bench, system: System, *, task: str) -> Outcome:
    """Measure the growth of a warm worker process that finds all tasks in the queue when it starts."""
    count = bench.profile.held
    settings = {**system.worker(count), "loop": "asyncio"}
    if "workers" in settings:
        # One worker claims all tasks at once. absurd does not claim again before all tasks of a claim have ended.
        settings["workers"] = 1
    # A process of an earlier run would already have the memory.
    await bench.dismiss(system)
    async with bench.server.database(system) as database:
        await drain(bench, system, database, settings, count=WARM_UP_TASKS)
        driver = await bench.driver(system, "asyncio")
        before = driver.resident_bytes
        async with client(bench, system, database, loop="asyncio", connections=8, index=1) as spawner:
            await spawner.call("load", task=task, count=count, params={})
        async with working(driver, database, settings):
            if task == "nap":
                await until_suspended(driver, system, database, count)
            else:
                await until(driver, "started", WARM_UP_TASKS + count)
            grown = driver.resident_bytes - before
            await driver.call("release")
            if task == "hold":
                await until(driver, "ended", WARM_UP_TASKS + count)
    return Outcome({"memory": grown / count / 1000}, count)


def cases(profile: Profile) -> list[Case]:
    return [
        *(
            Case("idle", f"{workers} worker{'s' if workers > 1 else ''}", "results", partial(idle, workers=workers))
            for workers in profile.idle_workers
        ),
        Case("memory", "running", "memory", partial(memory, task="hold")),
        Case("memory", "sleeping", "nap", partial(memory, task="nap")),
    ]
