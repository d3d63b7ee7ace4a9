"""The runs of a process that has ended without giving them back, settled by another one of the same watcher.

The watcher knows that the process has ended. So its lease need not run out, and of a run that was ended by its
`hard_timeout` it is known that it failed, and that the others beside it are to be given back.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from ..database.channel import DedicatedConnection
from ..database_errors import RetryPauses
from ..execution import outcomes
from ..statements import claiming
from ..statements.claiming import ClaimedRun
from .agenda import Agenda
from .deadlines import hard_timeout_error
from .executor import Executor
from .settings import Settings

WRITING_TIMEOUT = 30.0
"""Seconds for which rows are waited for that transactions of the ended process may still hold locked."""
LOOK_INTERVAL = 0.1
"""Seconds between looks whether the runs are settled."""


class Succession:
    """Settles the runs of processes that have ended."""

    def __init__(
        self,
        settings: Settings,
        connection: DedicatedConnection,
        agenda: Agenda,
        executor: Executor,
        stopping: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._agenda = agenda
        self._executor = executor
        self._stopping = stopping

    async def settle(self, lost: dict[str, Any]) -> None:
        """Settle the runs of `worker_id`: fail the one that is `overdue`, if any, and give the others back.

        Without an overdue one, its lease is ended, and they are taken over as from any lost worker.
        """
        worker_id = uuid.UUID(lost["worker_id"])
        retry = RetryPauses("settling the runs of an ended process", self._stopping)
        while True:
            try:
                if lost["overdue"] is not None:
                    await self._fail_and_release(worker_id, **lost["overdue"])
                await self._connection.execute(claiming.END_LEASE, {"beating_id": worker_id})
                break
            except Exception as error:  # noqa: BLE001 - the retry logs it
                if self._stopping.is_set():
                    return
                await retry.pause(error)
        self._agenda.look_within(0.0)

    async def _fail_and_release(self, worker_id: uuid.UUID, *, task_id: str, fence: int, timeout: float) -> None:
        overdue = uuid.UUID(task_id), fence
        submitted: set[tuple[uuid.UUID, int]] = set()
        deadline = time.monotonic() + WRITING_TIMEOUT
        while time.monotonic() < deadline:
            runs = await self._runs(worker_id)
            if not runs:
                return
            for run in runs:
                if run.key in submitted:
                    continue
                submitted.add(run.key)
                task = self._executor.task(run.task_name)
                if task is None:
                    # The code has changed meanwhile. The run is taken over by a worker that knows the task.
                    return
                if run.key == overdue:
                    error = hard_timeout_error(run.task_name, timeout)
                    outcomes.fail(self._executor, run, task, error, waited=True)
                else:
                    outcomes.release(self._executor, run, task, waited=True)
            await asyncio.sleep(LOOK_INTERVAL)

    async def _runs(self, worker_id: uuid.UUID) -> list[ClaimedRun]:
        parameters = {
            "worker_id": worker_id,
            "queue_names": list(self._settings.queue_names),
            "task_ids": [],
            "fences": [],
        }
        rows = await self._connection.execute(claiming.UNREPORTED_CLAIMS, parameters)
        return [ClaimedRun._make(row[: len(ClaimedRun._fields)]) for row in rows]
