"""What the workloads share: a case to be run in rounds, workers that come and go, and draining a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..bench import Bench
from ..catalogue import System
from ..driver import Driver
from ..server import Database

LEAST_TASKS = 20
"""A run of fewer says nothing."""


class RunError(Exception):
    """Raised when a run did not do what it was to do, so that its time means nothing."""


@dataclass(frozen=True)
class Outcome:
    """What one run of a case gave."""

    figures: dict[str, float]
    tasks: int


@dataclass(frozen=True)
class Case:
    """One variant of a workload, run in turns with all systems that offer what it needs."""

    workload: str
    variant: str
    needs: str
    run: Callable[[Bench, System], Awaitable[Outcome]]
    systems: frozenset[str] | None = None
    """The only systems it is for, if not for all."""
    once: bool = False
    """Too long for rounds."""


def share(count: int, system: System) -> int:
    """How many of so many tasks a system is given."""
    return count if system.share == 1 else max(LEAST_TASKS, int(count * system.share))


@dataclass
class Worker:
    """A driver that works, in the settings it was given."""

    driver: Driver
    settings: dict[str, Any]


@asynccontextmanager
async def client(
    bench: Bench,
    system: System,
    database: Database,
    *,
    loop: str,
    connections: int = 2,
    index: int = 0,
    **settings: Any,
) -> AsyncGenerator[Driver]:
    """A driver connected as a client."""
    driver = await bench.driver(system, loop, index)
    await driver.call("open", url=database.url, connections=connections, settings=settings)
    try:
        yield driver
    finally:
        await driver.call("close")


@asynccontextmanager
async def working(driver: Driver, database: Database, settings: dict[str, Any]) -> AsyncGenerator[None]:
    """A driver with a worker."""
    options = {key: value for key, value in settings.items() if key != "loop"}
    await driver.call("work", url=database.url, settings=options)
    try:
        yield
    finally:
        await driver.call("rest")


@dataclass(frozen=True)
class Drained:
    """A queue that was worked off."""

    seconds: float
    """From the start of the first task to the moment when the end of the last could be seen in the database."""
    tenths: list[float]


async def load(
    bench: Bench, system: System, database: Database, task: str, count: int, params: dict[str, Any], loop: str
) -> Driver:
    """Fill the queue; the driver that did, with its numbers at nothing."""
    async with client(bench, system, database, loop=loop, connections=8) as driver:
        await driver.call("forget")
        await driver.call("load", task=task, count=count, params=params)
    return driver


async def drain(
    bench: Bench,
    system: System,
    database: Database,
    settings: dict[str, Any],
    *,
    task: str = "noop",
    count: int,
    params: dict[str, Any] | None = None,
    processes: int = 1,
    replays: bool = False,
) -> Drained:
    """Load tasks, start workers, and take the time until all have ended.

    Tasks that wait are started more than once; say so by `replays`.
    """
    loop = settings["loop"]
    await load(bench, system, database, task, count, params or {}, loop)
    drivers = [await bench.driver(system, loop, index) for index in range(processes)]
    for driver in drivers[1:]:
        await driver.call("forget")
    options = {key: value for key, value in settings.items() if key != "loop"}
    await asyncio.gather(*(driver.call("work", url=database.url, settings=options) for driver in drivers))
    try:
        first = await until_ended(drivers, database, count)
        seconds = time.monotonic() - first
        started = sum([(await driver.call("progress"))["started"] for driver in drivers])
        if started != count and not replays:
            raise RunError(f"{started} starts of {count} tasks")
        tenths = await drivers[0].call("tenths") if processes == 1 else []
    finally:
        await asyncio.gather(*(driver.call("rest") for driver in drivers))
    return Drained(seconds, tenths)


async def until_ended(drivers: list[Driver], database: Database, count: int) -> float:
    """Wait until so many tasks have ended, and the database says so; when the first had started."""
    # One process knows by itself when that is; of several, only their sum tells.
    seconds = 0.5 if len(drivers) == 1 else 0.02
    while True:
        progress = await asyncio.gather(*(driver.call("until", ended=count, seconds=seconds) for driver in drivers))
        if sum(each["ended"] for each in progress) >= count:
            break
    while await database.unfinished():
        await asyncio.sleep(0.002)
    return min(each["first"] for each in progress if each["first"] is not None)


async def until_suspended(driver: Driver, system: System, database: Database, count: int) -> None:
    """Wait until so many tasks wait."""
    while (await driver.call("progress"))["waiting"] < count:
        await asyncio.sleep(0.02)
    if system.suspended is not None:
        while await database.suspended() < count:
            await asyncio.sleep(0.02)
