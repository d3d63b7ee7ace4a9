"""Tasks that wait: a parent for its children, many tasks for one event."""

from __future__ import annotations

from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..profiles import Profile
from .common import Case, Outcome, drain, share, wake


async def fan_out(bench: Bench, system: System, *, children: int) -> Outcome:
    """Measure the time from the start of the parent until all tasks have ended."""
    count = share(children, system)
    settings = {**system.worker("best"), **({"children": True} if system.name == "absurd" else {})}
    async with bench.server.database(system) as database:
        drained = await drain(
            bench, system, database, settings, task="parent", count=1, params={"children": count}, replays=True
        )
    return Outcome({"throughput": count / drained.seconds}, count)


async def events(bench: Bench, system: System, *, waiters: int) -> Outcome:
    """Measure the time from the emit until all waiters have ended."""
    count = share(waiters, system)
    return Outcome({"throughput": count / await wake(bench, system, count, {})}, count)


def cases(profile: Profile) -> list[Case]:
    return [
        Case("fan-out", "1 parent, children joined", "children", partial(fan_out, children=profile.children)),
        Case("events", "waiters of one event", "events", partial(events, waiters=profile.waiters)),
    ]
