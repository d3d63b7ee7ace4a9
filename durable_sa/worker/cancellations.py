"""Cancellations that follow from something else: from the failure or cancellation of an ancestor, or from a limit."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row

from ..database.channel import DedicatedConnection
from ..database.hint import Hint
from ..statements import cancelling
from .agenda import Agenda
from .dispatcher import Dispatcher
from .minutes import Minutes
from .wakeups import BATCH, LOCKED_PAUSE_RATIO, LOCKED_RETRY_DELAY


class Cancellations:
    """Cancels tasks, in batches that skip the rows that other transactions hold locked."""

    def __init__(
        self, connection: DedicatedConnection, agenda: Agenda, dispatcher: Dispatcher, minutes: Minutes
    ) -> None:
        self._connection = connection
        self._agenda = agenda
        self._dispatcher = dispatcher
        self._minutes = minutes

    async def cascade(self, task_ids: list[uuid.UUID]) -> None:
        """Cancel all descendants of these tasks."""
        for origin in task_ids:
            began, passed = time.monotonic(), 0
            while rows := await self._connection.execute(
                cancelling.DESCENDANTS, {"ancestor_ids": [origin], "wanted": BATCH, "passed": passed}
            ):
                cancelled = await self._connection.execute(
                    cancelling.cascade(), {"task_ids": [row.task_id for row in rows], "origin": origin}
                )
                self._follow_up(cancelled)
                passed += len(rows) - len(cancelled)
            if passed:
                # How long these rows stay locked is not known, so other work goes first.
                took = time.monotonic() - began
                self._agenda.defer_cascade(origin, max(LOCKED_RETRY_DELAY, LOCKED_PAUSE_RATIO * took))

    async def cancel_overdue(self) -> bool:
        """Cancel tasks that have passed a limit of their policy. Return True if there were any."""
        found = False
        while True:
            rows = await self._connection.execute(cancelling.cancel_overdue(), {"wanted": BATCH})
            self._follow_up(rows)
            self._agenda.cascade(row.task_id for row in rows)
            found = found or bool(rows)
            if len(rows) < BATCH:
                return found

    def _follow_up(self, cancelled: Sequence[Row[Any]]) -> None:
        for row in cancelled:
            # A running task is counted by the worker that runs it, because that one sees the end of each of its runs.
            if row.was != "running":
                self._minutes.ended(row.queue_name, row.task_name, "cancelled")
        self._agenda.wake_parents(row.task_id for row in cancelled if row.parent_task_id is not None)
        # Those that run here are found by way of the agenda, to which the dispatcher adds the hint.
        hint = Hint(cancelled=any(row.was == "running" or row.slot is not None for row in cancelled))
        self._dispatcher.announce(hint.add_follow_ups(cancelled))
