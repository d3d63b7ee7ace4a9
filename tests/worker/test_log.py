"""What a worker logs: enough to see what is wrong, once, and no values."""

import asyncio
import logging
import time
import uuid
from typing import Any

import pytest
from sqlalchemy import URL, Executable, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, RetryStrategy, TaskContext, task
from durable_sa.models import TaskRow
from durable_sa.statements import claiming

from ..support import eventually


@task(max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
async def fails(ctx: TaskContext, name: str) -> None:
    try:
        int("many")
    except ValueError as error:
        raise RuntimeError(f"no stock of {name} in shelf 17") from error


@task
async def waits(ctx: TaskContext) -> None:
    await ctx.step("wait", asyncio.sleep, 60)


def lines(caplog: pytest.LogCaptureFixture, *parts: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if all(part in record.getMessage() for part in parts)]


async def test_a_retry_is_a_warning_and_a_final_failure_an_error_with_message_and_traceback(
    durable: Durable, caplog: pytest.LogCaptureFixture
) -> None:
    durable.register(fails)
    async with durable.worker():
        spawned = await durable.spawn(fails, "unobtainium")
        await durable.wait_for_result(spawned, timeout=20)
    retried, failed = lines(caplog, str(spawned.task_id))
    assert (retried.levelname, failed.levelname) == ("WARNING", "ERROR")
    assert retried.getMessage() == (
        f"task {spawned.task_id} (fails) failed in attempt 1 and is retried: RuntimeError: no stock of ... in shelf 17"
    )
    assert failed.getMessage() == f"task {spawned.task_id} (fails) failed: RuntimeError: no stock of ... in shelf 17"
    for record in (retried, failed):
        report = logging.Formatter().format(record)
        assert "RuntimeError: no stock of ... in shelf 17" in report.partition("\n")[2]
        assert "ValueError: invalid literal" in report
        assert __file__ in report
        assert record.__dict__["task_name"] == "fails"
    assert "unobtainium" not in caplog.text


async def test_a_run_that_ends_during_a_look_for_lost_runs_is_not_said_to_be_lost(
    durable: Durable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.register(fails)
    loading, looking = asyncio.Event(), asyncio.Event()
    async with durable.worker() as worker:
        executor = worker._executor
        load, execute = executor._load, executor._connection.execute

        async def load_late(task_ids: list[uuid.UUID]) -> list[Any]:
            loading.set()
            await looking.wait()
            return await load(task_ids)

        async def look_late(statement: Executable, parameters: Any = None) -> Any:
            if statement is claiming.LOST_RUNS and loading.is_set():
                # The second attempt holds its slot, and its journal is being loaded. It has ended before the look.
                looking.set()
                await durable.wait_for_result(spawned, timeout=20)
            return await execute(statement, parameters)

        monkeypatch.setattr(executor, "_load", load_late)
        monkeypatch.setattr(executor._connection, "execute", look_late)
        spawned = await durable.spawn(fails, "unobtainium")
        await loading.wait()
        await executor.check()
    assert [record.levelname for record in lines(caplog, str(spawned.task_id))] == ["WARNING", "ERROR"]


@pytest.mark.slow
async def test_a_cancelled_run_says_so_and_a_lost_one_that_it_was_lost(
    durable: Durable, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "durable_sa")
    durable.register(waits)
    async with durable.worker(shutdown_timeout=0):
        one, another = await durable.spawn(waits), await durable.spawn(waits)
        await eventually(lambda: len(durable.workers) == 1 and _running(durable, 2))
        await durable.cancel_task(one)
        await eventually(lambda: lines(caplog, f"task {one.task_id} (waits) was cancelled while it ran"))
        async with engine.begin() as connection:
            statement = "UPDATE durable.tasks SET fence = fence + 1, available_at = '3000-01-01', state = 'pending',"
            statement += " claimed_by = NULL WHERE task_id = :task_id"
            await connection.execute(text(statement), {"task_id": another.task_id})
        (lost,) = await eventually(lambda: lines(caplog, f"task {another.task_id} (waits) was lost"))
    assert lost.levelname == "WARNING"


def _running(durable: Durable, count: int) -> bool:
    (worker,) = durable.workers
    return len(worker.running_in()) == count


async def test_a_takeover_names_the_tasks(durable: Durable, caplog: pytest.LogCaptureFixture) -> None:
    durable.register(waits)
    spawned = [await durable.spawn(waits) for _ in range(2)]
    async with durable.engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)"
                " VALUES (:worker_id, 'gone', '{default}', '1 s', now() - interval '1 s')"
            ),
            {"worker_id": spawned[0].run_id},
        )
        await connection.execute(
            TaskRow.__table__.update().values(state="running", claimed_by=spawned[0].run_id, attempt=1)
        )
    async with durable.worker(shutdown_timeout=0):
        (line,) = await eventually(lambda: lines(caplog, "took over 2 runs of lost workers"))
    assert all(str(each.task_id) in line.getMessage() for each in spawned)


@pytest.mark.slow
async def test_a_shutdown_says_what_it_waits_for(durable: Durable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "durable_sa")
    durable.register(waits)
    worker = await durable.start_worker(shutdown_timeout=0.2, worker_id="busy")
    spawned = await durable.spawn(waits)
    await eventually(lambda: _running(durable, 1))
    await worker.shutdown()
    (line,) = lines(caplog, "worker busy is shutting down")
    assert line.getMessage() == (
        f"worker busy is shutting down: it waits up to 0.2 seconds for 1 run: waits ({spawned.task_id})"
    )
    await durable.cancel_task(spawned)
    worker = await durable.start_worker(worker_id="idle")
    await worker.shutdown()
    (line,) = lines(caplog, "worker idle is shutting down")
    assert line.getMessage() == "worker idle is shutting down: no run is in progress"


@pytest.mark.slow
async def test_a_missing_database_is_logged_once_by_each_part_of_a_worker_and_its_return_once(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "durable_sa")
    admin = create_async_engine(database_url.set(database="postgres"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    name = database_url.database

    async def rename(former: str, latter: str) -> None:
        async with admin.connect() as connection:
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"

            async def renamed() -> bool:
                await connection.execute(text(ended), {"name": former})
                try:
                    await connection.exec_driver_sql(f'ALTER DATABASE "{former}" RENAME TO "{latter}"')
                except Exception:  # noqa: BLE001 - a connection was made meanwhile
                    return False
                return True

            await eventually(renamed)

    async with Durable(database_url, tasks=[waits]) as durable:
        await durable.create_queue()
        async with durable.worker(claim_timeout=60, shutdown_timeout=0):
            await rename(f"{name}", f"{name}_away")
            began = time.monotonic()
            await eventually(lambda: lines(caplog, "claim failed", "does not exist"))
            await asyncio.sleep(max(0.0, 2.5 - (time.monotonic() - began)))
            await rename(f"{name}_away", f"{name}")
            spawned: Any = await eventually(lambda: _spawned(durable))
            await eventually(lambda: lines(caplog, "the database answers again"))
            await eventually(lambda: _running(durable, 1))
            await durable.cancel_task(spawned)
    failures = [record.getMessage().partition(" (")[0] for record in caplog.records if "fail" in record.getMessage()]
    assert len(failures) == len(set(failures)), failures
    assert len(lines(caplog, "the database answers again")) == 1
    assert "Traceback" not in caplog.text
    await admin.dispose()


async def _spawned(durable: Durable) -> Any:
    try:
        return await durable.spawn(waits)
    except Exception:  # noqa: BLE001 - the database is missing
        return None
