"""A task that kills its process again and again fails alone: those beside it complete."""

from __future__ import annotations

import signal

import pytest

from durable_sa import Durable
from durable_sa.policies import MAX_LOST_WORKERS, SUSPECT_AFTER

from ..support import eventually
from ..worker import program
from ..worker.conftest import Ledger, Rows, Start, ledger, observer, sql, start_process

__all__ = ["ledger", "observer", "sql", "start_process"]


@pytest.mark.timeout(240)
async def test_a_poison_task_fails_alone_and_its_neighbours_complete(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows
) -> None:
    good = [await durable.spawn(program.work, program.Work(steps=3, seconds=0.1)) for _ in range(3)]
    poison = await durable.spawn(program.die)
    processes = 0
    while not await sql("SELECT 1 FROM durable.tasks WHERE task_id = :id AND outcome = 'failed'", id=poison.task_id):
        process = await start_process(f"worker-{processes}", wait=False, concurrency=6, claim_timeout=1)
        processes += 1
        assert processes <= SUSPECT_AFTER + MAX_LOST_WORKERS + 1, "it comes to no end"

        async def over(process: object = process) -> bool:
            """Killed by the task, or the one that gives it up."""
            gone = process.process.poll() is not None  # type: ignore[attr-defined]
            return gone or bool(await sql("SELECT 1 FROM durable.tasks WHERE outcome = 'failed'"))

        await eventually(over, within=60)
        if process.process.poll() is not None:
            assert await process.exit_code() == -signal.SIGKILL
            # As if the time of its lease had passed.
            await sql("UPDATE durable.workers SET expires_at = clock_timestamp()")
    for spawned in good:
        result = await durable.wait_for_result(spawned, timeout=30)
        assert result.status == "completed", result.error
    failed = await durable.wait_for_result(poison, timeout=10)
    assert failed.error is not None
    assert failed.error.name == "LeaseLost"
    assert failed.error.message.endswith(f"alone (loss {MAX_LOST_WORKERS} of {MAX_LOST_WORKERS} in a row)")
    assert len(ledger.entries("begin", task=str(poison.task_id))) == SUSPECT_AFTER + MAX_LOST_WORKERS
    # Nobody was lost with more than the first two workers.
    rows = await sql(
        "SELECT count(*) FROM durable.runs WHERE task_id <> :id AND error ->> 'name' = 'LeaseLost' GROUP BY task_id",
        id=poison.task_id,
    )
    assert all(count <= SUSPECT_AFTER for (count,) in rows)
