"""The plans of every statement of every page, on tables with a past: pages read little, however much lies beside it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL, event
from sqlalchemy.engine import Connection
from starlette.routing import compile_path

from durable_sa import Durable
from durable_sa.dashboard import Access, Dashboard, dashboard
from durable_sa.dashboard.access import ACTIONS
from durable_sa.dashboard.pages import PAGES
from durable_sa.testing.database import TestServer
from tests.dashboard.support import Browser, browsing
from tests.statements import test_plans as tables
from tests.statements.test_plans import literal, nodes, task_id

FAILED, WITH_CHILDREN, ENDED = range(300_001, 303_001), task_id(400_000), task_id(1)
FILL = """
UPDATE durable.queues SET limited_at = now(), limits_ready_at = now() WHERE queue_name = 'limited';
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, state, outcome, attempt, run_id, max_attempts, retry_kind, retry_base_delay,
    retry_factor, retry_max_backoff, retry_jitter, finished_at, error
)
SELECT pg_temp.id(number), 'default', 'break', 'failed', 'failed', 1, pg_temp.id(number), 1, 'fixed', 5, 2, 300, 0,
    now() - number * interval '1 ms', json_build_object('name', 'ValueError', 'message', 'x', 'traceback', repeat('x ', 800))
FROM generate_series({failed.start}, {failed.stop} - 1) AS number;
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, state, run_id, max_attempts, retry_kind, retry_base_delay, retry_factor,
    retry_max_backoff, retry_jitter, parent_task_id, available_at
)
SELECT pg_temp.id(400000 + number), 'default', 'child', 'pending', pg_temp.id(number), 1, 'fixed', 5, 2, 300, 0,
    CASE WHEN number > 0 THEN pg_temp.id(400000) END, now() + interval '1 h'
FROM generate_series(0, 50) AS number;
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, state, run_id, max_attempts, retry_kind, retry_base_delay, retry_factor,
    retry_max_backoff, retry_jitter, limit_key, available_at
)
SELECT pg_temp.id(500000 + number), 'limited', 'work', 'pending', pg_temp.id(number), 1, 'fixed', 5, 2, 300, 0,
    'key-' || number, now() FROM generate_series(1, 5000) AS number;
INSERT INTO durable.limits (queue_name, scope, limited, concurrency) VALUES ('limited', 'per_key', true, 2);
INSERT INTO durable.limit_keys (queue_name, limit_key, running) SELECT 'limited', 'key-' || number, number % 3
    FROM generate_series(1, 50000) AS number;
INSERT INTO durable.limits (queue_name, scope, limit_key, limited, concurrency)
    SELECT 'limited', 'key', 'key-' || number, true, 3 FROM generate_series(1, 50000, 50) AS number;
INSERT INTO durable.task_minutes (queue_name, minute, task_name, worker_id, completed)
    SELECT 'default', date_trunc('minute', now()) - number * interval '1 min', 'work', '{worker}', 1
    FROM generate_series(0, 50000) AS number;
INSERT INTO durable.task_values (task_id, name, value)
    SELECT pg_temp.id(number), 'progress', '1' FROM generate_series(1, 50000) AS number;
