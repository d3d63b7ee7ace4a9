"""Claim cursors: how far a worker has claimed each lane, which is a queue with one priority in it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row

from ..database.hint import Hint
from ..statements.claiming import ClaimedRun

Cursor = tuple[datetime, uuid.UUID]
"""The time from which a task is claimable, and its id: the order of claims within a lane."""

LANE_START: Cursor = (datetime(1, 1, 2, tzinfo=UTC), uuid.UUID(int=0))
"""The cursor before the first task of a lane."""

FULL_SCAN_INTERVAL = 1.0
"""Least seconds between full scans."""

FULL_SCAN_PAUSE_RATIO = 10
"""Least pause between full scans, as a multiple of the last scan's duration: they take a tenth of the time at most."""


class ClaimCursors:
    """The lanes of a worker's queues in the order of claims, each with its cursor.

    A cursor hides tasks that appear behind it: those of a late commit, and those whose rows were locked when the claim
    passed. Full scans, which are claims from the start of all lanes, find them now and then. Hints find them at once,
    because they carry the earliest time in a lane and set its cursor back.
    """

    def __init__(self, queue_names: Sequence[str]) -> None:
        self._queues = {name: position for position, name in enumerate(queue_names)}
        self._cursors: dict[tuple[str, int], Cursor] = {(name, 0): LANE_START for name in queue_names}
        self._order: list[tuple[str, int]] = []
        self._sort()
        self._next_full_scan = 0.0
        self.next_due: float | None = None
        """When the next known task is due, on the local monotonic clock."""

    def _sort(self) -> None:
        self._order = sorted(self._cursors, key=lambda lane: (self._queues[lane[0]], lane[1]))

    @property
    def full_scan_in(self) -> float:
        """Seconds until a full scan is due; negative if it is overdue."""
        return self._next_full_scan - time.monotonic()

    @property
    def full_scan_due(self) -> bool:
        """True if the next claim should be a full scan, unless a hint has just named tasks."""
        return self.full_scan_in <= 0

    @property
    def full_scan_overdue(self) -> bool:
        """True if the next claim must be a full scan."""
        return self.full_scan_in <= -FULL_SCAN_INTERVAL

    @property
    def due(self) -> bool:
        """True if the next known task is due."""
        return self.next_due is not None and time.monotonic() >= self.next_due

    def full_scan_made(self, took: float) -> None:
        """Schedule the next full scan after one that took so many seconds."""
        self._next_full_scan = time.monotonic() + max(FULL_SCAN_INTERVAL, FULL_SCAN_PAUSE_RATIO * took)

    def require_full_scan(self) -> None:
        """Make a full scan overdue."""
        self._next_full_scan = 0.0

    def priorities(self, queue_name: str) -> list[int]:
        """Return the priorities in use in a queue, in the order of claims."""
        return [priority for name, priority in self._order if name == queue_name]

    def parameters(self, queue_names: Sequence[str] | None = None, *, full_scan: bool) -> dict[str, list[Any]]:
        """Return the arrays that the claim binds: the lanes of these queues, or of all."""
        order = self._order if queue_names is None else [lane for lane in self._order if lane[0] in queue_names]
        cursors = [LANE_START if full_scan else self._cursors[lane] for lane in order]
        return {
            "queue_names": [lane[0] for lane in order],
            "priorities": [lane[1] for lane in order],
            "cursor_times": [cursor[0] for cursor in cursors],
            "cursor_ids": [cursor[1] for cursor in cursors],
        }

    def claimed(self, runs: Sequence[ClaimedRun], *, full_scan: bool, full: bool) -> None:
        """Advance the cursors to what has been claimed.

        If a full scan came back full, more tasks behind the cursor may be left in the last lane that it reached, so
        the cursor of that lane is set back to where the scan stopped.
        """
        reached: dict[tuple[str, int], Cursor] = {}
        for run in runs:
            lane = (run.queue_name, run.priority)
            cursor = (run.available_at, run.task_id)
            if lane not in reached or cursor > reached[lane]:
                reached[lane] = cursor
        for lane, cursor in reached.items():
            if (full_scan and full) or cursor > self._cursors.get(lane, LANE_START):
                self._cursors[lane] = cursor

    def lower(self, hint: Hint, now: datetime) -> None:
        """Set cursors back to the times that a hint carries, and note when tasks that are not claimable yet are due."""
        for (queue_name, priority), available_at in hint.lanes.items():
            if queue_name not in self._queues:
                continue
            cursor = (available_at, uuid.UUID(int=0))
            lane = (queue_name, priority)
            if lane not in self._cursors:
                self._cursors[lane] = cursor
                self._sort()
            elif cursor < self._cursors[lane]:
                self._cursors[lane] = cursor
            wait = (available_at - now).total_seconds()
            if wait > 0:
                self.due_in(wait)

    def due_in(self, seconds: float) -> None:
        """Note that a task becomes claimable in so many seconds."""
        at = time.monotonic() + seconds
        if self.next_due is None or at < self.next_due:
            self.next_due = at

    def surveyed(self, rows: Iterable[Row[Any]]) -> None:
        """Take over the lanes that the database has, and the time of the next task in each."""
        found = {(row.queue_name, row.priority): row for row in rows}
        for lane in found:
            if lane not in self._cursors:
                self._cursors[lane] = LANE_START
        for lane in [lane for lane in self._cursors if lane not in found and lane[1] != 0]:
            del self._cursors[lane]
        self._sort()
        self.next_due = None
        for row in found.values():
            if row.next_at is not None:
                self.due_in(max(0.0, (row.next_at - row.now) / timedelta(seconds=1)))
