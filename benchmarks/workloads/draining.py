"""Draining a queue of tasks that do nothing, with the WAL and tuples it writes; and a ceiling from pgbench."""

from __future__ import annotations

import asyncio
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..bench import Bench
from ..catalogue import System
from ..profiles import Profile
from ..server import Database
from .common import Case, Outcome, RunError, drain, load, share

VARIANTS = {
    "default": ("default settings", 1),
    "1": ("concurrency 1", 1),
    "8": ("concurrency 8", 1),
    "100": ("concurrency 100", 1),
    "best": ("best settings", 1),
    "two": ("best settings, 2 processes", 2),
}

PGBENCH = """
WITH ready AS MATERIALIZED (
    SELECT id FROM jobs WHERE finished_at IS NULL AND state = 'pending'
    ORDER BY id LIMIT :batch FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE jobs SET state = 'running', started_at = clock_timestamp() FROM ready WHERE jobs.id = ready.id
    RETURNING jobs.id
)
SELECT coalesce(array_agg(id), '{}')::text AS ids FROM claimed \\gset
UPDATE jobs SET state = 'completed', output = 'null', finished_at = clock_timestamp() WHERE id = ANY (:ids::bigint[]);
"""


async def run_drain(bench: Bench, system: System, *, key: str, processes: int) -> Outcome:
    profile = bench.profile
    settings = system.worker({"best": "best", "two": "best", "default": "default"}.get(key) or int(key))
    count = share(profile.drained[key], system)
    async with bench.server.database(system) as database:
        before = await database.counters()
        drained = await drain(bench, system, database, settings, count=count, processes=processes)
        figures = {"throughput": count / drained.seconds}
        if key == "best":
            figures |= await written(database, before, count)
    return Outcome(figures, count)


async def written(database: Database, before: dict[str, float], count: int) -> dict[str, float]:
    """Return the WAL and tuples that each task has written from its spawn to its end."""
    after = await database.counters()
    total = {name: after[name] - before[name] for name in after}
    return {
        "wal": total["wal_bytes"] / count,
        "dead": total["dead_tuples"] / count,
        "hot": 100 * total["hot_updates"] / max(1.0, total["updates"]),
    }


async def run_pgbench(bench: Bench, system: System, *, batch: int, clients: int) -> Outcome:
    """Drain the plain table with pgbench, which shows what the server can do without Python."""
    count = bench.profile.drained["best" if batch > 1 else "8"]
    count -= count % (batch * clients)
    async with bench.server.database(system) as database:
        await load(bench, system, database, "noop", count, {}, system.best["loop"])
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(PGBENCH)
            script.flush()
            bench.server.programs.give(Path(script.name))
            options: dict[str, Any] = {"-M": "prepared", "-c": clients, "-j": 2, "-t": count // batch // clients}
            arguments = [str(part) for option in options.items() for part in option]
            arguments += ["-n", "-D", f"batch={batch}", "-f", script.name, database.url]
            began = time.monotonic()
            await asyncio.to_thread(bench.server.programs.run, "pgbench", *arguments)
            seconds = time.monotonic() - began
        if left := await database.unfinished():
            raise RunError(f"{left} of {count} tasks are left")
    return Outcome({"throughput": count / seconds}, count)


def cases(profile: Profile) -> list[Case]:
    found = [
        Case("drain", VARIANTS[key][0], "drain", partial(run_drain, key=key, processes=VARIANTS[key][1]))
        for key in profile.drained
    ]
    for batch, clients in ((100, 1), (100, 2), (1, 8)):
        variant = f"pgbench, batches of {batch}, {clients} client{'s' if clients > 1 else ''}"
        run = partial(run_pgbench, batch=batch, clients=clients)
        found.append(Case("drain", variant, "drain", run, systems=frozenset({"raw"})))
    return found
