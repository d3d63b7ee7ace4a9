"""The plans of what workers count per minute: charts and deletions read their window, however much lies beside it."""

import uuid
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL

from durable_sa import Durable
from durable_sa.statements import minutes, queues
from tests.statements.test_plans import Case, explained, nodes

FILL = """
ALTER TABLE durable.task_minutes SET (autovacuum_enabled = false);
INSERT INTO durable.queues (queue_name) SELECT 'queue-' || number FROM generate_series(1, 3) AS number;
INSERT INTO durable.task_minutes (queue_name, minute, task_name, worker_id, completed, milliseconds)
SELECT queue_name, date_trunc('minute', now()) - number * interval '1 min', task_name, '{worker}', 1, 1
FROM durable.queues, generate_series(0, 9999) AS number, unnest('{{one,another}}'::text[]) AS task_name;
"""
WORKER = uuid.UUID(int=7)
HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)
PKEY = frozenset({"task_minutes_pkey"})
WINDOW = {"queue_name": "queue-1", "task_name": None, "since": HOUR_AGO, "seconds": 60}
WRITTEN = {
    "queue_names": ["queue-1"] * 20,
    "minutes": [HOUR_AGO.replace(second=0, microsecond=0)] * 20,
    "task_names": [f"task-{number}" for number in range(20)],
    "worker_ids": [WORKER] * 20,
    **{name: [1] * 20 for name in ("completed", "failed", "cancelled", "milliseconds", "slowest")},
}
CASES = {
    "the last hour of all queues": Case(minutes.LATEST, {"queue_names": None, "since": HOUR_AGO}, PKEY, 600),
    "the last hour of one": Case(minutes.LATEST, {"queue_names": ["queue-1"], "since": HOUR_AGO}, PKEY, 200),
    "a chart": Case(minutes.OF_QUEUE, WINDOW, PKEY, 150),
    "a chart of a task": Case(minutes.OF_QUEUE, {**WINDOW, "task_name": "one"}, PKEY, 150),
    "write": Case(minutes.WRITE, WRITTEN, frozenset(), 250),
    "delete old ones": Case(queues.DELETE_MINUTES, {"queue_name": "queue-1", "age": 86400.0, "wanted": 100}, PKEY, 800),
    "delete those of a queue": Case(queues.DELETE_QUEUE_MINUTES, {"queue_name": "queue-1", "wanted": 100}, PKEY, 800),
}


@pytest.fixture
async def connection(durable: Durable, database_url: URL) -> AsyncGenerator[Any]:
    connection = await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(hide_password=False))
    await connection.execute(FILL.format(worker=WORKER))
    yield connection
    await connection.close()


async def test_charts_and_deletions_read_their_window(connection: Any) -> None:
    earlier = connection.get_server_version().major < 17
    for statistics in (False, True):
        if statistics:
            await connection.execute("ANALYZE durable.task_minutes")
        for mode in ("custom", "generic"):
            await connection.execute(f"SET plan_cache_mode = force_{mode}_plan")
            for name, case in CASES.items():
                plan = await explained(connection, case)
                found = list(nodes(plan))
                about = (name, mode, statistics)
                scanned = {node["Relation Name"] for node in found if node["Node Type"] == "Seq Scan"}
                if name == "delete those of a queue" and mode == "generic" and earlier:
                    # PostgreSQL 14 scans until it has enough, as a third of the rows are the queue's.
                    continue
                assert "task_minutes" not in scanned, about
                assert case.indexes <= {node["Index Name"] for node in found if "Index Name" in node}, about
                if statistics or not name.startswith("delete"):
                    # A table from which something has come of age was analyzed long since.
                    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < case.blocks, about
