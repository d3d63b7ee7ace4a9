"""How far a worker has claimed each lane, a queue and a priority in it: the floors that its claims start from."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row

from ..database.hint import Hint
from ..statements.claiming import ClaimedRun

Floor = tuple[datetime, uuid.UUID]

BOTTOM: Floor = (datetime(1, 1, 2, tzinfo=UTC), uuid.UUID(int=0))
"""No floor: below whatever there may be."""

SEARCH_INTERVAL = 1.0
"""Seconds between claims without floor, at the least."""

SEARCH_SHARE = 10
"""And at least so many times as long as the last such claim took, so that they never take more than a tenth."""


class ClaimCursors:
    """The lanes of a worker's queues in the order of claiming, with their floors.

    A floor hides what appears below it: a late commit, a task that was locked when the claim passed. Such tasks are
    found by claims without floor, now and then, and by hints, which carry the earliest time in a lane and lower its
    floor.
    """

    def __init__(self, queue_names: Sequence[str]) -> None:
        self._queues = {name: position for position, name in enumerate(queue_names)}
        self._floors: dict[tuple[str, int], Floor] = {(name, 0): BOTTOM for name in queue_names}
        self._order: list[tuple[str, int]] = []
        self._sort()
        self._next_search = 0.0
        self.next_due: float | None = None
        """When the next task is due, on the local monotonic clock."""

    def _sort(self) -> None:
        self._order = sorted(self._floors, key=lambda lane: (self._queues[lane[0]], lane[1]))

    @property
    def search_in(self) -> float:
        """Seconds until a claim should go without floors; less than nothing where that is overdue."""
        return self._next_search - time.monotonic()

    @property
    def search_due(self) -> bool:
        """Whether the next claim should."""
        return self.search_in <= 0

    @property
    def search_overdue(self) -> bool:
        """Whether it cannot be put off any longer."""
        return self.search_in <= -SEARCH_INTERVAL

    @property
    def due(self) -> bool:
        """Whether the time of the next task that is known has come."""
        return self.next_due is not None and time.monotonic() >= self.next_due

    def searched(self, took: float) -> None:
        """A claim without floor has taken so many seconds."""
        self._next_search = time.monotonic() + max(SEARCH_INTERVAL, SEARCH_SHARE * took)

    def search_soon(self) -> None:
        """Something may be anywhere."""
        self._next_search = 0.0

    def parameters(self, *, search: bool) -> dict[str, list[Any]]:
        """The arrays that the claim binds."""
        floors = [BOTTOM if search else self._floors[lane] for lane in self._order]
        return {
            "queue_names": [lane[0] for lane in self._order],
            "priorities": [lane[1] for lane in self._order],
            "floor_times": [floor[0] for floor in floors],
            "floor_ids": [floor[1] for floor in floors],
        }

    def claimed(self, runs: Sequence[ClaimedRun], *, search: bool, full: bool) -> None:
        """Raise the floors to what has been claimed.

        Where a claim without floor came back full, there may be more of the same in the last lane that it reached,
        so that lane's floor comes down to where it stopped.
        """
        reached: dict[tuple[str, int], Floor] = {}
        for run in runs:
            lane = (run.queue_name, run.priority)
            floor = (run.available_at, run.task_id)
            if lane not in reached or floor > reached[lane]:
                reached[lane] = floor
        for lane, floor in reached.items():
            if (search and full) or floor > self._floors.get(lane, BOTTOM):
                self._floors[lane] = floor

    def lower(self, hint: Hint, now: datetime) -> bool:
        """Take note of a hint. True if something in it can be claimed at once."""
        ready = False
        for (queue_name, priority), available_at in hint.lanes.items():
            if queue_name not in self._queues:
                continue
            floor = (available_at, uuid.UUID(int=0))
            lane = (queue_name, priority)
            if lane not in self._floors:
                self._floors[lane] = floor
                self._sort()
            elif floor < self._floors[lane]:
                self._floors[lane] = floor
            wait = (available_at - now).total_seconds()
            if wait <= 0:
                ready = True
            else:
                self.due_in(wait)
        return ready

    def due_in(self, seconds: float) -> None:
        """A task becomes claimable after so many seconds."""
        at = time.monotonic() + seconds
        if self.next_due is None or at < self.next_due:
            self.next_due = at

    def surveyed(self, rows: Iterable[Row[Any]]) -> None:
        """The lanes in use and their next tasks, as the database has them."""
        found = {(row.queue_name, row.priority): row for row in rows}
        for lane in found:
            if lane not in self._floors:
                self._floors[lane] = BOTTOM
        for lane in [lane for lane in self._floors if lane not in found and lane[1] != 0]:
            del self._floors[lane]
        self._sort()
        self.next_due = None
        for row in found.values():
            if row.next_at is not None:
                self.due_in(max(0.0, (row.next_at - row.now) / timedelta(seconds=1)))
