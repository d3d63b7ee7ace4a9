"""Claiming: every attempt by one worker, in order, without waiting for anybody, whatever else is in the tables."""

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from durable_sa import Durable, Spawn, TaskContext, TaskRow, TaskTimeout
from durable_sa.database.connections import Database
from durable_sa.ids import new_id
from durable_sa.models import Run, WorkerRow
from durable_sa.statements import checkpoints, claiming, waits
from durable_sa.worker.cursors import ClaimCursors

from ..support import eventually
from . import program
from .conftest import Ledger, Rows, Start


class Claimer:
    """A worker's claim statement without the worker."""

    def __init__(self, database: Database, queue_names: Sequence[str] = ("default",)) -> None:
        self._database = database
        self._lanes = ClaimCursors(queue_names)
        self._queue_names = queue_names
        self.worker_id = new_id()

    async def register(self, seconds: float = 60.0) -> None:
        await self._database.execute(
            claiming.REGISTER_WORKER,
            {
                "worker_id": self.worker_id,
                "name": "claimer",
                "queue_names": list(self._queue_names),
                "claim_timeout": seconds,
            },
        )

    def parameters(self, wanted: int, *task_names: str) -> dict[str, Any]:
        return {
            "worker_id": self.worker_id,
            "wanted": wanted,
            "task_names": list(task_names),
            **self._lanes.parameters(full_scan=True),
        }

    async def claim(self, wanted: int, *task_names: str, suspect: bool = False) -> list[uuid.UUID]:
        statement = claiming.CLAIM_SUSPECT if suspect else claiming.CLAIM
        rows = await self._database.execute(statement, self.parameters(wanted, *task_names))
        return [row.task_id for row in rows]


@pytest.fixture
async def claimer(durable: Durable) -> Claimer:
    claimer = Claimer(durable.database)
    await claimer.register()
    return claimer


