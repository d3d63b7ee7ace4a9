"""The claims of a worker from queues with limits: drains, claims by key, and when to look next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any
from uuid import UUID

from ..database.channel import DedicatedConnection
from ..statements import limits
from ..statements.claiming import ClaimedRun
from .cursors import FULL_SCAN_INTERVAL, FULL_SCAN_PAUSE_RATIO

EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
BUSY_PAUSE = 0.002
"""Seconds until the next look at a queue that seems ready, and where a claim has found nothing: another worker may have
locked its keys or arrivals. It doubles with each such claim."""
LONGEST_BUSY_PAUSE = 0.05
FLOOR_MARGIN = timedelta(seconds=1)
"""Age of a key's next look from which on claims leave it to the full looks: the longest that a statement may take."""


@dataclass(slots=True)
class LimitedQueue:
    """Where a worker stands with a queue with limits."""

    dirty: bool = True
    """Arrivals may wait, or keys be ready."""
    next_at: float | None = None
    """When the next key is due, on the local monotonic clock."""
    ready_floor: datetime = EARLIEST
    """No key is due earlier. Entries of the index that are dead, and not vacuumed, lie below."""
    arrival_floor: int = 0
    """No arrival has a lower number, except of transactions that were open for long."""
    drained: int = 0
    """The highest number that was drained."""
    drained_before: tuple[float, int] = (0.0, 0)
    in_vain: int = 0
    """Claims in a row that have found nothing."""
    suspects: bool = False
    """The last look has found a suspect, which a worker without runs may claim."""
    next_full_look: float = 0.0
    """When the next claim disregards the floors, on the local monotonic clock."""

    def due(self, now: float) -> bool:
        """Return whether a claim may find something."""
        return self.dirty or (self.next_at is not None and now >= self.next_at)

    def drained_up_to(self, number: int, now: float) -> None:
        """Raise the floor of arrivals to what was drained a second ago."""
        self.drained = max(self.drained, number)
        if now - self.drained_before[0] >= FULL_SCAN_INTERVAL:
            self.arrival_floor = self.drained_before[1]
            self.drained_before = (now, self.drained)


class LimitedQueues:
    """The queues with limits that a worker serves, as far as it knows them."""

    def __init__(self) -> None:
        self.queues: dict[str, LimitedQueue] = {}

    def __contains__(self, queue_name: str) -> bool:
        return queue_name in self.queues

    def add(self, queue_names: Iterable[str]) -> None:
        """Note that queues have limits."""
        for name in queue_names:
            self.queues.setdefault(name, LimitedQueue())

    def changed(self) -> None:
        """Note that keys may have room."""
        for queue in self.queues.values():
            queue.dirty = True

    def hinted(self, queue_name: str) -> None:
        """Note that a queue may have new tasks."""
        if (queue := self.queues.get(queue_name)) is not None:
            queue.dirty = True

    def scan_all(self) -> None:
        """Have the next claims disregard what is known."""
        for queue in self.queues.values():
            queue.dirty = True
            queue.next_full_look = 0.0

    def due(self, queue_name: str) -> bool:
        """Return whether a claim from a queue may find something."""
        return self.queues[queue_name].due(time.monotonic())

    @property
    def idle(self) -> bool:
        """True if no claim may find something now."""
        return not any(map(self.due, self.queues))

    @property
    def next_at(self) -> float | None:
        """When a key of any queue is due next, on the local monotonic clock."""
        return min((queue.next_at for queue in self.queues.values() if queue.next_at is not None), default=None)


