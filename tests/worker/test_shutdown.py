"""Shutdown: what runs may end, what does not is given back at once, and nothing is counted against anybody."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, Task, TaskContext, TaskRow, TaskStatus, Worker
from durable_sa.embedded import EmbeddedServer, temporary_server
from durable_sa.models import Run

from ..support import eventually
from . import program
from .conftest import Ledger, Rows, Start
from .processes import WorkerProcess
from .program import Work


@pytest.mark.slow
async def test_a_terminated_process_lets_its_runs_end_and_claims_no_others(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    process = await start_process("one", concurrency=3)
    await durable.spawn_many([(program.work, Work(steps=2, seconds=0.4))] * 6)
    await eventually(lambda: len(ledger.entries("begin")) == 3)
    process.send(signal.SIGTERM)
    assert await process.exit_code() == 0
    states = await sql("SELECT state, attempt, count(*) FROM durable.tasks GROUP BY 1, 2 ORDER BY 1")
    assert states == [("completed", 1, 3), ("pending", 0, 3)]
    assert len(ledger.entries("end")) == 6
    assert await sql("SELECT worker_id FROM durable.workers") == []


@pytest.mark.slow
async def test_what_exceeds_the_grace_is_given_back_at_once(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    second = await start_process("second", claim_timeout=60)
    second.send(signal.SIGSTOP)
    first = await start_process("first", shutdown_timeout=0.3, claim_timeout=60)
    spawned = await durable.spawn(program.work, Work(steps=3, seconds=0.7), max_attempts=1)
    await eventually(lambda: ledger.entries("begin", step=1))
    second.send(signal.SIGCONT)
    first.send(signal.SIGTERM)
    assert await first.exit_code() == 0
    result = await durable.wait_for_result(spawned, timeout=10)
    # The step that was recorded is not run again; the one that was cut off is.
    assert result.output == [first.process.pid, second.process.pid, second.process.pid]
    assert await sql("SELECT attempt, failures, lease_losses FROM durable.tasks") == [(2, 0, 0)]
    runs = await sql(select(Run).order_by(Run.attempt))
    assert [(run.attempt, run.state) for run in runs] == [(1, "failed"), (2, "completed")]
    assert runs[0].error["name"] == "Released"
    # At once: the lease of a minute has not been waited for.
    assert (runs[1].started_at - runs[0].finished_at).total_seconds() < 1.0


@pytest.mark.slow
async def test_a_second_signal_gives_runs_back_without_waiting(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    process = await start_process("one", shutdown_timeout=60)
    await durable.spawn(program.work, Work(steps=2, seconds=30))
    await eventually(lambda: ledger.entries("begin"))
    process.send(signal.SIGTERM)
    await asyncio.sleep(0.3)
    assert process.process.poll() is None
    process.send(signal.SIGINT)
    assert await process.exit_code(10) == 0
    assert await sql("SELECT state, failures, lease_losses FROM durable.tasks") == [("pending", 0, 0)]


@pytest.mark.parametrize("code", [program.stubborn, program.hung], ids=["task", "step"])
@pytest.mark.slow
async def test_code_that_ignores_its_cancellation_does_not_keep_the_process(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows, code: Task[float, None]
) -> None:
    process = await start_process("one", shutdown_timeout=0.2)
    await durable.spawn(code, 60.0)
    await eventually(lambda: ledger.entries("begin"))
    process.send(signal.SIGTERM)
    assert await process.exit_code(25) == 0
    assert bool(ledger.entries("cancelled")) == (code is program.stubborn)
    assert await sql("SELECT state, failures, lease_losses FROM durable.tasks") == [("pending", 0, 0)]


@pytest.mark.parametrize("state", ["idle", "busy", "starting"])
@pytest.mark.slow
async def test_sigint_and_sigterm_end_the_process_in_any_state(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows, state: str
) -> None:
    process = await start_process("one")
    if state == "busy":
        await durable.spawn_many([(program.count, None)] * 2000)
    elif state == "idle":
        await asyncio.sleep(0.3)
    process.send(signal.SIGINT)
    assert await process.exit_code() == 0
    assert await sql("SELECT count(*) FROM durable.tasks WHERE claimed_by IS NOT NULL AND outcome IS NULL") == [(0,)]
    assert await sql("SELECT worker_id FROM durable.workers") == []


async def test_a_signal_during_the_start_gives_it_up(engine: AsyncEngine, sql: Rows) -> None:
    entered: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None]:
        entered.append("begun")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
            yield
        finally:
            entered.append("ended")

    async with Durable(engine, lifespan=lifespan) as durable:
        await asyncio.wait_for(durable.run_worker(), 10)
    assert entered == ["begun", "ended"]
    assert await sql("SELECT worker_id FROM durable.workers") == []
    assert engine.pool.checkedout() == 0


async def test_cancelling_run_worker_during_the_start_is_no_signal(engine: AsyncEngine) -> None:
    begun = asyncio.Event()

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[None]:
        begun.set()
        await asyncio.sleep(60)
        yield

    async with Durable(engine, lifespan=lifespan) as durable:
        running = asyncio.create_task(durable.run_worker())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_a_worker_that_has_just_started_when_run_worker_is_cancelled_is_shut_down(
    engine: AsyncEngine, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Durable._start_worker

    async def start_and_cancel(durable: Durable, *settings: Any) -> Worker:
        worker = await start(durable, *settings)
        asyncio.get_running_loop().call_soon(running.cancel)
        return worker

    monkeypatch.setattr(Durable, "_start_worker", start_and_cancel)
    async with Durable(engine) as durable:
        running = asyncio.create_task(durable.run_worker())
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await sql("SELECT worker_id FROM durable.workers") == []
    assert engine.pool.checkedout() == 0


@pytest.mark.slow
async def test_a_suspended_task_is_no_concern_of_a_shutdown(durable: Durable, sql: Rows) -> None:
    @durable.task(max_attempts=1)
    async def nap(ctx: TaskContext) -> int:
        await ctx.sleep_for("nap", 0.5)
        return ctx.attempt

    spawned = await durable.spawn(nap)
    async with durable.worker(shutdown_timeout=0.0):
        await eventually(lambda: _is(sql, "sleeping"))
    assert await sql("SELECT state, attempt, failures, lease_losses FROM durable.tasks") == [("sleeping", 1, 0, 0)]
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=5)
    assert (result.status, result.output) == (TaskStatus.COMPLETED, 1)


async def _is(sql: Rows, state: str) -> bool:
    return await sql("SELECT state FROM durable.tasks") == [(state,)]


async def test_tasks_that_suspend_or_fail_during_the_shutdown_do_so(durable: Durable, sql: Rows) -> None:
    started = asyncio.Semaphore(0)

    @durable.task
    async def nap(ctx: TaskContext) -> None:
        started.release()
        await asyncio.sleep(0.2)
        await ctx.sleep_for("nap", 3600)

    @durable.task
    async def fail(ctx: TaskContext) -> None:
        started.release()
        await asyncio.sleep(0.2)
        raise ValueError

    await durable.spawn(nap)
    await durable.spawn(fail, max_attempts=1)
    worker = await durable.start_worker(concurrency=2)
    for _ in range(2):
        await started.acquire()
    await worker.shutdown()
    assert await sql("SELECT task_name, state FROM durable.tasks ORDER BY 1") == [
        ("fail", "failed"),
        ("nap", "sleeping"),
    ]


@pytest.mark.slow
async def test_shutdown_during_claims_leaves_nothing_claimed(durable: Durable, sql: Rows) -> None:
    """Again and again, at whatever moment of its claims and writes it comes."""

    @durable.task
    async def brief(ctx: TaskContext) -> None:
        await asyncio.sleep(0.001)

    await durable.spawn_many([(brief, None)] * 2000)
    for number in range(12):
        worker = await durable.start_worker(concurrency=8, shutdown_timeout=(0.0, 5.0)[number % 2])
        await asyncio.sleep(0.013 * (number % 5))
        await worker.shutdown()
        held = await sql("SELECT state FROM durable.tasks WHERE claimed_by IS NOT NULL AND outcome IS NULL")
        assert held == []
    assert await sql("SELECT DISTINCT failures, lease_losses FROM durable.tasks") == [(0, 0)]


@pytest.mark.slow
async def test_a_result_waits_for_a_locked_row_also_at_shutdown(
    durable: Durable, engine: AsyncEngine, sql: Rows
) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    @durable.task
    async def brief(ctx: TaskContext) -> int:
        started.set()
        await go_on.wait()
        return 7

    spawned = await durable.spawn(brief)
    worker = await durable.start_worker()
    await started.wait()
    async with engine.connect() as connection, connection.begin():
        await connection.execute(select(TaskRow.task_id).with_for_update())
        go_on.set()
        closing = asyncio.create_task(worker.shutdown())
        await asyncio.sleep(0.4)
        assert not closing.done()
    await closing
    assert (await durable.wait_for_result(spawned, timeout=20)).output == 7
    assert await sql("SELECT worker_id FROM durable.workers") == []


async def test_shutdown_may_be_called_twice_and_at_once(durable: Durable) -> None:
    worker = await durable.start_worker()
    await asyncio.gather(worker.shutdown(), worker.shutdown())
    await worker.shutdown()
    await worker.wait()


async def test_closing_the_client_shuts_its_workers_down(durable: Durable, engine: AsyncEngine, sql: Rows) -> None:
    async with Durable(engine) as other:
        workers = [await other.start_worker() for _ in range(2)]
        assert await sql("SELECT count(*) FROM durable.workers") == [(2,)]
    for worker in workers:
        await asyncio.wait_for(worker.wait(), 20)
    assert await sql("SELECT count(*) FROM durable.workers") == [(0,)]


@pytest.mark.slow
async def test_a_failing_lifespan_fails_the_start_and_one_that_ends_badly_the_shutdown(
    database_url: URL, engine: AsyncEngine, sql: Rows
) -> None:
    @asynccontextmanager
    async def never() -> AsyncGenerator[int]:
        raise LookupError("no such model")
        yield 1

    with pytest.raises(LookupError, match="no such model"):
        await Durable(engine, lifespan=never).start_worker()

    @asynccontextmanager
    async def badly() -> AsyncGenerator[int]:
        yield 1
        raise LookupError("still in use")

    worker = await Durable(engine, lifespan=badly).start_worker()
    with pytest.raises(LookupError, match="still in use"):
        await worker.shutdown()
    assert await sql("SELECT count(*) FROM durable.workers") == [(0,)]
    # Its connections are back in the pool.
    assert engine.pool.checkedout() == 0
    client = Durable(database_url, lifespan=badly)
    workers = [await client.start_worker() for _ in range(2)]
    with pytest.raises(LookupError, match="still in use"):
        await client.close()
    for worker in workers:
        await asyncio.wait_for(worker.wait(), 20)
    assert client.workers == frozenset()
    assert client._database is None


@pytest.fixture(scope="module")
def private_server() -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off"}) as server:
        yield server


@asynccontextmanager
async def private_client(server: EmbeddedServer) -> AsyncGenerator[Durable]:
    server.start()
    engine = create_async_engine(server.url(), poolclass=NullPool)
    async with Durable(engine) as durable:
        await durable.migrate()
        async with engine.begin() as connection:
            await connection.execute(text("TRUNCATE durable.tasks, durable.runs, durable.workers"))
        try:
            yield durable
        finally:
            await asyncio.to_thread(server.start)


@pytest.mark.slow
async def test_an_idle_worker_ends_soon_without_a_database(private_server: EmbeddedServer) -> None:
    async with private_client(private_server) as durable:
        worker = await durable.start_worker(claim_timeout=30)
        await asyncio.to_thread(private_server.stop, "immediate")
        began = time.monotonic()
        await worker.shutdown()
        assert time.monotonic() - began < 8
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("durable:")]


@pytest.mark.slow
async def test_a_busy_process_ends_in_bounded_time_without_a_database(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    async with private_client(private_server) as durable:
        ledger = Ledger(tmp_path / "ledger")
        process = WorkerProcess(private_server.url(), ledger.path, "one", shutdown_timeout=0.5, claim_timeout=30)
        try:
            await durable.spawn(program.work, Work(steps=1, seconds=60))
            await eventually(lambda: ledger.entries("begin"))
            await asyncio.to_thread(private_server.stop, "immediate")
            process.send(signal.SIGTERM)
            assert await process.exit_code(20) == 0
        finally:
            process.end()


@pytest.mark.slow
async def test_a_rolling_restart_under_load_loses_nothing_and_runs_nothing_twice_at_once(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    options = {"concurrency": 10, "shutdown_timeout": 0.4, "claim_timeout": 30}
    processes = [await start_process(f"old-{number}", wait=False, **options) for number in range(3)]
    spawned = 0
    for number, old in enumerate(processes):
        await durable.spawn_many([(program.work, Work(steps=3, seconds=0.15))] * 20)
        await durable.spawn_many([(program.count, None)] * 30)
        spawned += 50
        if number == 0:
            await eventually(lambda: len(ledger.entries("begin")) > 20)
        await start_process(f"new-{number}", wait=number == 2, **options)
        old.send(signal.SIGTERM)
        assert await old.exit_code() == 0

    async def finished() -> bool:
        return await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'completed'") == [(spawned,)]

    await eventually(finished, within=30)
    assert await sql("SELECT DISTINCT failures, lease_losses FROM durable.tasks") == [(0, 0)]
    attempts = await sql("SELECT task_id FROM durable.runs GROUP BY 1 HAVING max(attempt) <> count(*)")
    assert attempts == []
    reasons = await sql("SELECT DISTINCT error ->> 'name' FROM durable.runs WHERE state <> 'completed'")
    assert reasons in ([], [("Released",)])
    # A step begins once more only where it had not ended, and never beside itself.
    open_steps: set[tuple[str, int]] = set()
    for entry in ledger.entries():
        if entry["what"] == "begin":
            step = (entry["task"], entry["step"])
            if entry["attempt"] == 1:
                assert step not in open_steps
            open_steps.add(step)
    ended = [(entry["task"], entry["step"]) for entry in ledger.entries("end")]
    assert len(ended) == len(set(ended)) == 180
