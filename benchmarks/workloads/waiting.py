"""Tasks that wait: a parent for its children, many tasks for one event."""

from __future__ import annotations

import time
from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..profiles import Profile
from .common import Case, Outcome, client, drain, load, share, until_ended, until_suspended, working


async def fan_out(bench: Bench, system: System, *, children: int) -> Outcome:
    """Measure the time from the start of the parent until all tasks have ended."""
    count = share(children, system)
    settings = {**system.worker("best"), **({"children": True} if system.name == "absurd" else {})}
    async with bench.server.database(system) as database:
        drained = await drain(
            bench, system, database, settings, task="parent", count=1, params={"children": count}, replays=True
        )
    return Outcome({"throughput": count / drained.seconds}, count)


async def wake(bench: Bench, system: System, *, waiters: int) -> Outcome:
    """Measure the time from the emit until all waiters have ended."""
    settings = system.worker("best")
    loop, count = settings["loop"], share(waiters, system)
    async with bench.server.database(system) as database:
        driver = await load(bench, system, database, "wait", count, {}, loop)
        async with working(driver, database, settings), client(bench, system, database, loop=loop, index=1) as emitter:
            await until_suspended(driver, system, database, count)
            began = time.monotonic()
            await emitter.call("emit", name="go")
            await until_ended([driver], database, count)
            seconds = time.monotonic() - began
    return Outcome({"throughput": count / seconds}, count)


def cases(profile: Profile) -> list[Case]:
    return [
        Case("fan-out", "1 parent, children joined", "children", partial(fan_out, children=profile.children)),
        Case("events", "waiters of one event", "events", partial(wake, waiters=profile.waiters)),
    ]
