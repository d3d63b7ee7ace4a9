"""Spawning one by one, inside a transaction of the application, and in bulk; and the cost of listening workers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from ..bench import Bench
from ..catalogue import REFERENCE, System
from ..profiles import Profile
from .common import Case, Outcome, client, share, working

LISTENERS = "elsewhere"
"""A queue without tasks: its workers receive notifications but do no work."""

COMMITTERS = (8, 32)
"""The numbers of callers that commit beside listening workers."""
BLOCKS = 10
"""Alternations between a listening worker and none, so that disturbances of the machine affect both alike."""


async def spawn(bench: Bench, system: System, *, mode: str, spawners: int) -> Outcome:
    profile = bench.profile
    count = share(profile.bulk if mode == "bulk" else profile.spawns[spawners], system)
    loop = system.best["loop"]
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, connections=max(2, spawners)) as driver,
    ):
        # Connections are opened and statements prepared before the measurement.
        await driver.call("spawn", mode=mode, count=2 * spawners, spawners=spawners)
        seconds = await driver.call("spawn", mode=mode, count=count, spawners=spawners)
    return Outcome({"throughput": count / seconds}, count)


async def spawn_beside_a_listener(bench: Bench, system: System, *, spawners: int) -> Outcome:
    """Spawn in transactions of the application, in turns with a listening worker and without one."""
    count = bench.profile.spawns[spawners] // BLOCKS
    loop = system.best["loop"]
    took = {True: 0.0, False: 0.0}
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, connections=spawners) as driver,
    ):
        await driver.call("spawn", mode="session", count=2 * spawners, spawners=spawners)
        listener = await bench.driver(system, loop, 1)
        for block in range(BLOCKS):
            for listening in (True, False) if block % 2 else (False, True):
                async with working(listener, database, {"queue_names": [LISTENERS]}) if listening else nullcontext():
                    took[listening] += await driver.call("spawn", mode="session", count=count, spawners=spawners)
    return Outcome({"throughput": BLOCKS * count / took[True], "over none": took[False] / took[True]}, BLOCKS * count)


def cases(profile: Profile) -> list[Case]:
    found = []
    for mode, name, needs in (("single", "one by one", "spawn"), ("session", "in a transaction", "session")):
        for spawners in profile.spawns:
            run = partial(spawn, mode=mode, spawners=spawners)
            found.append(Case("spawn", f"{name}, {spawners} at once", needs, run))
    found.append(Case("spawn", "in bulk", "bulk", partial(spawn, mode="bulk", spawners=1)))
    for spawners in COMMITTERS:
        run = partial(spawn_beside_a_listener, spawners=spawners)
        variant = f"in a transaction, {spawners} at once"
        found.append(Case("listener", variant, "session", run, systems=frozenset({REFERENCE})))
    return found
