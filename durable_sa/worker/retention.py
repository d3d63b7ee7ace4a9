"""Deleting what nobody needs any more, in bounded batches."""

from __future__ import annotations

import math
import time
import uuid
from datetime import UTC, datetime

from sqlalchemy.exc import DBAPIError, IntegrityError

from ..database.channel import Executing
from ..database_errors import LOCK_NOT_AVAILABLE, sqlstate
from ..statements import queues

PAGE = 1000
PAGES = 3
"""Pages that a worker looks at in one go, of each outcome in each queue; where many tasks are still needed, it goes on
from there the next time."""
PATIENCE = 1.0
"""Seconds after which a worker leaves a page of which somebody holds many rows: it has other things to do."""
OUTCOMES = ("completed", "cancelled", "failed")

Position = tuple[datetime, uuid.UUID]
"""Of an ended task, by the time of its end."""
_BEGINNING: Position = (datetime(1, 1, 2, tzinfo=UTC), uuid.UUID(int=0))


async def delete_tasks(database: Executing, queue_name: str, age: float, limit: int) -> int:
    """Delete up to `limit` tasks that ended more than `age` seconds ago; those still needed are passed over."""
    deleted = 0
    for outcome in OUTCOMES:
        after: Position | None = _BEGINNING
        while after is not None and deleted < limit:
            gone, after = await _delete_page(database, queue_name, outcome, age, limit - deleted, after)
            deleted += gone
    return deleted


class Retention:
    """Deletes what queues keep no longer, a bounded batch at each call."""

    def __init__(self) -> None:
        self._reached: dict[tuple[str, str], Position] = {}

    async def __call__(self, database: Executing) -> bool:
        """Delete a batch of each queue; whether there seems to be more of what can be deleted."""
        more = False
        for queue in await database.execute(queues.RETENTIONS):
            if queue.retention is not None:
                for outcome in OUTCOMES:
                    more |= await self._delete_tasks(database, queue.queue_name, outcome, float(queue.retention))
            if queue.event_retention is not None:
                deleted = await database.execute(
                    queues.DELETE_EVENTS,
                    {"queue_name": queue.queue_name, "age": float(queue.event_retention), "wanted": PAGE},
                )
                more |= len(deleted) == PAGE
        return more

    async def _delete_tasks(self, database: Executing, queue_name: str, outcome: str, age: float) -> bool:
        after = self._reached.pop((queue_name, outcome), _BEGINNING)
        deleted = 0
        for _ in range(PAGES):
            until = time.monotonic() + PATIENCE
            gone, following = await _delete_page(database, queue_name, outcome, age, PAGE, after, until)
            deleted += gone
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
    """Delete what can be of a page of ended tasks; how many, and where the next page begins, if there is one."""
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
    # A parent goes when its children have gone.
    while left and (gone := await _delete(database, sorted(left), until)):
        left.difference_update(gone)
    return len(page) - len(left), (page[-1].finished_at, page[-1].task_id)


async def _delete(database: Executing, task_ids: list[uuid.UUID], until: float) -> list[uuid.UUID]:
    try:
        return [row.task_id for row in await database.execute(queues.DELETE_TASKS, {"task_ids": task_ids})]
    except DBAPIError as error:
        # An application's foreign key holds one of them, or its open transaction. The others need not stay for that.
        if not isinstance(error, IntegrityError) and sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        if len(task_ids) == 1 or time.monotonic() >= until:
            return []
        middle = len(task_ids) // 2
        return await _delete(database, task_ids[:middle], until) + await _delete(database, task_ids[middle:], until)
