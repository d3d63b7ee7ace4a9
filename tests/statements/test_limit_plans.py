"""The plan of the claim of limited queues: it touches what it claims, however many keys and tasks lie beside it."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL
from sqlalchemy.dialects.postgresql.asyncpg import dialect

from durable_sa import Durable, Limit
from durable_sa.database.rendering import render
from durable_sa.statements import limits

TASKS, KEYS, WHALE = 20_000, 4_000, 6_000
WORKER = uuid.UUID(int=7)
FILL = f"""
INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)
    VALUES ('{WORKER}', 'worker', '{{q}}', '1 h', now() + interval '1 h');
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, run_id, max_attempts, retry_kind, retry_base_delay, retry_factor,
    retry_max_backoff, retry_jitter, available_at, limit_key
)
SELECT gen_random_uuid(), 'q', 'work', gen_random_uuid(), 5, 'none', 0, 1, 0, 0,
    now() - interval '1 hour' + n * interval '1 us', CASE WHEN n <= {WHALE} THEN 'whale' ELSE 'k' || n % {KEYS} END
FROM generate_series(1, {TASKS}) n;
INSERT INTO durable.limit_keys (queue_name, limit_key, ready_at)
    SELECT 'q', 'k' || n, now() - interval '1 hour' + n * interval '1 us' FROM generate_series(0, {KEYS} - 1) n;
INSERT INTO durable.limit_keys (queue_name, limit_key, ready_at, running)
    VALUES ('q', 'whale', now() - interval '2 hours', 2);
ANALYZE durable.limit_keys;
"""


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "Relation Name" in plan and "Actual Rows" in plan and plan["Node Type"] != "ModifyTable":
        yield plan
    for inner in plan.get("Plans", ()):
        yield from scans(inner)


@pytest.mark.parametrize("statistics", [True, False], ids=["with statistics", "without"])
async def test_a_claim_reads_the_heads_of_the_keys_that_it_serves(
    durable: Durable, database_url: URL, statistics: bool
) -> None:
    await durable.create_queue("q", limit=Limit(concurrency=10_000), limit_per_key=Limit(concurrency=2))
    connection = await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        await connection.execute(FILL)
        if statistics:
            await connection.execute("ANALYZE durable.tasks")
        rendered = render(limits.CLAIM_LIMITED, dialect(), None)  # type: ignore[no-untyped-call]
        values = {
            "queue_name": "q",
            "worker_id": WORKER,
            "wanted": 20,
            "task_names": ["work"],
            "priorities": [0, 5],
            "ready_floor": datetime(1, 1, 2, tzinfo=UTC),
            "floors": True,
            "floor_of": 1,
        }
        explain = f"EXPLAIN (ANALYZE, TIMING OFF, BUFFERS OFF, FORMAT JSON) {rendered.text}"
        (row,) = await connection.fetch(explain, *rendered.bind(values))
        (explained,) = json.loads(row[0])
        assert "JIT" not in explained
        found = list(scans(explained["Plan"]))
        for scan in found:
            read = (scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)) * scan["Actual Loops"]
            assert read <= 100, scan
            if scan["Relation Name"] == "tasks" and scan["Actual Loops"]:
                assert scan["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Heap Scan"), scan
        indexes = {scan["Index Name"] for scan in found if scan["Relation Name"] == "tasks" and "Index Name" in scan}
        assert "tasks_claim_idx" not in indexes
        # A key is looked up once, in the index of what is ready: in that of the keys it has an entry for each version.
        of_keys = [scan for scan in found if scan["Relation Name"] == "limit_keys" and scan["Actual Loops"]]
        assert {scan.get("Index Name", scan["Node Type"]) for scan in of_keys} == {"limit_keys_ready_idx", "Tid Scan"}
        claimed = await connection.fetchval("SELECT count(*) FROM durable.tasks WHERE state = 'running'")
        assert claimed == 19
    finally:
        await connection.close()
