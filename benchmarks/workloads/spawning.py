"""Spawning: one by one, inside a transaction of the application, in bulk; and what listening workers cost it."""

from __future__ import annotations

from functools import partial

from ..bench import Bench
from ..catalogue import REFERENCE, System
from ..profiles import Profile
from .common import Case, Outcome, client, share, working

LISTENERS = "elsewhere"
"""A queue that workers listen for and nothing is spawned into: they cost hints, and no work."""


COMMITTERS = (8, 32)
"""How many commit at once where it is measured what listening workers cost them."""


async def spawn(bench: Bench, system: System, *, mode: str, spawners: int, listening: bool = False) -> Outcome:
    profile = bench.profile
    count = share(profile.bulk if mode == "bulk" else profile.spawns[spawners], system)
    loop = system.best["loop"]
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, connections=max(2, spawners)) as driver,
    ):
        # Connections are made, and statements prepared, before time is taken.
        await driver.call("spawn", mode=mode, count=2 * spawners, spawners=spawners)
        if listening:
            listener = await bench.driver(system, loop, 1)
            async with working(listener, database, {"queue_names": [LISTENERS]}):
                seconds = await driver.call("spawn", mode=mode, count=count, spawners=spawners)
        else:
            seconds = await driver.call("spawn", mode=mode, count=count, spawners=spawners)
    return Outcome({"throughput": count / seconds}, count)


def cases(profile: Profile) -> list[Case]:
    found = []
    for mode, name, needs in (("single", "one by one", "spawn"), ("session", "in a transaction", "session")):
        for spawners in profile.spawns:
            run = partial(spawn, mode=mode, spawners=spawners)
            found.append(Case("spawn", f"{name}, {spawners} at once", needs, run))
            if mode == "session" and spawners in COMMITTERS:
                # At once after the run that it is compared with, as the machine's speed changes by the minute.
                listening = partial(run, listening=True)
                variant = f"{name}, {spawners} at once, worker listening"
                found.append(Case("spawn", variant, needs, listening, systems=frozenset({REFERENCE})))
    found.append(Case("spawn", "in bulk", "bulk", partial(spawn, mode="bulk", spawners=1)))
    return found