"""
LARGE = tables.LARGE | {"streams", "stream_items", "task_values", "task_minutes", "limit_keys"}
MOST_BLOCKS = 25_000
READ = {
    # Waits are read up to a number, and compared with these events, which are only five times as many.
    "/events": {"events", "waits"},
    "/events?prefix=none": {"events", "waits"},
    # No index knows these filters: all tasks are tried for a moment, then a part of them is searched.
    "/tasks?task_name=unknown": {"tasks"},
    "/tasks?task_name=unknown&queue_name=default&state=completed": {"tasks"},
    "/tasks?limit_key=key-7": {"tasks"},
    # The page is opened without the checks that read all unfinished tasks, if these take long.
    "/doctor": {"tasks", "waits", "limit_keys"},
    # Keys in one state are searched among all of their queue, and counted by their states.
    "/queues/limited?limit_state=full": {"limit_keys"},
    "/queues/limited?limit_state=full&limit_after=key-3": {"limit_keys"},
    "/limits": {"limit_keys"},
}
"""The tables that a page reads, although they are large."""

PATHS = (
    "/",
    "/tasks",
    *(
        f"/tasks?{query}"
        for query in (
            "order=oldest",
            "order=running",
            "state=failed",
            "state=running",
            "state=sleeping&queue_name=default",
            "state=failed&state=cancelled&task_name=break&error_name=ValueError",
            "error_name=OSError",
            "task_name=break",
            "task_name=unknown",
            "task_name=unknown&queue_name=default&state=completed",
            "queue_name=limited",
            "queue_name=unknown",
            "limit_key=key-7",
            "key=none",
            f"parent={WITH_CHILDREN}",
            "ended_after=10min",
            "ended_before=2020-01-01T00:00:00Z",
            "spawned_after=24h",
            "running_longer_than=15min",
        )
    ),
    "/tasks/all?action=retry",
    "/tasks/all?action=cancel&task_name=child",
    "/tasks/all?action=delete&state=failed&ended_before=2020-01-01T00:00:00Z",
    *(
        f"/tasks/{one}"
        for one in (
            ENDED,
            WITH_CHILDREN,
            # It is due, and under limits.
            task_id(500_077),
            *(task_id(many[0]) for many in (FAILED, tables.SLEEPING, tables.WAITING, tables.RUNNING)),
        )
    ),
    "/failures",
    "/failures?task_name=break&queue_name=default&ended_after=7d",
    "/queues",
    "/queues/default",
    "/queues/default?window=7d&task_name=work",
    "/queues/limited",
    "/queues/limited?limit_after=key-3",
    "/queues/limited?limit_key=key-77",
    "/queues/limited?limit_state=full",
    "/queues/limited?limit_state=full&limit_after=key-3",
    "/limits",
    "/workers",
    "/schedules",
    "/events",
    "/events?prefix=none",
    "/events?name=of-nobody-1&queue_name=default",
    "/doctor",
)
"""Addresses of every page of the dashboard, with the filters that users choose."""
ACCESS = {
    "everything": Access("ada", actions=ACTIONS, payloads=True),
    "some queues": Access("ada", actions=ACTIONS, payloads=True, queues={"default", "limited"}),
}


def test_every_page_is_asked() -> None:
    for page in PAGES:
        pattern, *_ = compile_path(page.path)
        assert any(pattern.match(path.partition("?")[0]) for path in PATHS), f"add a path of {page.path}"


@pytest.fixture(scope="module")
def large_url(durable_server: TestServer, durable_template_url: URL) -> Generator[URL]:
    url = durable_server.create_database(durable_template_url)

    async def fill() -> None:
        async with Durable(url) as durable:
            for name in ("default", "limited", *(f"queue-{number}" for number in range(20))):
                await durable.create_queue(name)
        connection = await asyncpg.connect(plain(url))
        ranges = {
            name.lower(): getattr(tables, name) for name in ("FINISHED", "SLEEPING", "WAITING", "RUNNING", "READY")
        }
        await connection.execute(tables.FILL.format(batch=tables.BATCH, worker=tables.WORKER, **ranges))
        await connection.execute(FILL.format(failed=FAILED, worker=tables.WORKER))
        # Samples of all rows, because plans that depend on which rows are drawn would come and go.
        await connection.execute("SET default_statistics_target = 1000")
        await connection.execute("ANALYZE")
        await connection.close()

    asyncio.run(fill())
    yield url
    durable_server.drop_database(url)


def plain(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
async def connection(large_url: URL) -> AsyncGenerator[Any]:
    connection = await asyncpg.connect(plain(large_url))
    # The server does not choose a plan for any parameters that costs much more than those for these.
    await connection.execute("SET plan_cache_mode = force_custom_plan")
    yield connection
    await connection.close()


def recorded(app: Dashboard) -> dict[tuple[str, str], tuple[Any, ...]]:
    """The statements that pages send from now on, with their parameters."""
    sent: dict[tuple[str, str], tuple[Any, ...]] = {}

    @event.listens_for(app.reader._per_loop.get().engine.sync_engine, "before_cursor_execute")
    def before(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "durable." in statement:
            sent[statement, str(parameters)] = tuple(parameters)

    return sent


async def explained(connection: Any, statement: str, parameters: tuple[Any, ...]) -> dict[str, Any]:
    written = ", ".join(literal(value) for value in parameters)
    await connection.execute(f"PREPARE statement AS {statement}")
    arguments = f"({written})" if written else ""
    plan = await connection.fetchval(
        f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE statement{arguments}"
    )
    await connection.execute("DEALLOCATE statement")
    found: dict[str, Any] = json.loads(plan)[0]["Plan"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("access", ACCESS)
async def test_no_page_reads_a_large_table(large_url: URL, connection: Any, access: str) -> None:
    wrong: list[str] = []
    async with Durable(large_url) as durable:
        app = dashboard(durable, auth=lambda _: ACCESS[access])
        # The plan is what counts, not how busy the machine is.
        app.reader.statement_timeout = 60
        sent = recorded(app)
        async with browsing(app) as browser:
            for path in PATHS:
                await visit(browser, path, access)
                for (statement, _), parameters in sent.items():
                    plan = await explained(connection, statement, parameters)
                    scanned = {node["Relation Name"] for node in nodes(plan) if node["Node Type"] == "Seq Scan"} & LARGE
                    blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
                    if scanned - READ.get(path, set()) or (blocks > MOST_BLOCKS and path not in READ):
                        wrong.append(f"{path}: scans {sorted(scanned)}, {blocks} blocks: {statement[:300]}")
                assert sent or path == "/doctor", path
                sent.clear()
    assert not wrong, "\n".join(wrong)


async def visit(browser: Browser, path: str, access: str) -> None:
    if path == "/doctor" and access != "everything":
        return
    data = await browser.data(path)
    assert data["late"] == [], path
