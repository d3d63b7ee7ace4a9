"""Deletion of ended tasks, of events and of counts that queues keep no longer, in bounded batches."""

from __future__ import annotations

import math
import time
import uuid
from datetime import UTC, datetime

from ..database.channel import Executing
from ..database.deletion import delete_ended
from ..statements import queues

PAGE = 1000
PAGES = 3
"""Pages per outcome and queue that one deletion looks at. The next one continues there, because a page may hold nothing
but tasks that are still needed."""
PAGE_TIMEOUT = 1.0
"""Seconds after which a worker leaves a page of which other transactions hold many rows, because other work waits."""
OUTCOMES = ("completed", "cancelled", "failed")

Position = tuple[datetime, uuid.UUID]
"""The position of an ended task: the time of its end, and its id."""
_BEGINNING: Position = (datetime(1, 1, 2, tzinfo=UTC), uuid.UUID(int=0))


async def delete_tasks(database: Executing, queue_name: str, age: float, limit: int) -> int:
    """Delete up to `limit` tasks that ended more than `age` seconds ago, except those that are still needed."""
    deleted = 0
    for outcome in OUTCOMES:
        after: Position | None = _BEGINNING
        while after is not None and deleted < limit:
            count, after = await _delete_page(database, queue_name, outcome, age, limit - deleted, after)
            deleted += count
    return deleted


class Retention:
    """Deletes what queues keep no longer, a bounded batch per call."""

    def __init__(self, connection: Executing) -> None:
        self._connection = connection
        self._reached: dict[tuple[str, str], Position] = {}

    async def delete_expired(self) -> bool:
        """Delete a batch of each queue. Return True if there may be more to delete."""
        more = False
        for queue in await self._connection.execute(queues.RETENTIONS):
            if queue.retention is not None:
                for outcome in OUTCOMES:
                    more |= await self._delete_tasks(queue.queue_name, outcome, float(queue.retention))
            if queue.event_retention is not None:
                deleted = await self._connection.execute(
                    queues.DELETE_EVENTS,
                    {"queue_name": queue.queue_name, "age": float(queue.event_retention), "wanted": PAGE},
                )
                more |= len(deleted) == PAGE
            if queue.minute_retention is not None:
                deleted = await self._connection.execute(
                    queues.DELETE_MINUTES,
                    {"queue_name": queue.queue_name, "age": float(queue.minute_retention), "wanted": PAGE},
                )
                more |= len(deleted) == PAGE
        return more

    async def _delete_tasks(self, queue_name: str, outcome: str, age: float) -> bool:
        after = self._reached.pop((queue_name, outcome), _BEGINNING)
        deleted = 0
        for _ in range(PAGES):
            until = time.monotonic() + PAGE_TIMEOUT
            count, following = await _delete_page(self._connection, queue_name, outcome, age, PAGE, after, until)
            deleted += count
            if following is None:
                return False
            after = following
            if time.monotonic() >= until:
                break
        self._reached[queue_name, outcome] = after
        return deleted > 0


async def _delete_page(
    database: Executing,
    queue_name: str,
    outcome: str,
    age: float,
    limit: int,
    after: Position,
    until: float = math.inf,
) -> tuple[int, Position | None]:
    """Delete what can be deleted of a page of ended tasks; return the count, and where the next page begins, if any."""
    page = await database.execute(
        queues.FINISHED_BEFORE,
        {
            "queue_name": queue_name,
            "outcome": outcome,
            "age": age,
            "after_time": after[0],
            "after_id": after[1],
            "wanted": min(PAGE, limit),
        },
    )
    if not page:
        return 0, None
    left = {row.task_id for row in page}
    # A parent can be deleted once its children have been.
    while left and (deleted := await delete_ended(database, sorted(left), until)):
        left.difference_update(deleted)
    return len(page) - len(left), (page[-1].finished_at, page[-1].task_id)
