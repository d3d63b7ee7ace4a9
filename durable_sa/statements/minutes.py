"""The tasks that ended per minute: written by workers, and read for charts."""

from __future__ import annotations

from sqlalchemy import BigInteger, DateTime, Text, Uuid, exists, select
from sqlalchemy.dialects.postgresql import insert

from ..models import Queue, TaskMinute
from .expressions import rows

_counted = rows(
    "counted",
    queue_names=Text(),
    minutes=DateTime(timezone=True),
    task_names=Text(),
    worker_ids=Uuid(),
    completed=BigInteger(),
    failed=BigInteger(),
    cancelled=BigInteger(),
    milliseconds=BigInteger(),
    slowest=BigInteger(),
)
_NUMBERS = ("completed", "failed", "cancelled", "milliseconds", "slowest")
_insertion = insert(TaskMinute).from_select(
    ["queue_name", "minute", "task_name", "worker_id", *_NUMBERS],
    select(_counted).where(exists().where(Queue.queue_name == _counted.c.queue_names)),
)
WRITE = _insertion.on_conflict_do_update(
    index_elements=[TaskMinute.queue_name, TaskMinute.minute, TaskMinute.task_name, TaskMinute.worker_id],
    set_={name: _insertion.excluded[name] for name in _NUMBERS},
)
"""Write what a worker has counted in some minutes, which replaces what it wrote before. Dropped queues are left out."""
