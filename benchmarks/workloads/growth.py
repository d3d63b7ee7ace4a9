"""Draining beside millions of rows, and while vacuum cannot remove dead rows."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

from ..bench import Bench
from ..catalogue import REFERENCE, System
from ..profiles import Profile
from ..results import percentile
from ..server import Database
from ..systems.base import QUEUE
from .common import Case, Outcome, drain

CHUNK = 500_000

SLOWED = {"pgqueuer": 0.1}
"""The fraction of the tasks for a system that a held snapshot slows down so much that all would take minutes."""

FINISHED = f"""
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, params, state, outcome, attempt, run_id, max_attempts,
    retry_kind, retry_base_delay, retry_factor, retry_max_backoff, retry_jitter, fence,
    created_at, available_at, first_started_at, started_at, finished_at, output
)
SELECT uuidv7(age), '{QUEUE}', 'noop', '{{"i": 1}}', 'completed', 'completed', 1, uuidv7(age), 5,
    'fixed', 5, 2, 300, 0, 2, clock_timestamp() + age, clock_timestamp() + age, clock_timestamp() + age,
    clock_timestamp() + age, clock_timestamp() + age, 'null'
FROM generate_series($1::bigint, $2::bigint) AS number, make_interval(secs => (number - 20000000) / 10.0) AS age
"""
SLEEPERS = f"""
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, params, state, attempt, run_id, max_attempts,
    retry_kind, retry_base_delay, retry_factor, retry_max_backoff, retry_jitter, fence,
    created_at, available_at, first_started_at, started_at
)
SELECT uuidv7(age), '{QUEUE}', 'nap', '{{"i": 1}}', 'sleeping', 1, uuidv7(age), 5,
    'fixed', 5, 2, 300, 0, 2, clock_timestamp() + age,
    clock_timestamp() + make_interval(secs => 90000 + number % 90000), clock_timestamp() + age, clock_timestamp() + age
FROM generate_series($1::bigint, $2::bigint) AS number, make_interval(secs => (number - 20000000) / 10.0) AS age
"""
RUNS = """
INSERT INTO durable.runs (task_id, attempt, run_id, state, started_at, finished_at)
SELECT task_id, 1, run_id, 'completed', started_at, finished_at FROM durable.tasks WHERE finished_at IS NOT NULL
"""


async def fill(database: Database, finished: int, sleepers: int) -> None:
    """Insert rows as that many tasks would have left them, and vacuum."""
    for statement, count in ((FINISHED, finished), (SLEEPERS, sleepers)):
        for start in range(0, count, CHUNK):
            await database.connection.execute(statement, start + 1, min(start + CHUNK, count), timeout=3600)
    await database.connection.execute(RUNS, timeout=3600)
    await database.connection.execute("VACUUM (ANALYZE)", timeout=3600)
    await database.connection.execute("CHECKPOINT", timeout=3600)


async def drain_beside(bench: Bench, system: System, *, finished: int, sleepers: int) -> Outcome:
    """Drain beside old tasks. All rounds share one database, so the drained tasks of earlier rounds are in it."""
    count = bench.profile.drained_beside
    settings = {**system.worker("best"), "timed": True}
    key = f"beside {finished} {sleepers}"
    if key not in bench.kept:
        stack = AsyncExitStack()
        database = await stack.enter_async_context(bench.server.database(system))
        bench.kept[key] = (database, stack)
        await fill(database, finished, sleepers)
    database = bench.kept[key][0]
    driver = await bench.driver(system, settings["loop"])
    await driver.call("claim_times")
    drained = await drain(bench, system, database, settings, count=count)
    claims = await driver.call("claim_times")
    figures = {f"claim p{share}": 1000 * percentile(claims, share / 100) for share in (50, 99)}
    return Outcome({"throughput": count / drained.seconds, **figures}, count)


async def drain_under_snapshot(bench: Bench, system: System) -> Outcome:
    """Compare the last tenth of a queue with the first, while another transaction holds its snapshot."""
    count = int(bench.profile.drained_under_snapshot * SLOWED.get(system.name, 1))
    async with bench.server.database(system) as database, database.held_snapshot():
        drained = await drain(bench, system, database, system.worker("best"), count=count)
    times = drained.tenths
    ratio = (times[1] - times[0]) / (times[10] - times[9])
    return Outcome({"throughput": count / drained.seconds, "last tenth over first": ratio}, count)


def cases(profile: Profile) -> list[Case]:
    found = [
        Case(
            "growth",
            f"{finished:,} finished, {sleepers:,} sleepers",
            "drain",
            partial(drain_beside, finished=finished, sleepers=sleepers),
            systems=frozenset({REFERENCE}),
        )
        for finished, sleepers in profile.levels
    ]
    fast = frozenset({REFERENCE, "pgqueuer", "raw"})
    found.append(Case("snapshot", "held while draining", "drain", drain_under_snapshot, systems=fast))
    return found
