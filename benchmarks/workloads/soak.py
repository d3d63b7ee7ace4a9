"""A long run at half of the highest rate, with the growth of tables, memory, connections and latency."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..bench import Bench
from ..catalogue import REFERENCE, System
from ..driver import Driver
from ..profiles import Profile
from ..results import percentile
from ..server import Database
from .common import Case, Outcome, client, until, working

WARM_UP_TASKS = 2_000


async def soak(bench: Bench, system: System) -> Outcome:
    """Spawn tasks one by one at a fixed rate, even if the worker falls behind."""
    profile = bench.profile
    settings = system.worker("best")
    loop = settings["loop"]
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, connections=8) as spawner,
    ):
        worker = await bench.driver(system, loop, 1)
        await worker.call("forget")
        async with working(worker, database, settings):
            rate = await _highest_rate(spawner, worker) / 2
            series = await _run(profile, database, spawner, worker, rate)
    bench.results.series["soak"] = series
    first, last = series[0], series[-1]
    tasks = int(rate * profile.soak_seconds)
    return Outcome(
        {
            "rate": rate,
            "start p50": percentile([point["p50"] for point in series], 0.5),
            "start p99": percentile([point["p99"] for point in series], 0.5),
            "database growth": (last["bytes"] - first["bytes"]) / max(1, last["spawned"] - first["spawned"]) / 1000,
            "resident growth": (last["resident"] - first["resident"]) / 1e6,
            "connections": max(point["connections"] for point in series),
        },
        tasks,
    )


async def _highest_rate(spawner: Driver, worker: Driver) -> float:
    """Return the tasks per second that eight callers can spawn, one commit each, while a worker runs them."""
    began = time.monotonic()
    await spawner.call("spawn", mode="single", count=WARM_UP_TASKS, spawners=8)
    await until(worker, "ended", WARM_UP_TASKS)
    return WARM_UP_TASKS / (time.monotonic() - began)


async def _run(
    profile: Profile, database: Database, spawner: Driver, worker: Driver, rate: float
) -> list[dict[str, float]]:
    series: list[dict[str, float]] = []
    began = time.monotonic()
    spawned = 0
    while time.monotonic() - began < profile.soak_seconds:
        times = await spawner.call("stream", rate=rate, seconds=profile.soak_sample, first=spawned)
        when = {spawned + number: at for number, at in enumerate(times["spawned"])}
        spawned += len(when)
        waits = await _starts(worker, when)
        series.append(
            {
                "seconds": time.monotonic() - began,
                "spawned": spawned,
                "p50": 1000 * percentile(waits, 0.5),
                "p99": 1000 * percentile(waits, 0.99),
                "resident": worker.resident_bytes,
                **await _size(database),
            }
        )
    return series


async def _starts(worker: Driver, when: dict[int, float]) -> list[float]:
    """Wait until these tasks have started; return the delay of each."""
    started: dict[int, float] = {}
    while len(started) < len(when):
        await asyncio.sleep(0.01)
        started |= {int(number): at for number, at in (await worker.call("numbered")).items()}
    # The probe's times of millions of tasks would be counted as the system's memory.
    await worker.call("forget")
    return [started[number] - at for number, at in when.items()]


async def _size(database: Database) -> dict[str, Any]:
    row = await database.connection.fetchrow(
        "SELECT pg_database_size(current_database())::float AS bytes,"
        " (SELECT coalesce(sum(n_dead_tup), 0)::float FROM pg_stat_user_tables) AS dead_tuples,"
        " (SELECT count(*)::float FROM pg_stat_activity WHERE datname = current_database()) AS connections"
    )
    return dict(row)


def cases(profile: Profile) -> list[Case]:
    seconds = profile.soak_seconds
    length = f"{seconds:g} seconds" if seconds < 120 else f"{seconds / 60:g} minutes"
    return [Case("soak", f"{length} at half of the maximum", "drain", soak, systems=frozenset({REFERENCE}), once=True)]
