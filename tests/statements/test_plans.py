"""The plans of the hot statements on tables with a past: they touch what they change, however much lies beside it."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.sql import ClauseElement

from durable_sa import Durable, TaskContext, TaskFilter, TaskRow
from durable_sa.database.channel import DedicatedConnection
from durable_sa.statements import (
    cancelling,
    checkpoints,
    claiming,
    fencing,
    history,
    inspection,
    log_lines,
    messages,
    outcomes,
    queues,
    reading,
    streams,
    suspending,
    values,
    waits,
)
from durable_sa.statements.reading import Order
from durable_sa.testing.database import TestServer
from durable_sa.worker.cursors import LANE_START

FINISHED = range(1, 200_001)
SLEEPING = range(200_001, 225_001)
WAITING = range(225_001, 250_001)
RUNNING = range(250_001, 250_201)
READY = range(250_201, 251_201)

WORKER = uuid.UUID(int=7)
BATCH = 100
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "reading.md"
LARGE = {"tasks", "runs", "checkpoints", "waits", "events", "messages"}

FILL = """
CREATE FUNCTION pg_temp.id(number bigint) RETURNS uuid IMMUTABLE LANGUAGE sql AS
    $$ SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(number), 12, '0'))::uuid $$;
ALTER TABLE durable.tasks SET (autovacuum_enabled = false);
ALTER TABLE durable.runs SET (autovacuum_enabled = false);
ALTER TABLE durable.checkpoints SET (autovacuum_enabled = false);
ALTER TABLE durable.waits SET (autovacuum_enabled = false);
ALTER TABLE durable.messages SET (autovacuum_enabled = false);
ALTER TABLE durable.streams SET (autovacuum_enabled = false);
ALTER TABLE durable.stream_items SET (autovacuum_enabled = false);
INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)
    VALUES ('{worker}', 'worker', '{{default}}', '120 s', now() + interval '1 day');
INSERT INTO durable.tasks (
    task_id, queue_name, task_name, state, outcome, attempt, run_id, max_attempts, retry_kind, retry_base_delay,
    retry_factor, retry_max_backoff, retry_jitter, fence, claimed_by, available_at, finished_at
)
SELECT pg_temp.id(number), 'default', 'work', state, outcome, 1, pg_temp.id(number), 5, 'fixed', 5, 2, 300, 0, 1,
    CASE state WHEN 'running' THEN '{worker}'::uuid END,
    CASE
        WHEN number BETWEEN {waiting.start} AND {waiting.stop} - 1 THEN NULL
        WHEN state = 'sleeping' THEN now() + interval '1 day' + number * interval '1 s'
        ELSE now() - interval '1 day' + number * interval '1 ms'
    END,
    CASE WHEN outcome IS NOT NULL THEN now() - interval '1 hour' + number * interval '1 ms' END
FROM (
    SELECT number, 'completed' AS state, 'completed' AS outcome
        FROM generate_series({finished.start}, {finished.stop} - 1) AS number
    UNION ALL SELECT number, 'sleeping', NULL FROM generate_series({sleeping.start}, {waiting.stop} - 1) AS number
    UNION ALL SELECT number, 'running', NULL FROM generate_series({running.start}, {running.stop} - 1) AS number
    UNION ALL SELECT number, 'pending', NULL FROM generate_series({ready.start}, {ready.stop} - 1) AS number
) AS numbered;
INSERT INTO durable.runs (task_id, attempt, run_id, state)
    SELECT task_id, attempt, run_id, 'completed' FROM durable.tasks WHERE finished_at IS NOT NULL;
INSERT INTO durable.checkpoints (task_id, key, kind, name, value)
    SELECT task_id, pg_temp.id(1), 'step', 'step', '1' FROM durable.tasks WHERE state <> 'pending';
INSERT INTO durable.waits (task_id, key, kind, name, queue_name, event_name)
    SELECT task_id, pg_temp.id(2), 'event', 'event', 'default', 'event-' || task_id
    FROM durable.tasks WHERE available_at IS NULL;