class LimitedClaims:
    """The claims from queues with limits. `on_preparing` is called with the name of one that is being set up."""

    def __init__(
        self, connection: DedicatedConnection, limited: LimitedQueues, *, on_preparing: Callable[[str], None]
    ) -> None:
        self._connection = connection
        self._queues = limited.queues
        self._on_preparing = on_preparing

    async def claim(
        self, queue_name: str, wanted: int, worker_id: UUID, task_names: list[str], priorities: list[int]
    ) -> list[ClaimedRun]:
        """Add what has arrived to the keys of a queue, and claim up to so many tasks."""
        queue = self._queues[queue_name]
        began = time.monotonic()
        full_look = began >= queue.next_full_look
        queue.dirty = False
        try:
            await self._drain(queue_name, queue, full_look=full_look)
            rows = await self._connection.execute(
                limits.CLAIM_LIMITED,
                {
                    **_parameters(queue_name, wanted, worker_id, task_names, priorities),
                    "ready_floor": EARLIEST if full_look else queue.ready_floor,
                    "floors": not full_look,
                },
            )
            if len(rows) >= wanted and not full_look:
                queue.dirty = True
            else:
                queue.in_vain = 0 if rows else min(queue.in_vain + 1, 10)
                pause = min(LONGEST_BUSY_PAUSE, BUSY_PAUSE * 2**queue.in_vain) if queue.in_vain else 0.0
                await self.look([queue_name], full_look=full_look, pause=pause)
        except BaseException:
            queue.dirty = True
            raise
        if full_look:
            took = time.monotonic() - began
            queue.next_full_look = time.monotonic() + max(FULL_SCAN_INTERVAL, FULL_SCAN_PAUSE_RATIO * took)
        return [ClaimedRun._make(row) for row in rows]

    async def claim_suspect(
        self, queue_name: str, wanted: int, worker_id: UUID, task_names: list[str], priorities: list[int]
    ) -> list[ClaimedRun]:
        """Claim a suspect of a queue."""
        parameters = _parameters(queue_name, wanted, worker_id, task_names, priorities)
        rows = await self._connection.execute(limits.CLAIM_LIMITED_SUSPECT, parameters)
        self._queues[queue_name].dirty = True
        return [ClaimedRun._make(row) for row in rows]

    async def _drain(self, queue_name: str, queue: LimitedQueue, *, full_look: bool) -> None:
        drained = limits.DRAIN_LIMIT
        while drained == limits.DRAIN_LIMIT:
            floor = 0 if full_look else queue.arrival_floor
            rows = await self._connection.execute(limits.DRAIN_ARRIVALS, {"queue_name": queue_name, "floor": floor})
            drained = rows[0].drained
            if drained:
                queue.drained_up_to(rows[0].last, time.monotonic())

    async def look(
        self, queue_names: Sequence[str] | None = None, *, full_look: bool = True, pause: float = 0.0
    ) -> None:
        """Look when keys of these queues, or of all, are due next, but not within so many seconds."""
        names = list(self._queues if queue_names is None else queue_names)
        floors = [EARLIEST if full_look else self._queues[name].ready_floor for name in names]
        for row in await self._connection.execute(limits.LOOK, {"queue_names": names, "ready_floors": floors}):
            queue = self._queues[row.queue_name]
            now = time.monotonic()
            if full_look:
                earliest = row.now if row.earliest is None else min(row.earliest, row.now)
                queue.ready_floor = earliest - FLOOR_MARGIN
            queue.next_at = None
            if row.next_at is not None:
                queue.next_at = now + max(pause, (row.next_at - row.now) / timedelta(seconds=1))
            if row.arrivals:
                # Another worker has locked them, or they have come just now.
                queue.next_at = now + pause
            queue.suspects = row.suspects
            if row.preparing:
                self._on_preparing(row.queue_name)


def _parameters(
    queue_name: str, wanted: int, worker_id: UUID, task_names: list[str], priorities: list[int]
) -> dict[str, Any]:
    """Return the parameters of a claim without floors."""
    return {
        "queue_name": queue_name,
        "worker_id": worker_id,
        "wanted": wanted,
        "task_names": task_names,
        "priorities": priorities,
        "ready_floor": EARLIEST,
        "floors": False,
        "floor_of": _hash(task_names),
    }


def _hash(task_names: Sequence[str]) -> int:
    """Return a number for the names of a worker's tasks, the same in all workers that have the same."""
    text = "\n".join(sorted(task_names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)
