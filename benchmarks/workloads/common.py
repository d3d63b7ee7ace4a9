"""The parts that the workloads share: cases, clients, workers, and draining a queue."""

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
"""The least number of tasks of a slow system: the figures of fewer vary too much."""


class RunError(Exception):
    """Raised when a run did not process its tasks as expected, so that its time is meaningless."""


@dataclass(frozen=True)
class Outcome:
    """The figures of one run of a case, by metric."""

    figures: dict[str, float]
    tasks: int


@dataclass(frozen=True)
class Case:
    """One variant of a workload, which runs with all systems that offer the ability it `needs`."""

    workload: str
    variant: str
    needs: str
    run: Callable[[Bench, System], Awaitable[Outcome]]
    systems: frozenset[str] | None = None
    """The names of the only systems to run it with; None for all."""
    once: bool = False
    """True if the case runs once instead of in rounds, because it takes long."""


def share(count: int, system: System) -> int:
    """Return the number of tasks that a system is given of `count`."""
    return count if system.share == 1 else max(LEAST_TASKS, int(count * system.share))


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
    """Connect a driver as a client."""
    driver = await bench.driver(system, loop, index)
    await driver.call("open", url=database.url, connections=connections, settings=settings)
    try:
        yield driver
    finally:
        await driver.call("close")


@asynccontextmanager
async def working(driver: Driver, database: Database, settings: dict[str, Any]) -> AsyncGenerator[None]:
    """Run a worker in a driver."""
    options = {key: value for key, value in settings.items() if key != "loop"}
    await driver.call("work", url=database.url, settings=options)
    try:
        yield
    finally:
        await driver.call("rest")


@dataclass(frozen=True)
class Drained:
    """The times of a drained queue."""

    seconds: float
    """Seconds from the start of the first task until the database shows the last one as ended."""
    tenths: list[float]
    """The times at which each tenth of the tasks had ended; empty for several processes."""


async def load(
    bench: Bench, system: System, database: Database, task: str, count: int, params: dict[str, Any], loop: str
) -> Driver:
    """Fill the queue; return the driver that filled it, with its counters reset."""
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
    """Load tasks, start workers, and measure the time until all tasks have ended.

    With `replays`, tasks may start more than once, as they do when they wait.

    Raises:
        RunError: the number of starts differs from `count`.
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
    """Wait until `count` tasks have ended according to the database; return the start of the first one."""
    # A single driver returns as soon as it has counted them all; several have to be polled for their sum.
    seconds = 0.5 if len(drivers) == 1 else 0.02
    while True:
        progress = await asyncio.gather(*(driver.call("until", ended=count, seconds=seconds) for driver in drivers))
        if sum(each["ended"] for each in progress) >= count:
            break
    while await database.unfinished():
        await asyncio.sleep(0.002)
    return min(each["first"] for each in progress if each["first"] is not None)


async def until(driver: Driver, what: str, count: int) -> None:
    """Wait until a driver's number of tasks that have `started`, `ended` or are `waiting` is at least `count`."""
    while (await driver.call("progress"))[what] < count:
        await asyncio.sleep(0.02)


async def until_suspended(driver: Driver, system: System, database: Database, count: int) -> None:
    """Wait until `count` tasks are waiting."""
    await until(driver, "waiting", count)
    if system.suspended is not None:
        while await database.suspended() < count:
            await asyncio.sleep(0.02)


async def wake(bench: Bench, system: System, count: int, params: dict[str, Any]) -> float:
    """Return the seconds from the emit of an event until `count` tasks that wait for it have ended."""
    settings = system.worker("best")
    loop = settings["loop"]
    async with bench.server.database(system) as database:
        driver = await load(bench, system, database, "wait", count, params, loop)
        async with working(driver, database, settings), client(bench, system, database, loop=loop, index=1) as emitter:
            await until_suspended(driver, system, database, count)
            began = time.monotonic()
            await emitter.call("emit", name="go")
            await until_ended([driver], database, count)
            return time.monotonic() - began
