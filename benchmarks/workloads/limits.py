"""Queues with limits: draining them, claims of a million tasks on 100,000 keys, and a held snapshot."""

from __future__ import annotations

import asyncio
from functools import partial

from ..bench import Bench
from ..catalogue import REFERENCE, System
from ..profiles import Profile
from ..results import percentile
from ..server import Database
from ..systems.base import QUEUE
from .common import Case, Outcome, drain, share, until, working

VARIANTS = {
    "none": "no limit",
    "queue": "a limit of the queue that never binds",
    "keys": "100 keys, 4 at a time each",
}
CLAIMED = 20
"""Tasks of one claim."""
WHALE = 0.3
"""The share of the tasks that one key has, whose slots are taken: claims have to pass it."""

CHUNK = 200_000
TASKS = f"""
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, params, state, run_id, max_attempts,
    retry_kind, retry_base_delay, retry_factor, retry_max_backoff, retry_jitter,
    created_at, available_at, limit_key
)
SELECT uuidv7(age), '{QUEUE}', 'noop', '{{"i": 1}}', 'pending', uuidv7(age), 5,
    'fixed', 5, 2, 300, 0, clock_timestamp() + age, clock_timestamp() + age,
    CASE WHEN number <= $3 THEN 'whale' ELSE 'key-' || number % 100000 END
FROM generate_series($1::bigint, $2::bigint) AS number, make_interval(secs => (number - 20000000) / 10.0) AS age
"""
KEYS = """
INSERT INTO durable.limit_keys (queue_name, limit_key, running, ready_at, version)
SELECT queue_name, limit_key, CASE limit_key WHEN 'whale' THEN 4 ELSE 0 END,
    CASE WHEN limit_key <> 'whale' THEN min(available_at) END, 1
FROM durable.tasks GROUP BY queue_name, limit_key
"""


async def run_drain(bench: Bench, system: System, *, key: str) -> Outcome:
    count = share(bench.profile.limited, system)
    settings = system.worker("best")
    driver = await bench.driver(system, settings["loop"])
    async with bench.server.database(system) as database:
        if key == "none":
            drained = await drain(bench, system, database, settings, count=count)
        else:
            await driver.call("limit", url=database.url, kind=key)
            try:
                drained = await drain(bench, system, database, settings, task="keyed", count=count)
            finally:
                await driver.call("limit", url=None, kind=None)
    return Outcome({"throughput": count / drained.seconds}, count)


async def fill(database: Database, count: int) -> None:
    """Insert tasks as that many spawns with keys would have left them, and vacuum."""
    for start in range(0, count, CHUNK):
        last = min(start + CHUNK, count)
        await database.connection.execute(TASKS, start + 1, last, int(count * WHALE), timeout=3600)
    await database.connection.execute(KEYS, timeout=3600)
    await database.connection.execute("VACUUM (ANALYZE)", timeout=3600)
    await database.connection.execute("CHECKPOINT", timeout=3600)


async def run_claims(bench: Bench, system: System, *, count: int) -> Outcome:
    """Time claims of 20 tasks from 100,000 keys, beside a key with a third of all tasks, whose slots are taken."""
    settings = {"loop": "uvloop", "concurrency": CLAIMED, "timed": True}
    claims = bench.profile.limited_claims
    async with bench.server.database(system) as database:
        driver = await bench.driver(system, settings["loop"])
        await driver.call("limit", url=database.url, kind="keys")
        await fill(database, count)
        await driver.call("forget")
        await driver.call("claim_times")
        async with working(driver, database, settings):
            await until(driver, "ended", min(claims * CLAIMED, int(count * (1 - WHALE)) // 2))
            times = await driver.call("claim_times")
            await asyncio.sleep(0)
    figures = {f"claim p{part}": 1000 * percentile(times, part / 100) for part in (50, 99)}
    return Outcome(figures, len(times))


async def run_under_snapshot(bench: Bench, system: System) -> Outcome:
    """Compare the last tenth of a drain with limits with the first, while another transaction holds its snapshot."""
    count = bench.profile.limited_under_snapshot
    settings = system.worker("best")
    driver = await bench.driver(system, settings["loop"])
    async with bench.server.database(system) as database:
        await driver.call("limit", url=database.url, kind="keys")
        async with database.held_snapshot():
            drained = await drain(bench, system, database, settings, task="keyed", count=count)
    times = drained.tenths
    ratio = (times[1] - times[0]) / (times[10] - times[9])
    return Outcome({"throughput": count / drained.seconds, "last tenth over first": ratio}, count)


def cases(profile: Profile) -> list[Case]:
    with_keys = frozenset({REFERENCE, "dbos"})
    systems = {"none": with_keys | {"pgqueuer", "raw"}, "queue": with_keys | {"pgqueuer"}, "keys": with_keys}
    found = [
        Case("limited-drain", title, "drain", partial(run_drain, key=key), systems=systems[key])
        for key, title in VARIANTS.items()
    ]
    own = frozenset({REFERENCE})
    found += [
        Case("limited-claim", f"20 of {count:,} tasks", "drain", partial(run_claims, count=count), systems=own)
        for count in profile.limited_tasks
    ]
    found.append(Case("limited-snapshot", "held while draining", "drain", run_under_snapshot, systems=own))
    return found
