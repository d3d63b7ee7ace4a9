"""The latency of one task at a time on an idle system, from its spawn to its start and to its result."""

from __future__ import annotations

from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..profiles import Profile
from ..results import percentile
from .common import Case, Outcome, client, working


async def ping(bench: Bench, system: System, *, variant: str) -> Outcome:
    """Spawn from one process and work in another."""
    profile = bench.profile
    settings = dict(system.default if variant == "default" else system.quick)
    loop, pause = settings["loop"], max(0.05, system.default_poll if variant == "default" else 0.0)
    waits = {key: settings.pop(key) for key in ("result_poll", "debounce") if key in settings}
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, **waits) as driver,
    ):
        worker = await bench.driver(system, loop, 1)
        await worker.call("forget")
        async with working(worker, database, settings):
            await driver.call("ping", count=3, pause=0.0, seconds=profile.ping_seconds)
            await worker.call("numbered")
            times = await driver.call("ping", count=profile.pings, pause=pause, seconds=profile.ping_seconds)
            started = {int(number): when for number, when in (await worker.call("numbered")).items()}
    spawned, ended = times["spawned"], times["ended"]
    starts = [started[number] - when for number, when in enumerate(spawned)]
    results = [end - begin for begin, end in zip(spawned, ended, strict=True)]
    return Outcome(
        {
            f"{name} p{share}": 1000 * percentile(values, share / 100)
            for name, values in (("start", starts), ("result", results))
            for share in (50, 99)
        },
        len(ended),
    )


def cases(profile: Profile) -> list[Case]:
    return [
        Case("latency", name, "results", partial(ping, variant=variant))
        for variant, name in (("default", "default settings"), ("quick", "best settings"))
    ]