INSERT INTO durable.events (queue_name, name, payload) SELECT queue_name, event_name, '1' FROM durable.waits;
INSERT INTO durable.events (queue_name, name, payload)
    SELECT 'default', 'of-nobody-' || number, '1' FROM generate_series(1, 100000) AS number;
INSERT INTO durable.waits (task_id, key, kind, name, queue_name)
    SELECT task_id, pg_temp.id(3), 'message', 'in', 'default'
    FROM durable.tasks WHERE state = 'sleeping' AND available_at IS NOT NULL ORDER BY task_id LIMIT {batch};
INSERT INTO durable.messages (task_id, message_id, topic, payload)
    SELECT task_id, pg_temp.id(number), 'in', '1' FROM durable.tasks, generate_series(1, 2) AS number
    WHERE state IN ('sleeping', 'running');
INSERT INTO durable.streams (task_id, name, block_id, step_key, try_id, last_position, reserved)
    SELECT task_id, 'out', pg_temp.id(3), pg_temp.id(4), pg_temp.id(5), 2, 1000 FROM durable.tasks
    WHERE state IN ('sleeping', 'running');
INSERT INTO durable.stream_items (task_id, name, position, step_key, try_id, items)
    SELECT task_id, name, number, step_key, try_id, '[1]' FROM durable.streams, generate_series(1, 2) AS number;
