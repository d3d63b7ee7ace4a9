"""Leases: a live worker keeps its runs however long they take, a silent one loses them, and knows it in time."""

import asyncio
import math
import signal
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import ChildFailed, Durable, InvalidConfiguration, TaskContext, TaskRow, TaskStatus
from durable_sa.ids import new_id
from durable_sa.models import Run, WorkerRow
from durable_sa.policies import MAX_LOST_WORKERS, SUSPECT_AFTER
from durable_sa.statements import claiming
from durable_sa.worker.leases import Heartbeat

from ..support import eventually
from . import program
from .conftest import Ledger, Rows, Start
from .program import Work
from .test_claims import Claimer

LIMIT = SUSPECT_AFTER + MAX_LOST_WORKERS
CLOCK = "extract(epoch FROM clock_timestamp())::float"


@pytest.mark.slow
async def test_a_step_may_take_longer_than_the_claim_timeout(durable: Durable, sql: Rows) -> None:
    """Asynchronous, in a thread, and in a synchronous task: no worker takes a run from a live one."""
    calls: list[str] = []

    async def wait() -> None:
        calls.append("wait")
        await asyncio.sleep(2.5)

    def block() -> None:
        calls.append("block")
        time.sleep(2.5)

    @durable.task
    async def waiting(ctx: TaskContext) -> None:
        await ctx.step("wait", wait)

    @durable.task
    async def threaded(ctx: TaskContext) -> None:
        await ctx.step("block", block)

    @durable.task
    def synchronous(ctx: Any) -> None:
        ctx.step("block", block)

    spawned = [await durable.spawn(task) for task in (waiting, threaded, synchronous)]
    async with durable.worker(claim_timeout=1, concurrency=3):
        await eventually(lambda: len(calls) == 3)
        async with durable.worker(claim_timeout=1, concurrency=3):
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=10)).status == "completed"
    assert sorted(calls) == ["block", "block", "wait"]
    assert await sql("SELECT DISTINCT attempt, fence, lease_losses FROM durable.tasks") == [(1, 2, 0)]


