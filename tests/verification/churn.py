"""Tasks that come, are done and go while nothing is vacuumed: what that does to the statements that tasks wait for.

The statements are those of workers, and so is what they start from; only that no code of tasks runs between them.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from sqlalchemy import text

from durable_sa import Durable, TaskContext, task
from durable_sa.database.channel import DedicatedConnection
from durable_sa.statements import claiming, outcomes, queues
from durable_sa.statements.claiming import ClaimedRun
from durable_sa.worker.cursors import ClaimCursors
from durable_sa.worker.retention import Retention

from ..statements.test_plans import Case, explained

BATCH = 1000
PROBE = 100
"""Tasks that a measured claim asks for."""


@task
async def work(ctx: TaskContext, number: int) -> int:
    return number


@dataclass
class Reads:
    """Blocks that a statement reads, after so many tasks."""

    tasks: int
    claim: int
    full_scan: int
    """A full scan, which a worker makes now and then."""
    retention: int


@dataclass
class Churn:
    """What was measured, and how many ended tasks were left at the end."""

    reads: list[Reads] = field(default_factory=list)
    left: int = 0

    @property
    def complaints(self) -> list[str]:
        """What has become worse than it may.

        What looks at the beginning of an index, as retention and full scans do, passes over its dead pages
        until they are vacuumed; there are some ten of them for a thousand tasks, and they are looked at rarely.
        """
        first, last = self.reads[0], self.reads[-1]
        thousands = (last.tasks - first.tasks) / 1000
        found = [f"claims read {last.claim} blocks, after {first.claim}"] if last.claim > 1.1 * first.claim + 50 else []
        for name, before, after in (
            ("a full scan", first.full_scan, last.full_scan),
            ("a look for what is past its retention", first.retention, last.retention),
        ):
            if after > before + 1000 + 20 * thousands:
                found.append(f"{name} reads {after} blocks, after {before}")
        return [*found, f"{self.left} tasks are left"] if self.left > BATCH else found


async def churn(durable: Durable, plain: asyncpg.Connection, tasks: int, *, measurements: int) -> Churn:
    """Have so many tasks come and go, in batches; the queue keeps none of them."""
    found = Churn()
    for table in ("tasks", "runs", "checkpoints", "waits", "workers"):
        await plain.execute(f"ALTER TABLE durable.{table} SET (autovacuum_enabled = false)")
    durable.register(work)
    connection, cursors, worker_id = (
        DedicatedConnection(durable.database),
        ClaimCursors(["default"]),
        uuid.uuid4(),
    )
    retention = Retention(connection)
    await durable.create_queue(retention=0)
    about = {"worker_id": worker_id, "name": "churn", "queue_names": ["default"], "claim_timeout": 86400.0}
    await connection.execute(claiming.REGISTER_WORKER, about)

    def claim(wanted: int, *, full_scan: bool) -> dict[str, Any]:
        return {
            "worker_id": worker_id,
            "wanted": wanted,
            "task_names": ["work"],
            **cursors.parameters(full_scan=full_scan),
        }

    async def blocks(statement: Any, parameters: dict[str, Any]) -> int:
        plan = await explained(plain, Case(statement, parameters, frozenset(), 0))
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    batches = tasks // BATCH
    measured = {1, *(batches - 1 - batches * each // measurements for each in range(measurements - 1))}
    try:
        done = 0
        for number in range(batches):
            await durable.spawn_many([(work, each) for each in range(BATCH)])
            if number in measured:
                found.reads.append(
                    Reads(
                        done,
                        await blocks(claiming.CLAIM, claim(PROBE, full_scan=False)),
                        await blocks(claiming.CLAIM, claim(PROBE, full_scan=True)),
                        await blocks(queues.RETENTIONS, {}),
                    )
                )
            rows = await connection.execute(claiming.CLAIM, claim(BATCH, full_scan=False))
            runs = [ClaimedRun._make(row) for row in rows]
            cursors.claimed(runs, full_scan=False, full=True)
            held = {"task_ids": [run.task_id for run in runs], "fences": [run.fence for run in runs]}
            ended = {**held, "outputs": ["1"] * len(runs), "waited": [False] * len(runs)}
            done += (await connection.execute(outcomes.COMPLETE, ended))[0].written
            await retention.delete_expired()
        ((found.left,),) = await connection.execute(text("SELECT count(*) FROM durable.tasks"))
    finally:
        await connection.close()
    return found
