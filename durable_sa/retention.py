"""Deleting what nobody needs any more, in bounded batches."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from sqlalchemy import Executable, Row
from sqlalchemy.exc import IntegrityError

from .statements import queues

PAGE = 1000


class Executing(Protocol):
    """Something that runs one statement as a transaction: a database, a channel."""

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run a statement."""
        ...


async def delete_tasks(database: Executing, queue_name: str, age: float, limit: int) -> int:
    """Delete up to `limit` tasks that ended more than `age` seconds ago; those still needed are passed over."""
    deleted = 0
    for outcome in ("completed", "cancelled", "failed"):
        after: tuple[datetime, uuid.UUID] = (datetime(1, 1, 2, tzinfo=UTC), uuid.UUID(int=0))
        while deleted < limit:
            page = await database.execute(
                queues.FINISHED_BEFORE,
                {
                    "queue_name": queue_name,
                    "outcome": outcome,
                    "age": age,
                    "after_time": after[0],
                    "after_id": after[1],
                    "wanted": min(PAGE, limit - deleted),
                },
            )
            if not page:
                break
            left = {row.task_id for row in page}
            # A parent goes when its children have gone.
            while left and (gone := await _delete(database, sorted(left))):
                left.difference_update(gone)
                deleted += len(gone)
            after = (page[-1].finished_at, page[-1].task_id)
    return deleted


async def forget_old(database: Executing) -> None:
    """Delete a batch of what each queue keeps no longer."""
    for queue in await database.execute(queues.RETENTIONS):
        if queue.retention is not None:
            await delete_tasks(database, queue.queue_name, float(queue.retention), PAGE)
        if queue.event_retention is not None:
            await database.execute(
                queues.DELETE_EVENTS,
                {"queue_name": queue.queue_name, "age": float(queue.event_retention), "wanted": PAGE},
            )


async def _delete(database: Executing, task_ids: list[uuid.UUID]) -> list[uuid.UUID]:
    try:
        return [row.task_id for row in await database.execute(queues.DELETE_TASKS, {"task_ids": task_ids})]
    except IntegrityError:
        # An application's foreign key holds one of them. The others need not stay for that.
        if len(task_ids) == 1:
            return []
        middle = len(task_ids) // 2
        return await _delete(database, task_ids[:middle]) + await _delete(database, task_ids[middle:])