@pytest.mark.slow
async def test_a_blocked_event_loop_is_taken_over_and_writes_nothing_more(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    # Both have started before one is blocked, because a start may take longer than the block.
    workers = {name: await start_process(name, claim_timeout=1) for name in ("one", "two")}
    spawned = await durable.spawn(program.block, 5.0)
    await eventually(lambda: ledger.entries("begin"))
    claimed = "SELECT claimed_by, name FROM durable.tasks JOIN durable.workers ON claimed_by = worker_id"
    ((first_id, blocked_name),) = await sql(claimed)
    blocked = workers.pop(blocked_name)
    (other,) = workers.values()
    result = await durable.wait_for_result(spawned, timeout=20)
    assert result.output == other.process.pid
    finished = await _dump(sql)
    await eventually(lambda: ledger.entries("unblocked"))

    # The first finds out by itself, and goes on as a new worker.
    async def back() -> bool:
        rows = await sql(select(WorkerRow.worker_id).where(WorkerRow.name == blocked_name, WorkerRow.lost_at.is_(None)))
        return [row for row in rows if row.worker_id != first_id] != []

    await eventually(back)
    other.send(signal.SIGTERM)
    assert await other.exit_code() == 0
    again = await durable.spawn(program.count)
    assert (await durable.wait_for_result(again, timeout=10)).output == blocked.process.pid

    assert await _dump(sql, spawned.task_id) == finished
    # Its step ran where the run was taken over, and nowhere else.
    assert [entry["pid"] for entry in ledger.entries("end")] == [other.process.pid]
    (task,) = await sql(
        select(TaskRow.attempt, TaskRow.failures, TaskRow.state).where(TaskRow.task_id == spawned.task_id)
    )
    assert task == (2, 0, "completed")
    runs = await sql(select(Run).where(Run.task_id == spawned.task_id).order_by(Run.attempt))
    assert [(run.attempt, run.state) for run in runs] == [(1, "failed"), (2, "completed")]
    assert runs[0].worker_id == first_id
    assert runs[0].error["name"] == "LeaseLost"
    assert str(first_id) in runs[0].error["message"]


async def _dump(sql: Rows, *task_ids: uuid.UUID) -> list[list[Any]]:
    """All that stands in the tables about tasks."""
    chosen = f"WHERE task_id IN ({', '.join(repr(str(task_id)) for task_id in task_ids)})" if task_ids else ""
    return [
        await sql(f"SELECT t::text FROM durable.{table} AS t {chosen} ORDER BY 1")
        for table in ("tasks", "runs", "checkpoints", "waits")
    ]


@pytest.mark.slow
async def test_a_stopped_process_is_taken_over_and_writes_nothing_after_it_goes_on(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    spawned = await durable.spawn(program.work, Work(steps=8, seconds=0.2))
    stopped = await start_process("stopped", claim_timeout=1)
    await eventually(lambda: len(ledger.entries("end")) >= 2)
    stopped.send(signal.SIGSTOP)
    began = len(ledger.entries("begin", pid=stopped.process.pid))
    other = await start_process("other", claim_timeout=1)
    result = await durable.wait_for_result(spawned, timeout=20)
    assert (result.output or [])[-1] == other.process.pid
    finished = await _dump(sql)
    workers = len(await sql("SELECT worker_id FROM durable.workers"))
    stopped.send(signal.SIGCONT)

    async def registered() -> bool:
        return len(await sql("SELECT worker_id FROM durable.workers")) == workers + 1

    await eventually(registered)
    assert await _dump(sql) == finished
    # One step may still begin, because the reply about the one before it may have lain in the stopped process' socket.
    assert len(ledger.entries("begin", pid=stopped.process.pid)) <= began + 1
    # No step that was recorded before the process stopped has run again.
    for number in range(8):
        attempts = sorted(entry["attempt"] for entry in ledger.entries("begin", step=number))
        assert attempts in ([1], [2], [1, 2])
    assert len(ledger.entries("begin")) <= 10

    other.end()
    again = await durable.spawn(program.count)
    assert (await durable.wait_for_result(again, timeout=10)).output == stopped.process.pid


@pytest.mark.slow
async def test_a_stop_shorter_than_the_lease_changes_nothing(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    spawned = await durable.spawn(program.work, Work(steps=5, seconds=0.2))
    stopped = await start_process("stopped", claim_timeout=4)
    await start_process("other", claim_timeout=4)
    await eventually(lambda: ledger.entries("begin"))
    holder = ledger.entries("begin")[0]["pid"]
    processes = {stopped.process.pid: stopped}
    if holder in processes:
        processes[holder].send(signal.SIGSTOP)
        await asyncio.sleep(1.0)
        processes[holder].send(signal.SIGCONT)
    await durable.wait_for_result(spawned, timeout=10)
    assert await sql("SELECT attempt, fence FROM durable.tasks") == [(1, 2)]


@pytest.mark.slow
async def test_a_killed_process_is_taken_over_within_its_lease(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    victim = await start_process("victim", claim_timeout=2, concurrency=20)
    spawned = [await durable.spawn(program.work, Work(steps=3, seconds=0.5)) for _ in range(10)]
    await eventually(lambda: len(ledger.entries("begin")) == 10)
    async with durable.worker(claim_timeout=2, concurrency=20):
        for task in program.TASKS:
            durable.register(task)
        victim.send(signal.SIGKILL)
        ((killed_at,),) = await sql(f"SELECT {CLOCK}")

        async def taken_over() -> bool:
            return await sql("SELECT count(*) FROM durable.tasks WHERE attempt = 2") == [(10,)]

        # In this process the tasks need a file to write to; that they were claimed is enough.
        await eventually(taken_over)
    rows = await sql(
        "SELECT extract(epoch FROM started_at)::float, failures,"
        " (SELECT count(*) FROM durable.runs WHERE runs.task_id = tasks.task_id"
        " AND runs.error->>'name' NOT IN ('LeaseLost', 'Released')) FROM durable.tasks"
    )
    assert all(failures == failed_here for _, failures, failed_here in rows)
    # The lease, and a moment to find out and to claim.
    assert max(started_at for started_at, _, _ in rows) < killed_at + 2.0 + 1.5
    runs = await sql(select(Run).where(Run.attempt == 1))
    assert {(run.state, run.error["name"]) for run in runs} == {("failed", "LeaseLost")}
    assert {str(run.worker_id) in run.error["message"] for run in runs} == {True}
    assert len(spawned) == len(runs)


@pytest.mark.slow
async def test_a_dead_workers_recorded_steps_are_not_run_again(
    durable: Durable, start_process: Start, ledger: Ledger
) -> None:
    victim = await start_process("victim", claim_timeout=1)
    spawned = await durable.spawn(program.work, Work(steps=4, seconds=0.15))
    await eventually(lambda: len(ledger.entries("end")) >= 2)
    victim.send(signal.SIGKILL)
    recorded = {entry["step"] for entry in ledger.entries("end")}
    await start_process("other", claim_timeout=1)
    result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status == "completed"
    again = {entry["step"] for entry in ledger.entries("begin", attempt=2)}
    # The last one may have ended without having been recorded.
    assert again.isdisjoint(recorded - {max(recorded)})


@pytest.mark.slow
async def test_code_that_kills_its_process_comes_to_an_end(durable: Durable, start_process: Start, sql: Rows) -> None:
    spawned = await durable.spawn(program.die, max_attempts=1)
    await sql("UPDATE durable.tasks SET lease_losses = :losses", losses=LIMIT - 2)
    first = await start_process("first", wait=False, claim_timeout=1)
    assert await first.exit_code() == -signal.SIGKILL
    await sql("UPDATE durable.workers SET expires_at = clock_timestamp()")
    second = await start_process("second", wait=False, claim_timeout=1)
    assert await second.exit_code() == -signal.SIGKILL
    await start_process("third", claim_timeout=1)
    result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status is TaskStatus.FAILED
    assert result.error is not None
    assert result.error.name == "LeaseLost"
    rows = await sql("SELECT attempt, failures, lease_losses FROM durable.tasks")
    assert rows == [(2, 0, LIMIT)]
    assert await sql("SELECT attempt, state FROM durable.runs ORDER BY 1") == [(1, "failed"), (2, "failed")]


@pytest.mark.slow
async def test_seven_lost_workers_in_a_row_and_not_six_fail_a_task(durable: Durable, sql: Rows) -> None:
    spawned = await durable.spawn_by_name("lethal", unchecked=True, max_attempts=1)
    async with durable.worker() as worker:
        for number in range(1, LIMIT + 1):
            claimer = Claimer(durable.database)
            await claimer.register()
            # From the third claim on the task is a suspect, and claimed as one.
            suspect = number > SUSPECT_AFTER
            assert await claimer.claim(1, "lethal", suspect=not suspect) == []
            assert await claimer.claim(1, "lethal", suspect=suspect) == [spawned.task_id]
            await sql("UPDATE durable.workers SET expires_at = clock_timestamp() WHERE name = 'claimer'")

            async def taken_over(losses: int = number) -> bool:
                worker._agenda.look_within(0.0)
                return await sql("SELECT lease_losses FROM durable.tasks") == [(losses,)]

            await eventually(taken_over)
            state = "failed" if number == LIMIT else "pending"
            assert await sql("SELECT state, failures, attempt FROM durable.tasks") == [(state, 0, number)]
    rows = await sql("SELECT attempt, state, error ->> 'name' FROM durable.runs ORDER BY attempt")
    assert rows == [(number, "failed", "LeaseLost") for number in range(1, LIMIT + 1)]
    # An operator may put it back, with fresh counts.
    await durable.retry_task(spawned)
    assert await sql("SELECT state, lease_losses FROM durable.tasks") == [("pending", 0)]


@pytest.mark.slow
async def test_a_task_given_up_for_its_lost_workers_tells_its_parent_and_takes_its_children_along(
    durable: Durable, sql: Rows
) -> None:
    @durable.task
    async def parent(ctx: TaskContext) -> str:
        try:
            await ctx.join(await ctx.spawn_by_name("child", "lethal"))
        except ChildFailed as error:
            return error.name
        return "joined"

    spawned = await durable.spawn(parent)
    async with durable.worker() as worker:
        claimer = Claimer(durable.database)
        await claimer.register()

        async def claimed() -> list[uuid.UUID]:
            return await claimer.claim(1, "lethal")

        (child,) = await eventually(claimed)
        grandchild = await durable.spawn_by_name("unknown", unchecked=True)
        await sql(
            "UPDATE durable.tasks SET parent_task_id = :child WHERE task_id = :id", child=child, id=grandchild.task_id
        )
        await sql(
            "UPDATE durable.tasks SET lease_losses = :losses WHERE task_id = :child", losses=LIMIT - 1, child=child
        )
        await sql("UPDATE durable.workers SET expires_at = now() WHERE worker_id = :id", id=claimer.worker_id)
        worker._agenda.look_within(0.0)
        # At once: a search for what was forgotten would find them as well, but many seconds later.
        assert (await durable.wait_for_result(spawned, timeout=6)).output == "LeaseLost"
        assert (await durable.wait_for_result(grandchild, timeout=6)).status is TaskStatus.CANCELLED


@pytest.mark.parametrize("progress", ["suspend", "fail"])
async def test_only_losses_in_a_row_count(durable: Durable, sql: Rows, progress: str) -> None:
    @durable.task(max_attempts=3)
    async def resilient(ctx: TaskContext) -> None:
        if progress == "suspend":
            await ctx.sleep_for("long", 3600)
        raise ValueError

    spawned = await durable.spawn(resilient)
    await sql("UPDATE durable.tasks SET lease_losses = :losses", losses=LIMIT - 1)
    async with durable.worker():

        async def counted_anew() -> bool:
            return await sql("SELECT lease_losses, claimed_by FROM durable.tasks") == [(0, None)]

        await eventually(counted_anew)
    assert (await durable.get_task_result(spawned)) is not None


@pytest.mark.slow
async def test_a_fatal_lease_timeout_ends_the_process_that_is_stuck(
    durable: Durable, start_process: Start, ledger: Ledger
) -> None:
    spawned = await durable.spawn(program.block, 30.0)
    stuck = await start_process("stuck", claim_timeout=1, fatal_on_lease_timeout=True)
    await eventually(lambda: ledger.entries("begin"))
    other = await start_process("other", claim_timeout=1)
    assert await stuck.exit_code() == 1
    assert (await durable.wait_for_result(spawned, timeout=10)).output == other.process.pid
    assert ledger.entries("unblocked") == []


@pytest.mark.slow
async def test_a_fatal_lease_timeout_ends_a_process_that_was_stopped_when_it_goes_on(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    """Its event loop turns again, and knows by its own clock, before a heartbeat can tell."""
    spawned = await durable.spawn(program.work, Work(steps=6, seconds=0.2))
    stopped = await start_process("stopped", claim_timeout=1, fatal_on_lease_timeout=True)
    await eventually(lambda: ledger.entries("end"))
    stopped.send(signal.SIGSTOP)
    other = await start_process("other", claim_timeout=1)

    async def taken_over() -> bool:
        return await sql("SELECT attempt FROM durable.tasks") == [(2,)]

    await eventually(taken_over)
    stopped.send(signal.SIGCONT)
    assert await stopped.exit_code() == 1
    result = await durable.wait_for_result(spawned, timeout=10)
    assert (result.output or [])[-1] == other.process.pid


@pytest.mark.slow
async def test_a_fatal_lease_timeout_ends_a_process_whose_code_goes_on_without_a_lease(
    durable: Durable, start_process: Start, ledger: Ledger, engine: AsyncEngine
) -> None:
    """Nobody has taken it over yet, but after its lease anybody may."""
    await durable.spawn(program.stubborn, 60.0)
    stubborn = await start_process("stubborn", claim_timeout=1, fatal_on_lease_timeout=True)
    await eventually(lambda: ledger.entries("begin"))
    async with engine.connect() as connection, connection.begin():
        # Its heartbeat waits for this row.
        await connection.execute(select(WorkerRow).with_for_update())
        assert await stubborn.exit_code() == 1
    assert ledger.entries("cancelled")


@pytest.mark.parametrize(
    "claim_timeout",
    [0.999, 0, -1, math.nan, math.inf, 1e300, timedelta(milliseconds=500), timedelta(days=-1), "2", None],
)
async def test_a_claim_timeout_that_cannot_work_is_refused(durable: Durable, claim_timeout: Any) -> None:
    with pytest.raises((InvalidConfiguration, TypeError), match="claim_timeout"):
        await durable.start_worker(claim_timeout=claim_timeout)


@pytest.mark.slow
async def test_a_worker_that_cannot_beat_gives_up_its_runs_before_others_may_take_them(
    durable: Durable, engine: AsyncEngine, sql: Rows
) -> None:
    started, given_up_at = asyncio.Event(), 0.0

    @durable.task
    async def hold(ctx: TaskContext) -> int:
        nonlocal given_up_at
        started.set()
        try:
            if ctx.attempt == 1:
                await asyncio.sleep(60)
        finally:
            given_up_at = given_up_at or time.time()
        return ctx.attempt

    spawned = await durable.spawn(hold)
    async with durable.worker(claim_timeout=1, concurrency=1):
        await started.wait()
        async with engine.connect() as connection, connection.begin():
            # Its heartbeat waits for this row.
            row = (await connection.execute(select(WorkerRow).with_for_update())).one()
            ((ahead,),) = await sql(f"SELECT {CLOCK} - {time.time()}")
            await eventually(lambda: given_up_at)
            assert given_up_at + ahead < row.expires_at.timestamp() + 0.25
            assert await sql("SELECT attempt, state FROM durable.tasks") == [(1, "running")]
        assert (await durable.wait_for_result(spawned, timeout=10)).output == 2
    assert await sql("SELECT attempt, failures, lease_losses FROM durable.tasks") == [(2, 0, 1)]
    # It came back under another id, and said goodbye under that.
    workers = await sql("SELECT worker_id, lost_at IS NOT NULL FROM durable.workers")
    assert workers == [(row.worker_id, True)]


@pytest.mark.slow
async def test_what_was_written_before_the_lease_ended_is_kept(durable: Durable, engine: AsyncEngine) -> None:
    calls: list[int] = []
    gate = asyncio.Event()

    async def once() -> int:
        calls.append(1)
        return len(calls)

    @durable.task
    async def hold(ctx: TaskContext) -> int:
        number = await ctx.step("once", once)
        if ctx.attempt == 1:
            gate.set()
            await asyncio.sleep(60)
        return number

    spawned = await durable.spawn(hold)
    async with durable.worker(claim_timeout=1):
        await gate.wait()
        async with engine.connect() as connection, connection.begin():
            await connection.execute(select(WorkerRow.worker_id).with_for_update())
            await asyncio.sleep(1.5)
        assert (await durable.wait_for_result(spawned, timeout=10)).output == 1
    assert calls == [1]


@pytest.mark.slow
async def test_a_claim_whose_reply_comes_after_the_lease_starts_nothing(
    durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    @durable.task
    async def work(ctx: TaskContext) -> None:
        started.append(ctx.attempt)

    async with durable.worker(claim_timeout=1) as worker:
        execute = worker._claims_connection.execute

        async def late(statement: Any, parameters: Any) -> Any:
            rows = await execute(statement, parameters)
            if statement is claiming.CLAIM and rows and not lost:
                lost.append(True)
                worker._registration.lose()
            return rows

        lost: list[bool] = []
        monkeypatch.setattr(worker._claims_connection, "execute", late)
        spawned = await durable.spawn(work)
        await durable.wait_for_result(spawned, timeout=10)
    assert started == [2]


@pytest.mark.slow
async def test_a_heartbeat_on_its_way_does_not_bring_a_lost_lease_back(
    durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker would then find the runs that it has given up, under its old id, and start them a second time."""
    executed: list[int] = []
    stop = Heartbeat.stop

    @durable.task
    async def hold(ctx: TaskContext) -> int:
        executed.append(ctx.attempt)
        if ctx.attempt == 1:
            await asyncio.sleep(60)
        return ctx.attempt

    async def stop_slowly(heartbeat: Heartbeat) -> None:
        heartbeat._lease.renewed(time.monotonic())
        worker._claimer.expect_unreported()
        worker._agenda.claim.set()
        await asyncio.sleep(0.5)
        await stop(heartbeat)

    spawned = await durable.spawn(hold)
    async with durable.worker(claim_timeout=1) as worker:
        await eventually(lambda: executed)
        with monkeypatch.context() as patch:
            patch.setattr(Heartbeat, "stop", stop_slowly)
            worker._registration.lose()
            assert not worker._registration.lease.valid
            assert (await durable.wait_for_result(spawned, timeout=10)).output == 2
    assert executed == [1, 2]


async def test_a_heartbeat_that_was_committed_first_wins_against_the_sweep(
    durable: Durable, engine: AsyncEngine
) -> None:
    claimer = Claimer(durable.database)
    await claimer.register(seconds=0.01)
    await asyncio.sleep(0.05)
    async with engine.connect() as connection:
        transaction = await connection.begin()
        beaten = await connection.execute(
            text("UPDATE durable.workers SET expires_at = clock_timestamp() + interval '1 min' RETURNING worker_id")
        )
        assert beaten.all()
        sweep = asyncio.create_task(durable.database.execute(claiming.DECLARE_LOST))
        await asyncio.sleep(0.1)
        await transaction.commit()
        assert list(await sweep) == []
    assert list(await durable.database.execute(claiming.DECLARE_LOST)) == []


async def test_a_sweep_that_was_committed_first_wins_against_the_heartbeat(
    durable: Durable, engine: AsyncEngine
) -> None:
    claimer = Claimer(durable.database)
    await claimer.register(seconds=0.01)
    await asyncio.sleep(0.05)
    async with engine.connect() as connection:
        transaction = await connection.begin()
        declared = (await connection.execute(claiming.DECLARE_LOST)).all()
        assert [row.worker_id for row in declared] == [claimer.worker_id]
        beat = asyncio.create_task(durable.database.execute(claiming.HEARTBEAT, {"beating_id": claimer.worker_id}))
        await asyncio.sleep(0.1)
        assert not beat.done()
        await transaction.commit()
        assert list(await beat) == []


@pytest.mark.slow
async def test_no_worker_is_declared_lost_whose_lease_has_not_ended(durable: Durable, sql: Rows) -> None:
    """Hundreds of heartbeats that race hundreds of sweeps, each just when the lease ends."""
    claimers = [Claimer(durable.database) for _ in range(20)]
    for claimer in claimers:
        await claimer.register(seconds=0.03)
    alive = {claimer.worker_id for claimer in claimers}
    deadline = time.monotonic() + 3.0

    async def beat(claimer: Claimer) -> None:
        pause = 0.01
        while time.monotonic() < deadline:
            if not await durable.database.execute(claiming.HEARTBEAT, {"beating_id": claimer.worker_id}):
                alive.discard(claimer.worker_id)
                claimer.worker_id = new_id()
                await claimer.register(seconds=0.03)
                alive.add(claimer.worker_id)
            await asyncio.sleep(pause)
            pause = 0.01 + (pause * 7) % 0.03

    lost = 0

    async def sweep() -> None:
        nonlocal lost
        while time.monotonic() < deadline:
            declared = await durable.database.execute(claiming.DECLARE_LOST)
            lost += len(declared)
            await asyncio.sleep(0.001)

    await asyncio.gather(*(beat(claimer) for claimer in claimers), sweep(), sweep())
    assert lost > 20
    assert await sql("SELECT count(*) FROM durable.workers WHERE lost_at < expires_at") == [(0,)]
    assert await sql("SELECT count(*) FROM durable.workers WHERE lost_at IS NOT NULL") == [(lost,)]
    unlost = await sql("SELECT worker_id FROM durable.workers WHERE lost_at IS NULL")
    assert {worker_id for (worker_id,) in unlost} <= alive


@pytest.mark.slow
async def test_runs_are_taken_over_also_when_the_row_of_their_worker_is_gone(
    durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.maintenance.REPAIR_INTERVAL", 0.2)
    spawned = await durable.spawn(program.count)
    claimer = Claimer(durable.database)
    await claimer.register()
    assert await claimer.claim(1, "count") == [spawned.task_id]
    await sql("DELETE FROM durable.workers")
    durable.register(program.count)
    async with durable.worker():
        await durable.wait_for_result(spawned, timeout=10)
    assert await sql("SELECT attempt, failures, lease_losses FROM durable.tasks") == [(2, 0, 1)]


async def test_mass_death_is_taken_over_in_batches(
    durable: Durable, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.takeover.BATCH", 50)
    for _ in range(3):
        claimer = Claimer(durable.database)
        await claimer.register(seconds=0.05)
        await durable.spawn_many([(program.count, None)] * 120)
        assert len(await claimer.claim(120, "count")) == 120
    durable.register(program.count)
    async with durable.worker(concurrency=100):

        async def finished() -> bool:
            return await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'completed'") == [(360,)]

        await eventually(finished)
    assert await sql("SELECT DISTINCT attempt, failures, lease_losses FROM durable.tasks") == [(2, 0, 1)]


@pytest.mark.slow
async def test_a_run_that_somebody_holds_locked_does_not_keep_others_from_being_taken_over(
    durable: Durable, engine: AsyncEngine, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.maintenance.LOST_RUNS_INTERVAL", 1000)
    spawned = [await durable.spawn(program.count) for _ in range(5)]
    claimer = Claimer(durable.database)
    await claimer.register(seconds=0.05)
    assert len(await claimer.claim(5, "count")) == 5
    durable.register(program.count)
    async with engine.connect() as connection, connection.begin():
        await connection.execute(select(TaskRow.task_id).where(TaskRow.task_id == spawned[2].task_id).with_for_update())
        async with durable.worker():
            for spawn in spawned[:2] + spawned[3:]:
                await durable.wait_for_result(spawn, timeout=5)
            await connection.rollback()

            async def done() -> bool:
                return await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'completed'") == [(5,)]

            await eventually(done)


@pytest.mark.slow
async def test_a_worker_whose_event_loop_ends_leaves_neither_a_thread_nor_a_connection(
    database_url: URL, durable: Durable, sql: Rows
) -> None:
    """As in an application that never shuts its worker down, and whose process goes on."""
    before = set(threading.enumerate())

    async def start() -> None:
        settings = {"server_settings": {"application_name": "abandoned"}}
        other = Durable(create_async_engine(database_url, poolclass=NullPool, connect_args=settings))
        await other.start_worker(claim_timeout=1)
        await asyncio.sleep(0.7)
        assert await sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'abandoned'") > [(2,)]

    # `asyncio.run` cancels all tasks at its end.
    await asyncio.to_thread(asyncio.run, start())
    await eventually(
        lambda: not [thread for thread in set(threading.enumerate()) - before if "heartbeat" in thread.name]
    )

    async def closed() -> bool:
        return await sql("SELECT pid FROM pg_stat_activity WHERE application_name = 'abandoned'") == []

    await eventually(closed)