@pytest.mark.slow
async def test_of_ten_thousand_tasks_each_is_claimed_by_one_of_three_processes(
    durable: Durable, start_process: Start, sql: Rows, ledger: Ledger
) -> None:
    wanted = 10_000
    processes = [await start_process(f"worker-{number}", concurrency=50) for number in range(3)]
    for _ in range(10):
        await durable.spawn_many([(program.count, None)] * (wanted // 10))

    async def finished() -> bool:
        rows = await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'completed'")
        return bool(rows[0][0] == wanted)

    await eventually(finished, within=60)
    for process in processes:
        process.process.terminate()
    assert [await process.exit_code() for process in processes] == [0, 0, 0]

    counts = [entry["count"] for entry in ledger.entries("executed")]
    assert sum(counts) == wanted
    assert len([count for count in counts if count > 0]) > 1
    # A claim raises the fence by one, and so does the completion.
    histories = await sql("SELECT attempt, fence, failures, count(*) FROM durable.tasks GROUP BY 1, 2, 3")
    assert histories == [(1, 2, 0, wanted)]
    assert await sql("SELECT state, attempt, count(*) FROM durable.runs GROUP BY 1, 2") == [("completed", 1, wanted)]
    assert await sql("SELECT count(*) FROM durable.workers") == [(0,)]


async def test_claims_pass_over_locked_rows_without_waiting(
    durable: Durable, claimer: Claimer, engine: AsyncEngine
) -> None:
    held = (await durable.spawn_by_name("some", unchecked=True)).task_id
    free = (await durable.spawn_by_name("some", unchecked=True)).task_id
    async with engine.connect() as connection, connection.begin():
        await connection.execute(select(TaskRow.task_id).where(TaskRow.task_id == held).with_for_update())
        async with asyncio.timeout(20):
            assert await claimer.claim(10, "some") == [free]
    assert await claimer.claim(10, "some") == [held]


async def test_claims_neither_wait_for_nor_pass_over_rows_that_a_foreign_key_refers_to(
    durable: Durable, claimer: Claimer, engine: AsyncEngine
) -> None:
    spawned = await durable.spawn_by_name("some", unchecked=True)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (task_id uuid REFERENCES durable.tasks)"))
    async with engine.connect() as connection, connection.begin():
        await connection.execute(text("INSERT INTO orders VALUES (:task_id)"), {"task_id": spawned.task_id})
        async with asyncio.timeout(20):
            assert await claimer.claim(10, "some") == [spawned.task_id]


async def test_only_registered_names_are_claimed(durable: Durable) -> None:
    @durable.task
    async def known(ctx: TaskContext) -> str:
        return "done"

    foreign = [await durable.spawn_by_name("of-the-next-release", unchecked=True) for _ in range(5)]
    spawned = await durable.spawn(known)
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=5)
        assert result.output == "done"
        late = durable.tasks
        assert "of-the-next-release" not in late
        await durable.wait_for_result(await durable.spawn(known), timeout=5)
    async with durable.database.transaction() as connection:
        rows = await connection.execute(
            select(TaskRow.state, TaskRow.attempt, TaskRow.fence).where(
                TaskRow.task_id.in_([spawn.task_id for spawn in foreign])
            )
        )
        assert set(rows.all()) == {("pending", 0, 0)}


async def test_a_task_registered_while_the_worker_runs_is_claimed(durable: Durable) -> None:
    spawned = await durable.spawn_by_name("late", unchecked=True)
    async with durable.worker(poll_interval=0.05, listen=False):

        @durable.task
        async def late(ctx: TaskContext) -> int:
            return 1

        assert (await durable.wait_for_result(spawned, timeout=5)).output == 1


async def test_smaller_priorities_come_first_and_older_tasks_before_younger(durable: Durable) -> None:
    order: list[str] = []

    @durable.task
    async def note(ctx: TaskContext, label: str) -> None:
        order.append(label)

    spawns = []
    for number in range(3):
        for priority in (5, -32768, 0, 32767):
            spawns.append(Spawn(note, f"{priority}/{number}", priority=priority))
            await durable.spawn_many(spawns[-1:])
    async with durable.worker(concurrency=1):
        await eventually(lambda: len(order) == len(spawns))
    assert order == [f"{priority}/{number}" for priority in (-32768, 0, 5, 32767) for number in range(3)]


async def test_queues_are_claimed_in_the_order_of_the_list(durable: Durable) -> None:
    order: list[str] = []

    @durable.task
    async def note(ctx: TaskContext, label: str) -> None:
        order.append(label)

    for name in ("a", "b", "c"):
        await durable.create_queue(name)
        for number in range(3):
            # A queue further up in the list goes before any priority further down.
            await durable.spawn(note, f"{name}{number}", queue_name=name, priority={"a": -5, "b": 0, "c": 5}[name])
    async with durable.worker(queue_names=["c", "a"], concurrency=1):
        await eventually(lambda: len(order) == 6)
    assert order == ["c0", "c1", "c2", "a0", "a1", "a2"]
    assert await durable.count_unclaimed_ready_tasks("b") == 3


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.slow
async def test_a_delay_is_kept_to_fractions_of_a_second(durable: Durable, sql: Rows, listen: bool) -> None:
    @durable.task
    async def now(ctx: TaskContext) -> None:
        return None

    async with durable.worker(listen=listen, poll_interval=0.25):
        await durable.wait_for_result(await durable.spawn(now), timeout=5)
        spawned = [await durable.spawn(now, delay=delay) for delay in (0.2, 0.45, timedelta(milliseconds=700))]
        for spawn in spawned:
            await durable.wait_for_result(spawn, timeout=5)
    lateness = await sql(
        "SELECT extract(epoch FROM started_at - available_at)::float FROM durable.tasks"
        " WHERE available_at > created_at + interval '0.1 s'"
    )
    assert len(lateness) == 3
    # With hints the worker knows when the next task is due; without, it looks every 0.25 s.
    assert all(0 <= late < (0.15 if listen else 0.4) for (late,) in lateness), lateness


@pytest.mark.slow
async def test_no_more_is_claimed_than_can_start(durable: Durable, sql: Rows) -> None:
    release = asyncio.Event()
    most = 0

    @durable.task
    async def hold(ctx: TaskContext) -> None:
        await release.wait()

    @durable.task
    async def instant(ctx: TaskContext) -> None:
        return None

    await durable.spawn_many([(hold, None)] * 20)
    async with durable.worker(concurrency=3):
        running = "SELECT count(*) FROM durable.tasks WHERE state = 'running'"
        for _ in range(30):
            most = max(most, (await sql(running))[0][0])
            await asyncio.sleep(0.01)
        assert most == 3
        release.set()
        await eventually(lambda: _count_finished(sql, 20))
    async with durable.worker(concurrency=10, batch_size=2):
        release.clear()
        await durable.spawn_many([(hold, None)] * 20)

        async def ten() -> bool:
            return bool((await sql(running))[0][0] == 10)

        await eventually(ten)
        release.set()
        await eventually(lambda: _count_finished(sql, 40))


async def test_no_more_is_claimed_at_once_than_the_batch_size(
    durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    @durable.task
    async def instant(ctx: TaskContext) -> None:
        return None

    claimed: list[int] = []
    async with durable.worker(concurrency=10, batch_size=2) as worker:
        execute = worker._claims_connection.execute

        async def counted(statement: Any, parameters: Any) -> Any:
            rows = await execute(statement, parameters)
            if statement is claiming.CLAIM:
                claimed.append(len(rows))
            return rows

        monkeypatch.setattr(worker._claims_connection, "execute", counted)
        for spawned in await durable.spawn_many([(instant, None)] * 9):
            await durable.wait_for_result(spawned, timeout=10)
    assert sum(claimed) == 9
    assert max(claimed) == 2


async def _count_finished(sql: Rows, wanted: int) -> bool:
    rows = await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'completed'")
    return bool(rows[0][0] == wanted)


POISONS = {
    "params of another form": "params = '[1, {\"deep\": null}]'",
    "params that are JSON null": "params = 'null'",
    "no params": "params = NULL",
    "headers that are no object": "headers = '[1]'",
    "an idempotency key": "idempotency_key = 'k'",
    "the longest times": "retry_kind = 'exponential', retry_base_delay = 3155760000, retry_factor = 1000, "
    "retry_max_backoff = 3155760000, max_running_time = '36525 days', max_attempts = 2147483647",
    "failures beyond counting": "failures = 2147483646, max_attempts = 2147483647",
    "lease losses beyond counting": "lease_losses = 2147483646",
    "an attempt beyond counting": "attempt = 2147483646",
    "a fence beyond most": "fence = 9223372036854775000",
    "a parent that is not there": "parent_task_id = gen_random_uuid()",
    "a time long gone": "available_at = '0001-01-02 00:00:00+00'",
    "a time before Christ": "available_at = '4000-01-01 00:00:00+00 BC'",
    "an infinite past": "available_at = '-infinity'",
    "an infinite future": "available_at = 'infinity'",
    "a future beyond counting": "available_at = '20000-01-01 00:00:00+00'",
    "an infinite limit": "cancel_at = 'infinity'",
    "a creation before Christ": "created_at = '4000-01-01 00:00:00+00 BC'",
    "a first start before Christ": "first_started_at = '4000-01-01 00:00:00+00 BC'",
    "a limit before Christ": "cancel_at = '4000-01-01 00:00:00+00 BC'",
}


@pytest.mark.slow
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
async def test_a_poisoned_row_stops_nobody(durable: Durable, sql: Rows, poison: str) -> None:
    @durable.task(max_attempts=1)
    async def careful(ctx: TaskContext, number: int) -> int:
        assert isinstance(number, int)
        return number

    poisoned = await durable.spawn(careful, 0)
    healthy = [await durable.spawn(careful, number) for number in range(1, 6)]
    # What the tables refuse harms nobody either.
    with contextlib.suppress(IntegrityError):
        await sql(f"UPDATE durable.tasks SET {poison} WHERE task_id = :task_id", task_id=poisoned.task_id)
    async with durable.worker(concurrency=10):
        results = [await durable.wait_for_result(spawn, timeout=10) for spawn in healthy]
        assert [result.output for result in results] == [1, 2, 3, 4, 5]
        # And again, with the row having been seen.
        again = await durable.spawn(careful, 6)
        assert (await durable.wait_for_result(again, timeout=10)).output == 6
        await durable.wait_for_result(await durable.spawn(careful, 7, delay=0.05), timeout=10)


@pytest.mark.parametrize("poison", ["failures = 2147483647", "attempt = 2147483647", "fence = 9223372036854775807"])
async def test_a_row_whose_numbers_overflow_stops_nobody_for_long(durable: Durable, sql: Rows, poison: str) -> None:
    @durable.task
    async def fail(ctx: TaskContext, number: int) -> int:
        if number == 0:
            raise ValueError(number)
        return number

    poisoned = await durable.spawn(fail, 0)
    healthy = [await durable.spawn(fail, number) for number in range(1, 6)]
    await sql(f"UPDATE durable.tasks SET {poison} WHERE task_id = :task_id", task_id=poisoned.task_id)
    async with durable.worker(concurrency=10):
        results = [await durable.wait_for_result(spawn, timeout=10) for spawn in healthy]
        assert [result.output for result in results] == [1, 2, 3, 4, 5]


@pytest.mark.slow
async def test_a_recorded_step_that_no_longer_decodes_fails_its_task_alone(durable: Durable, sql: Rows) -> None:
    @durable.task(max_attempts=1)
    async def resumed(ctx: TaskContext) -> int:
        number = await ctx.step("number", _one)
        await ctx.sleep_for("pause", 0.3)
        return number

    async with durable.worker(concurrency=10):
        spawns = [await durable.spawn(resumed) for _ in range(4)]
        await eventually(lambda: _asleep(sql, 4))
        await sql(
            "UPDATE durable.checkpoints SET value = '\"many\"' WHERE name = 'number' AND task_id = :task_id",
            task_id=spawns[0].task_id,
        )
        await sql(
            "UPDATE durable.checkpoints SET value = NULL WHERE name = 'pause' AND task_id = :task_id",
            task_id=spawns[1].task_id,
        )
        results = [await durable.wait_for_result(spawn, timeout=10) for spawn in spawns]
    assert results[0].status == "failed"
    assert [result.output for result in results[2:]] == [1, 1]


async def _one() -> int:
    return 1


async def _asleep(sql: Rows, wanted: int) -> bool:
    rows = await sql("SELECT count(*) FROM durable.tasks WHERE state = 'sleeping'")
    return bool(rows[0][0] == wanted)


class _Hidden:
    """A worker that has claimed far, so that its floor is above what comes up below it without a hint."""

    def __init__(self, durable: Durable) -> None:
        self._durable = durable

        @durable.task
        async def quick(ctx: TaskContext) -> None:
            return None

        self.task = quick

    async def advance(self) -> None:
        for _ in range(3):
            await self._durable.wait_for_result(await self._durable.spawn(self.task), timeout=5)


INSERT = """
    INSERT INTO durable.tasks (task_id, run_id, queue_name, task_name, priority, available_at, max_attempts, retry_kind,
        retry_base_delay, retry_factor, retry_max_backoff, retry_jitter)
    VALUES (:task_id, gen_random_uuid(), 'default', 'quick', :priority, clock_timestamp() - :age * interval '1 s', 1,
        'none', 0, 1, 0, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("priority", "age"), [(0, 0.0), (0, 3600.0), (-7, 0.0), (-7, 3600.0)])
async def test_what_appears_below_the_floor_without_a_hint_is_found(
    durable: Durable, sql: Rows, priority: int, age: float
) -> None:
    hidden = _Hidden(durable)
    async with durable.worker(listen=False, poll_interval=0.1):
        await hidden.advance()
        task_id = new_id()
        await sql(INSERT, task_id=task_id, priority=priority, age=age)
        await durable.wait_for_result(task_id, timeout=10)


@pytest.mark.slow
async def test_what_no_hint_tells_of_is_found_among_many_hints(durable: Durable, sql: Rows) -> None:
    """Each of them is a reason to claim from the floor, and the look below it waits for a quiet moment, but not long."""
    hidden = _Hidden(durable)
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            await asyncio.gather(*(durable.spawn(hidden.task) for _ in range(5)))

    async with durable.worker(concurrency=100) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        await hidden.advance()
        loading = asyncio.create_task(load())
        try:
            for _ in range(2):
                task_id = new_id()
                await sql(INSERT, task_id=task_id, priority=0, age=3600.0)
                await durable.wait_for_result(task_id, timeout=4.0)
        finally:
            stop.set()
            await loading


async def test_a_late_commit_is_announced_and_found(
    durable: Durable, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.claims.LISTENING_POLL_INTERVAL", 600)
    hidden = _Hidden(durable)
    async with durable.worker():
        async with engine.connect() as connection:
            transaction = await connection.begin()
            late = await durable.spawn_with(connection, hidden.task, priority=-1)
            also = await durable.spawn_with(connection, hidden.task)
            await hidden.advance()
            await transaction.commit()
        await durable.wait_for_result(late, timeout=20)
        await durable.wait_for_result(also, timeout=20)


@pytest.mark.slow
async def test_a_late_commit_is_found_while_the_worker_never_rests(durable: Durable, engine: AsyncEngine) -> None:
    hidden = _Hidden(durable)

    @durable.task
    async def busy(ctx: TaskContext) -> None:
        await asyncio.sleep(0.005)

    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            if await durable.count_unclaimed_ready_tasks() < 50:
                await durable.spawn_many([(busy, None)] * 100)
            await asyncio.sleep(0.01)

    async with durable.worker(listen=False, poll_interval=0.1, concurrency=5):
        loading = asyncio.create_task(load())
        async with engine.connect() as connection:
            transaction = await connection.begin()
            late = await durable.spawn_with(connection, hidden.task)
            await hidden.advance()
            await transaction.commit()
        await durable.wait_for_result(late, timeout=3.0)
        stop.set()
        await loading


@pytest.mark.slow
async def test_a_row_that_was_locked_in_passing_is_found(durable: Durable, engine: AsyncEngine) -> None:
    hidden = _Hidden(durable)
    held = await durable.spawn(hidden.task, delay=0.3)
    async with engine.connect() as connection:
        transaction = await connection.begin()
        await connection.execute(select(TaskRow.task_id).where(TaskRow.task_id == held.task_id).with_for_update())
        async with durable.worker(listen=False, poll_interval=0.1):
            await asyncio.sleep(0.4)
            await hidden.advance()
            await transaction.rollback()
            await durable.wait_for_result(held, timeout=10)


@pytest.mark.slow
async def test_a_paused_queue_yields_nothing_until_it_is_resumed(durable: Durable, sql: Rows) -> None:
    hidden = _Hidden(durable)
    async with durable.worker(listen=False, poll_interval=0.05):
        await hidden.advance()
        await sql("UPDATE durable.queues SET paused_at = clock_timestamp()")
        spawned = await durable.spawn(hidden.task)
        await asyncio.sleep(0.3)
        assert await durable.count_unclaimed_ready_tasks() == 0
        waiting = await durable.get_task_result(spawned)
        assert waiting is not None
        assert waiting.status == "pending"
        await sql("UPDATE durable.queues SET paused_at = NULL")
        await durable.wait_for_result(spawned, timeout=10)


async def explain(connection: AsyncConnection, statement: Any, parameters: dict[str, Any]) -> str:
    """The plan of a statement as the server executes it."""
    compiled = statement.compile(dialect=connection.dialect)
    rows = await connection.exec_driver_sql(
        f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF) {compiled}",
        tuple(compiled.construct_params(parameters)[name] for name in compiled.positiontup or ()),
    )
    return "\n".join(row[0] for row in rows)


@pytest.mark.slow
async def test_a_claim_reads_only_what_it_takes(durable: Durable, claimer: Claimer, sql: Rows) -> None:
    """Finished, sleeping and waiting tasks by the ten thousand make no difference."""
    await sql(
        """
        INSERT INTO durable.tasks (task_id, run_id, queue_name, task_name, available_at, max_attempts, retry_kind,
            retry_base_delay, retry_factor, retry_max_backoff, retry_jitter, state, outcome, finished_at)
        SELECT gen_random_uuid(), gen_random_uuid(), 'default', 'some',
            CASE WHEN kind = 'waiting' THEN NULL WHEN kind = 'sleeping' THEN now() + interval '1 day'
                ELSE now() - interval '1 s' * number END,
            1, 'none', 0, 1, 0, 0,
            CASE kind WHEN 'ready' THEN 'pending' WHEN 'finished' THEN 'completed' ELSE 'sleeping' END,
            CASE kind WHEN 'finished' THEN 'completed' END,
            CASE kind WHEN 'finished' THEN now() END
        FROM generate_series(1, 20000) AS number,
            unnest(CASE WHEN number <= 1000 THEN '{ready,finished,sleeping,waiting}'::text[]
                ELSE '{finished,sleeping,waiting}'::text[] END) AS kind
        """
    )
    await sql("ANALYZE durable.tasks")
    async with durable.engine.connect() as connection:
        plan = await explain(connection, claiming.CLAIM, claimer.parameters(10, "some"))
        await connection.rollback()
    assert "tasks_claim_idx" in plan, plan
    assert "Seq Scan on tasks" not in plan, plan
    # Ten rows are taken and no others are looked at.
    assert "Rows Removed by Filter" not in plan.split("open_lanes")[-1], plan
    executed = plan.split("Planning:")[0].splitlines()
    buffers = max(int(part.split("hit=")[1].split()[0]) for part in executed if "shared hit=" in part)
    assert buffers < 400, plan


async def test_a_claim_changes_no_index(durable: Durable, observer: AsyncEngine, sql: Rows) -> None:
    # The server counts what a connection has done when that ends, at the latest.
    claimer = Claimer(Database(observer))
    await claimer.register()
    for _ in range(50):
        await durable.spawn_by_name("some", unchecked=True)
    before = await sql("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'tasks'")
    assert len(await claimer.claim(50, "some")) == 50

    async def counted() -> bool:
        rows = await sql("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'tasks'")
        updates, hot = (rows[0][number] - before[0][number] for number in (0, 1))
        return bool(updates == 50 and hot == 50)

    await eventually(counted)


async def test_a_worker_that_was_declared_lost_claims_nothing_more(
    durable: Durable, claimer: Claimer, sql: Rows
) -> None:
    await durable.spawn_by_name("some", unchecked=True)
    await sql("UPDATE durable.workers SET lost_at = clock_timestamp() WHERE worker_id = :id", id=claimer.worker_id)
    assert await claimer.claim(1, "some") == []


async def test_concurrent_claims_share_the_tasks_among_them(durable: Durable) -> None:
    for _ in range(4):
        await durable.spawn_many([(program.count, None)] * 250)
    claimers = [Claimer(durable.database) for _ in range(5)]
    for claimer in claimers:
        await claimer.register()
    claimed: list[uuid.UUID] = []

    async def drain(claimer: Claimer) -> None:
        while batch := await claimer.claim(7, "count"):
            claimed.extend(batch)

    await asyncio.gather(*(drain(claimer) for claimer in claimers))
    assert len(claimed) == len(set(claimed)) == 1000
    async with durable.database.transaction() as connection:
        holders = set((await connection.execute(select(TaskRow.claimed_by).distinct())).scalars())
        assert holders <= {claimer.worker_id for claimer in claimers}
        assert set((await connection.execute(select(WorkerRow.worker_id))).scalars()) >= holders
        assert (await connection.execute(select(Run))).all() == []


async def test_a_timeout_that_another_worker_notes_while_a_run_is_loaded_is_not_begun_anew(
    durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> str:
        try:
            return str(await ctx.await_event("never", timeout=60))
        except TaskTimeout:
            return "timeout"

    spawned = await durable.spawn(work)
    async with durable.worker(listen=False, poll_interval=0.05) as worker:
        await eventually(lambda: sql("SELECT 1 FROM durable.waits"))
        execute = worker._shared_connection.execute
        noted: list[bool] = []

        async def interrupted(statement: Any, parameters: Any) -> Any:
            if statement is waits.RESOLVE and not noted:
                return []  # the other one has the row locked
            rows = await execute(statement, parameters)
            if statement is checkpoints.LOAD_JOURNALS and not noted:
                noted.append(True)
                await durable.database.execute(waits.RESOLVE, {"task_ids": [spawned.task_id]})
            return rows

        monkeypatch.setattr(worker._shared_connection, "execute", interrupted)
        await sql("UPDATE durable.waits SET due_at = now()")
        await sql("UPDATE durable.tasks SET available_at = now()")
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "timeout"
    assert noted
