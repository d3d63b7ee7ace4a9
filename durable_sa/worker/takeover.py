"""Taking over the runs of workers whose lease has ended."""

from __future__ import annotations

import logging
import time
import uuid

from ..database.channel import DedicatedConnection
from ..database.hint import Hint
from ..ids import new_id
from ..policies import SUSPECT_AFTER
from ..statements import claiming, outcomes
from .agenda import Agenda
from .dispatcher import Dispatcher
from .executor import Executor
from .wakeups import BATCH, LOCKED_PAUSE_RATIO

logger = logging.getLogger("durable_sa")

LOST_RUNS_INTERVAL = 10.0
"""Seconds between searches for runs of workers that are known to be lost already."""
LOCKED_RUNS_RETRY_DELAY = 0.5
"""Least seconds until runs whose rows were locked are looked for again."""
LOST_WORKER_RETENTION = 600.0
"""Seconds after which a lost worker without runs is deleted."""


class Takeover:
    """Gives runs of lost workers back to their queues, or fails their tasks if too many workers were lost with them."""

    def __init__(
        self, connection: DedicatedConnection, agenda: Agenda, dispatcher: Dispatcher, executor: Executor
    ) -> None:
        self._connection = connection
        self._agenda = agenda
        self._dispatcher = dispatcher
        self._executor = executor
        self.next_search = 0.0
        """When runs of workers already known to be lost are due to be looked for, on the local monotonic clock."""

    async def search(self) -> None:
        """Declare workers lost whose lease has ended, and take over the runs of all lost workers."""
        if await self._connection.execute(claiming.DECLARE_LOST, {}):
            # Only the earliest end of a lease is known; look again for the next.
            self._agenda.look_within(0.0)
        lost = await self._connection.execute(claiming.LOST_WORKERS, {})
        if not lost:
            return
        worker_ids = [row.worker_id for row in lost]
        queue_names = sorted({name for row in lost for name in row.queue_names})
        began, passed = time.monotonic(), 0
        while True:
            found = await self._connection.execute(
                claiming.RUNS_OF_LOST,
                {"worker_ids": worker_ids, "queue_names": queue_names, "wanted": BATCH, "passed": passed},
            )
            passed += len(found) - await self._take([row.task_id for row in found], worker_ids)
            if len(found) < BATCH:
                break
        if passed:
            # Other transactions hold these rows locked, perhaps those of the lost worker, which the server still keeps
            # open because it has not noticed the loss of the connection.
            self.next_search = 0.0
            self._agenda.look_within(max(LOCKED_RUNS_RETRY_DELAY, LOCKED_PAUSE_RATIO * (time.monotonic() - began)))
        await self._connection.execute(claiming.DELETE_LOST_WORKERS, {"age": LOST_WORKER_RETENTION})

    async def take_orphaned(self) -> None:
        """Take over runs whose worker does not exist."""
        orphaned = await self._connection.execute(claiming.ORPHANED_RUNS, {"wanted": BATCH})
        await self._take([row.task_id for row in orphaned], list({row.claimed_by for row in orphaned}))

    async def _take(self, task_ids: list[uuid.UUID], worker_ids: list[uuid.UUID]) -> int:
        if not task_ids:
            return 0
        rows = await self._connection.execute(
            outcomes.take_over(),
            {"task_ids": task_ids, "next_run_ids": [new_id() for _ in task_ids], "worker_ids": worker_ids},
        )
        if rows:
            # All ids, because a search of the log for one of them is how its owner learns of the lost worker.
            ids = ", ".join(str(row.task_id) for row in rows)
            logger.warning("took over %d runs of lost workers, of the tasks %s", len(rows), ids)
        if suspects := [str(row.task_id) for row in rows if row.lease_losses == SUSPECT_AFTER]:
            logger.warning(
                "%d tasks have lost %d workers in a row and run alone from now on: %s",
                len(suspects),
                SUSPECT_AFTER,
                ", ".join(suspects),
            )
        failed = [row for row in rows if row.state == "failed"]
        self._executor.failed_by_takeover(failed)
        self._agenda.wake_parents(row.task_id for row in failed if row.parent_task_id is not None)
        self._agenda.cascade(row.task_id for row in failed)
        pending = Hint().add_rows(row for row in rows if row.state == "pending").add_follow_ups(failed)
        # A suspect needs a worker without runs, which this one may not be although it has slots.
        self._dispatcher.announce(pending, everywhere=any(row.lease_losses >= SUSPECT_AFTER for row in rows))
        return len(rows)
