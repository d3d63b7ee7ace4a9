"""Deletion of ended tasks, as far as other rows allow it."""

from __future__ import annotations

import math
import time
import uuid

from sqlalchemy.exc import DBAPIError, IntegrityError

from ..database_errors import LOCK_NOT_AVAILABLE, sqlstate
from ..statements import queues
from .channel import Executing


async def delete_ended(database: Executing, task_ids: list[uuid.UUID], until: float = math.inf) -> list[uuid.UUID]:
    """Delete those of the tasks that have ended and that nothing needs; return their ids, which must be sorted."""
    try:
        return [row.task_id for row in await database.execute(queues.DELETE_TASKS, {"task_ids": task_ids})]
    except DBAPIError as error:
        # A foreign key or an open transaction of the application holds one of the tasks; the others can be deleted.
        if not isinstance(error, IntegrityError) and sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        if len(task_ids) == 1 or time.monotonic() >= until:
            return []
        middle = len(task_ids) // 2
        first = await delete_ended(database, task_ids[:middle], until)
        return first + await delete_ended(database, task_ids[middle:], until)
