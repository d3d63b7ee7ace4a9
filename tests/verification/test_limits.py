"""Limits under random load, and a key with many tasks beside keys with few.

`python -m tests.verification.limits_load URL --seconds 600` is the same load for longer.
"""

import asyncpg
from sqlalchemy import URL

from durable_sa import Durable, Limit, Spawn, TaskContext

from .limits_load import load

SECONDS = 30
WHALE = 300_000
OTHERS = 1_000


async def test_limits_hold_under_random_load(database_url: URL, durable: Durable) -> None:
    report = await load(database_url.render_as_string(hide_password=False), SECONDS)
    assert report.clean, report
    assert min(report.spawned, report.cancelled, report.lost_workers, report.changes) > 0, report


async def test_keys_with_one_task_each_start_before_the_2000th_of_a_large_one(
    database_url: URL, durable: Durable
) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None: ...

    await durable.create_queue("q", limit_per_key=Limit(concurrency=100))
    first = await durable.spawn(work, queue_name="q", limit_key="whale")
    plain = await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        names = [
            row["name"]
            for row in await plain.fetch(
                "SELECT attname AS name FROM pg_attribute WHERE attrelid = 'durable.tasks'::regclass AND attnum > 0"
                " AND NOT attisdropped AND attname NOT IN ('task_id', 'run_id')"
            )
        ]
        columns = ", ".join(names)
        await plain.execute(
            f"INSERT INTO durable.tasks (task_id, run_id, {columns})"
            f" SELECT gen_random_uuid(), gen_random_uuid(), {columns} FROM durable.tasks, generate_series(2, {WHALE})",
            timeout=300,
        )
        await plain.execute("ANALYZE durable.tasks", timeout=300)
        assert await plain.fetchval("SELECT count(*) FROM durable.tasks WHERE limit_key = 'whale'") == WHALE
        spawns = [Spawn(work, queue_name="q", limit_key=f"key-{number}") for number in range(OTHERS)]
        others = await durable.spawn_many(spawns)
        async with durable.worker(queue_names=["q"], concurrency=50):
            assert (await durable.wait_for_result(first, timeout=60)).status == "completed"
            for other in others:
                assert (await durable.wait_for_result(other, timeout=60)).status == "completed"
        before = await plain.fetchval(
            "SELECT count(*) FROM durable.tasks WHERE limit_key = 'whale' AND started_at <"
            " (SELECT max(started_at) FROM durable.tasks WHERE limit_key <> 'whale')"
        )
    finally:
        await plain.close()
    assert before < 2000