"""


def task_id(number: int) -> uuid.UUID:
    return uuid.UUID(int=(0x7000 << 64) | (0x8000 << 48) | number)


def task_ids(numbers: range) -> list[uuid.UUID]:
    return [task_id(number) for number in numbers[:BATCH]]


@dataclass(frozen=True)
class Case:
    """A statement with parameters as a worker has them, what it has to use, and how much it may touch."""

    statement: ClauseElement
    parameters: dict[str, Any]
    indexes: frozenset[str]
    blocks: int
    """Buffers touched at most; reading all of `tasks` touches many thousands."""
    rows: int = BATCH


def claim(floor: tuple[datetime, uuid.UUID], rows: int = BATCH) -> Case:
    parameters = {
        "worker_id": WORKER,
        "queue_names": ["default", "default"],
        "priorities": [-1, 0],
        "cursor_times": [floor[0]] * 2,
        "cursor_ids": [floor[1]] * 2,
        "task_names": ["work"],
        "wanted": BATCH,
    }
    return Case(claiming.CLAIM, parameters, frozenset({"tasks_claim_idx", "tasks_pkey"}), 3_000, rows)


def page(where: TaskFilter, order: Order = "newest", *, recent: bool = False) -> Any:
    select_page = reading.recent_page if recent else reading.page
    return reading.infos(select_page(where, order, None, 51), order)


RUNS_HELD = {"task_ids": task_ids(RUNNING), "fences": [1] * BATCH}
BLOCKS = {"step_keys": [task_id(4)] * BATCH, "try_ids": [task_id(6)] * BATCH}
CASES = {
    "claim": claim((datetime(2024, 1, 1, tzinfo=UTC), uuid.UUID(int=0))),
    "claim without floor": claim(LANE_START),
    "claim of nothing": claim((datetime.now(UTC) - timedelta(hours=1), uuid.UUID(int=0)), rows=0),
    "survey": Case(
        claiming.SURVEY_LANES, {"queue_names": ["default", "other"]}, frozenset({"tasks_claim_idx"}), 100, 1
    ),
    "complete": Case(
        outcomes.COMPLETE,
        {**RUNS_HELD, "outputs": ["1"] * BATCH, "waited": [True] * BATCH},
        frozenset({"tasks_pkey"}),
        7_000,
    ),
    "complete one": Case(
        outcomes.COMPLETE_ONE,
        {"task_ids": task_id(RUNNING[0]), "fences": 1, "outputs": "1", "waited": True},
        frozenset({"tasks_pkey"}),
        100,
        1,
    ),
    "record one": Case(
        checkpoints.RECORD_ONE,
        {
            "task_ids": task_id(RUNNING[0]),
            "fences": 1,
            "keys": uuid.UUID(int=9),
            "kinds": "step",
            "names": "other step",
            "statuses": "completed",
            "values": "1",
            "child_ids": None,
        },
        frozenset({"tasks_pkey"}),
        100,
        1,
    ),
    "record": Case(
        checkpoints.RECORD,
        {
            **RUNS_HELD,
            "keys": [uuid.UUID(int=9)] * BATCH,
            "kinds": ["step"] * BATCH,
            "names": ["other step"] * BATCH,
            "statuses": ["completed"] * BATCH,
            "values": ["1"] * BATCH,
            "child_ids": [None] * BATCH,
        },
        frozenset({"tasks_pkey"}),
        3_000,
    ),
    "suspend": Case(
        suspending.SUSPEND,
        {
            **RUNS_HELD,
            "waited": [False] * BATCH,
            "earliest_times": [None] * BATCH,
            "earliest_delays": [60.0] * BATCH,
            "wait_task_ids": task_ids(RUNNING),
            "keys": [uuid.UUID(int=9)] * BATCH,
            "kinds": ["event"] * BATCH,
            "names": ["nap"] * BATCH,
            "event_names": ["none"] * BATCH,
            "child_ids": [None] * BATCH,
            "due_times": [None] * BATCH,
            "delays": [60.0] * BATCH,
        },
        frozenset({"tasks_pkey"}),
        7_000,
    ),
    "fail": Case(
        outcomes.fail(limited=False),
        {
            **RUNS_HELD,
            "errors": ["{}"] * BATCH,
            "retryable": [True] * BATCH,
            "next_run_ids": [uuid.UUID(int=number) for number in range(BATCH)],
            "waited": [True] * BATCH,
        },
        frozenset({"tasks_pkey"}),
        8_000,
    ),
    "resolve": Case(
        waits.RESOLVE, {"task_ids": task_ids(WAITING)}, frozenset({"tasks_pkey", "waits_pkey", "events_pkey"}), 7_000
    ),
    "resolve what is free": Case(
        waits.RESOLVE_FREE,
        {"task_ids": task_ids(WAITING)},
        frozenset({"tasks_pkey", "waits_pkey", "events_pkey"}),
        7_000,
    ),
    "send": Case(
        messages.SEND,
        {
            "message_ids": [uuid.UUID(int=number + 10) for number in range(BATCH)],
            "receiver_ids": task_ids(RUNNING),
            "topics": ["in"] * BATCH,
            "payloads": ["1"] * BATCH,
            "message_keys": [None] * BATCH,
        },
        frozenset({"tasks_pkey"}),
        4_000,
    ),
    "receive": Case(
        messages.RECEIVE,
        {**RUNS_HELD, "keys": [uuid.UUID(int=9)] * BATCH, "topics": ["in"] * BATCH},
        frozenset({"tasks_pkey", "messages_topic_idx", "messages_pkey"}),
        7_000,
    ),
    "deliver": Case(
        messages.DELIVER,
        {"task_ids": task_ids(SLEEPING)},
        frozenset({"tasks_pkey", "waits_pkey", "messages_topic_idx", "messages_pkey"}),
        9_000,
    ),
    "tasks with mail": Case(
        messages.WITH_MAIL,
        {"task_ids": task_ids(SLEEPING)},
        frozenset({"waits_pkey", "messages_topic_idx"}),
        1_500,
    ),
    "publish": Case(
        values.PUBLISH,
        {
            **RUNS_HELD,
            "value_task_ids": task_ids(RUNNING),
            "names": ["progress"] * BATCH,
            "values": ["1"] * BATCH,
        },
        frozenset({"tasks_pkey"}),
        3_000,
    ),
    "write items": Case(
        streams.WRITE_ITEMS,
        {
            **RUNS_HELD,
            "keys": [uuid.UUID(int=number) for number in range(BATCH)],
            "names": ["out"] * BATCH,
            "block_ids": [task_id(3)] * BATCH,
            "positions": [3] * BATCH,
            "step_keys": [task_id(4)] * BATCH,
            "try_ids": [task_id(5)] * BATCH,
            "items": ["[1]"] * BATCH,
            "reservations": [2000] * BATCH,
        },
        frozenset({"tasks_pkey", "streams_pkey"}),
        6_000,
    ),
    "write lines": Case(
        log_lines.WRITE_LINES,
        {
            **RUNS_HELD,
            "keys": [uuid.UUID(int=number) for number in range(BATCH)],
            "counts": [1] * BATCH,
            "lines": ["[1]"] * BATCH,
        },
        frozenset({"tasks_pkey"}),
        6_000,
    ),
    "open streams": Case(
        streams.OPEN_STREAMS,
        {**RUNS_HELD, "keys": [uuid.UUID(int=9)] * BATCH, "names": ["out"] * BATCH, **BLOCKS},
        frozenset({"tasks_pkey", "streams_pkey"}),
        6_000,
    ),
    "supersede": Case(
        streams.SUPERSEDE,
        {**RUNS_HELD, "keys": [task_id(3)] * BATCH, "names": ["out"] * BATCH, **BLOCKS},
        frozenset({"tasks_pkey", "streams_pkey", "stream_items_pkey"}),
        7_000,
    ),
    "close streams": Case(
        streams.CLOSE_STREAMS,
        {
            **RUNS_HELD,
            "keys": [uuid.UUID(int=9)] * BATCH,
            "names": ["out"] * BATCH,
            "block_ids": [task_id(3)] * BATCH,
            "positions": [3] * BATCH,
            "ends": [True] * BATCH,
            "checkpoint_keys": [uuid.UUID(int=9)] * BATCH,
        },
        frozenset({"tasks_pkey", "streams_pkey"}),
        7_000,
    ),
    "read streams": Case(
        streams.READ_STREAMS,
        {"task_ids": task_ids(RUNNING), "names": ["out"] * BATCH, "afters": [1] * BATCH},
        frozenset({"tasks_pkey", "streams_pkey", "stream_items_pkey"}),
        2_000,
    ),
    "load journals": Case(
        checkpoints.LOAD_JOURNALS,
        {"task_ids": [*task_ids(RUNNING)[: BATCH // 2], *task_ids(WAITING)[: BATCH // 4]]},
        frozenset({"checkpoints_pkey", "waits_pkey"}),
        1_500,
    ),
    "statistics of queues": Case(
        queues.QUEUE_STATISTICS,
        {"queue_names": ["default"]},
        frozenset({"tasks_claim_idx", "tasks_finished_idx"}),
        12_000,
        1,
    ),
    "what is past its retention": Case(queues.RETENTIONS, {}, frozenset({"tasks_finished_idx"}), 100, 0),
    "ended tasks past their retention": Case(
        queues.FINISHED_BEFORE,
        {
            "queue_name": "default",
            "outcome": "completed",
            "age": 0.0,
            "after_time": datetime(2024, 1, 1, tzinfo=UTC),
            "after_id": uuid.UUID(int=0),
            "wanted": BATCH,
        },
        frozenset({"tasks_finished_idx"}),
        1_000,
    ),
    "events past their retention": Case(
        queues.DELETE_EVENTS,
        {"queue_name": "default", "age": 3600.0, "wanted": BATCH},
        frozenset({"events_emitted_at_idx"}),
        100,
        0,
    ),
    "poll": Case(waits.POLL_TASKS, {"task_ids": task_ids(FINISHED)}, frozenset({"tasks_pkey"}), 1_000),
}


AFTER_ALL = datetime(2200, 1, 1, tzinfo=UTC)
LISTS = {
    "the newest": Case(page(TaskFilter(), recent=True), {}, frozenset({"tasks_pkey"}), 1_000, 51),
    "none among the newest": Case(
        page(TaskFilter(state="failed"), recent=True), {}, frozenset({"tasks_pkey"}), 25_000, 0
    ),
    "of a name": Case(page(TaskFilter("other"), recent=True), {}, frozenset({"tasks_pkey"}), 25_000, 0),
    "all that failed": Case(page(TaskFilter(state="failed")), {}, frozenset({"tasks_finished_idx"}), 200, 0),
    "of a queue": Case(page(TaskFilter(queue_name="other")), {}, frozenset({"tasks_finished_idx"}), 200, 0),
    "running": Case(page(TaskFilter(state="running")), {}, frozenset({"tasks_claim_idx"}), 5_000, 51),
    "longest running": Case(page(TaskFilter(), "running"), {}, frozenset({"tasks_claim_idx"}), 5_000, 51),
    "running for long": Case(page(TaskFilter(running_longer_than=3600)), {}, frozenset({"tasks_claim_idx"}), 5_000, 0),
    "spawned long ago": Case(
        page(TaskFilter(spawned_before=datetime(1960, 1, 1, tzinfo=UTC))), {}, frozenset({"tasks_pkey"}), 100, 0
    ),
    "ended long ago": Case(
        page(TaskFilter(ended_before=datetime(1960, 1, 1, tzinfo=UTC))), {}, frozenset({"tasks_pkey"}), 100, 0
    ),
    "ended before now": Case(
        page(TaskFilter(state="completed", ended_before=AFTER_ALL)), {}, frozenset({"tasks_pkey"}), 5_000, 51
    ),
    "of an error, ended before now": Case(
        page(TaskFilter(error_name="OSError", ended_before=AFTER_ALL)), {}, frozenset({"tasks_finished_idx"}), 200, 0
    ),
    "the workers": Case(inspection.WORKERS, {}, frozenset({"tasks_claim_idx"}), 5_000, 1),
    "of a key": Case(page(TaskFilter(key="none")), {}, frozenset({"tasks_idempotency_idx"}), 100, 0),
    "of a parent": Case(page(TaskFilter(parent=task_id(0))), {}, frozenset({"tasks_parent_idx"}), 100, 0),
    "ended": Case(page(TaskFilter(ended_after=AFTER_ALL)), {}, frozenset({"tasks_finished_idx"}), 200, 0),
    "one task": Case(reading.infos(None), {"task_id": task_id(1)}, frozenset({"tasks_pkey"}), 50, 1),
    "its checkpoints": Case(
        history.CHECKPOINTS,
        {"task_id": task_id(1), "with_payloads": False},
        frozenset({"checkpoints_pkey"}),
        50,
        1,
    ),
    "its runs": Case(history.RUNS, {"task_id": task_id(1)}, frozenset({"runs_pkey"}), 50, 1),
    "the end of a window": Case(
        reading.WINDOW_END, {"begin": task_id(0), "size": 9_999}, frozenset({"tasks_pkey"}), 15_000, 1
    ),
    "a window": Case(
        reading.window(TaskFilter("none"), task_id(0), task_id(10_000)), {}, frozenset({"tasks_pkey"}), 15_000, 0
    ),
    "a window of a select": Case(
        reading.window(select(TaskRow.task_id).where(TaskRow.task_name == "none"), task_id(0), task_id(10_000)),
        {},
        frozenset({"tasks_pkey"}),
        15_000,
        0,
    ),
    "some that failed": Case(
        reading.some(TaskFilter(state="failed"), 10_001), {}, frozenset({"tasks_finished_idx"}), 200, 0
    ),
    "cancel many": Case(
        cancelling.cancel_many(),
        {"task_ids": task_ids(READY)},
        frozenset({"tasks_pkey", "tasks_parent_idx"}),
        8_000,
    ),
    "retry many": Case(
        cancelling.RETRY_MANY,
        {"task_ids": task_ids(FINISHED), "next_run_ids": task_ids(FINISHED), "new_max_attempts": None},
        frozenset({"tasks_pkey"}),
        2_000,
        0,
    ),
    "delete many": Case(
        queues.DELETE_TASKS,
        {"task_ids": task_ids(FINISHED)},
        frozenset({"tasks_pkey", "tasks_parent_idx", "checkpoints_pkey", "runs_pkey"}),
        8_000,
    ),
}
"""Lists of tasks and bulk operations. They read little, whatever the filter."""


@pytest.fixture(scope="module")
def large_database(durable_server: TestServer, durable_template_url: URL) -> Generator[str]:
    url = durable_server.create_database(durable_template_url)
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)

    async def fill() -> None:
        connection = await asyncpg.connect(plain)
        await connection.execute(
            FILL.format(
                batch=BATCH,
                worker=WORKER,
                finished=FINISHED,
                sleeping=SLEEPING,
                waiting=WAITING,
                running=RUNNING,
                ready=READY,
            )
        )
        await connection.close()

    asyncio.run(fill())
    yield plain
    durable_server.drop_database(url)


@pytest.fixture(scope="module", params=["no statistics", "statistics"])
def planned_database(large_database: str, request: pytest.FixtureRequest) -> str:
    """As it is right after a bulk of inserts, and then as autovacuum leaves it."""

    async def analyze() -> None:
        connection = await asyncpg.connect(large_database)
        await connection.execute("ANALYZE")
        await connection.close()

    if request.param == "statistics":
        asyncio.run(analyze())
    return large_database


@pytest.fixture(params=["custom", "generic"])
async def connection(planned_database: str, request: pytest.FixtureRequest) -> AsyncGenerator[Any]:
    """The plans for these very parameters, and for any: prepared statements go from the one to the other by themselves."""
    connection = await asyncpg.connect(planned_database)
    await connection.execute(f"SET plan_cache_mode = force_{request.param}_plan")
    yield connection
    await connection.close()


def literal(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case list():
            elements = ("NULL" if element is None else f'"{element}"' for element in value)
            return "'{" + ",".join(elements) + "}'"
        case _:
            return f"'{value}'"


async def explained(connection: Any, case: Case) -> dict[str, Any]:
    """The plan with what it did; without a trace in the database."""
    compiled: Any = case.statement.compile(dialect=dialect())  # type: ignore[no-untyped-call]
    parameters = {**compiled.params, **case.parameters}
    written = ", ".join(literal(parameters[name]) for name in compiled.positiontup or ())
    transaction = connection.transaction()
    await transaction.start()
    # The plan stays as it is, and the leader executes its parallel part: parallel workers read the catalogs anew, two of
    # them 138 blocks, which EXPLAIN counts if they begin before the leader has ended.
    await connection.execute("SET LOCAL max_parallel_workers = 0")
    await connection.execute(f"PREPARE statement AS {compiled}")
    arguments = f"({written})" if written else ""
    plan = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE statement{arguments}")
    await transaction.rollback()
    await connection.execute("DEALLOCATE statement")
    found: dict[str, Any] = json.loads(plan)[0]["Plan"]
    return found


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def done(plan: dict[str, Any]) -> int:
    """How many rows a statement gives, or tells the number of."""
    if plan["Node Type"] == "Aggregate":
        (plan,) = (node for node in plan["Plans"] if node["Parent Relationship"] == "Outer")
    rows: int = plan["Actual Rows"]
    return rows


@pytest.mark.parametrize("name", CASES)
async def test_a_statement_touches_little_of_large_tables(connection: Any, name: str) -> None:
    case = CASES[name]
    plan = await explained(connection, case)
    found = list(nodes(plan))
    assert done(plan) == case.rows
    scanned = {node["Relation Name"] for node in found if node["Node Type"] == "Seq Scan"}
    assert not scanned & LARGE
    assert case.indexes <= {node["Index Name"] for node in found if "Index Name" in node}
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < case.blocks
    filters = ("Rows Removed by Filter", "Rows Removed by Join Filter")
    wasted = sum(node.get(each, 0) * node["Actual Loops"] for node in found for each in filters)
    assert wasted <= 2 * len(RUNNING)


UNTIL_ANALYZED = {"the end of a window", "delete many", "ended before now"}
"""These read whole tables until autovacuum has analyzed what a bulk of inserts has brought."""
ON_EARLIER_SERVERS = {("all that failed", "no statistics"), ("some that failed", "no statistics"), ("ended", "generic")}
"""Lists that read whole tables before PostgreSQL 18, with what is known to the planner when they do."""


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_reads_little_of_large_tables(connection: Any, name: str, request: pytest.FixtureRequest) -> None:
    case = LISTS[name]
    if name in UNTIL_ANALYZED and "no statistics" in request.node.name:
        return
    earlier = connection.get_server_version().major < 18
    if earlier and any(name == each and known in request.node.name for each, known in ON_EARLIER_SERVERS):
        return
    if name == "of a queue" and "generic" in request.node.name:
        # Where all tasks are of one queue, a plan for any queue reads all; the server does not choose it.
        return
    plan = await explained(connection, case)
    found = list(nodes(plan))
    assert plan["Actual Rows"] == case.rows
    assert not {node["Relation Name"] for node in found if node["Node Type"] == "Seq Scan"} & LARGE
    assert case.indexes <= {node["Index Name"] for node in found if "Index Name" in node}
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < case.blocks


OF_INDEXES = {
    "tasks_name_idx": TaskFilter("other"),
    "tasks_created_at_idx": TaskFilter(spawned_after=AFTER_ALL),
    "tasks_limit_key_idx": TaskFilter(limit_key="none"),
    "tasks_error_idx": TaskFilter(error_name="OSError"),
}
"""The indexes that the guide on reading offers, and lists that need them."""


@pytest.mark.parametrize("state", [None, "failed", "pending"])
@pytest.mark.parametrize("index", OF_INDEXES)
async def test_lists_use_the_indexes_of_the_guide(large_database: str, index: str, state: str | None) -> None:
    (created,) = re.findall(r"```sql\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    where = OF_INDEXES[index]
    # With a state, an index of the engine may be as good.
    case = Case(page(where), {}, frozenset({index}), 200, 0)
    if state is not None:
        case = Case(page(replace(where, state=state)), {}, frozenset(), 200, 0)
    connection = await asyncpg.connect(large_database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(created.replace("CONCURRENTLY ", ""))
    await connection.execute("ANALYZE durable.tasks")
    plan = await explained(connection, case)
    await transaction.rollback()
    await connection.close()
    assert plan["Actual Rows"] == case.rows
    assert case.indexes <= {node["Index Name"] for node in nodes(plan) if "Index Name" in node}
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < case.blocks


@pytest.mark.slow
async def test_plans_do_not_outlive_the_size_of_the_tables(
    durable: Durable, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows are best found by reading them all; what was prepared then must not go on so with thousands."""
    monkeypatch.setattr("durable_sa.database.direct.REPLAN_INTERVAL", 0.0)
    monkeypatch.setattr("durable_sa.database.direct.REPLAN_WAIT", 0.01)
    channel = DedicatedConnection(durable.database)

    @durable.task
    async def work(ctx: TaskContext, number: int) -> None: ...

    spawned = await durable.spawn(work, 1)
    await channel.execute(text("ALTER TABLE durable.tasks SET (autovacuum_enabled = false)"))
    await channel.execute(text("VACUUM ANALYZE durable.tasks"))
    find = fencing.FENCE_STATUS, {"task_ids": [spawned.task_id], "fences": [1]}

    async def rows_read() -> int:
        ((version,),) = await channel.execute(text("SELECT current_setting('server_version_num')::int"))
        if version >= 150_000:
            await channel.execute(text("SELECT pg_stat_force_next_flush()"))
        else:
            # A session reports to the collector of version 14 at the end of a transaction, twice a second at most, and
            # the collector writes as often what it knows.
            await asyncio.sleep(0.6)
            await channel.execute(text("SELECT 1"))
            await asyncio.sleep(1.2)
        statistics = text("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relid = 'durable.tasks'::regclass")
        ((number,),) = await channel.execute(statistics)
        return int(number)

    try:
        for _ in range(20):
            await channel.execute(*find)
        assert await rows_read() >= 20
        await durable.spawn_many([(work, number) for number in range(20_000)])
        for _ in range(20):
            await channel.execute(*find)
        before = await rows_read()
        await channel.execute(*find)
        assert await rows_read() == before
    finally:
        await channel.close()


@pytest.mark.parametrize("name", ["complete", "fail", "suspend"])
async def test_a_plan_for_empty_tables_compares_no_run_with_each_task(engine: AsyncEngine, name: str) -> None:
    """It is kept for the first second of a worker, while the tables may grow."""
    connection = await asyncpg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    found = list(nodes(await explained(connection, CASES[name])))
    await connection.close()
    assert not [node for node in found if "fences" in node.get("Join Filter", "")]
