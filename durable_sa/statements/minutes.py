"""The tasks that ended per minute: written by workers, and read for charts."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    DateTime,
    Integer,
    Text,
    Uuid,
    bindparam,
    cast,
    exists,
    func,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import insert

from ..models import Queue, TaskMinute
from .expressions import array, rows

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

_since = bindparam("since", type_=DateTime(timezone=True))
_chosen = array("queue_names", Text())
_totals = tuple(cast(func.sum(getattr(TaskMinute, name)), BigInteger()).label(name) for name in _NUMBERS[:-1])

# Grouped below each queue, so that the planner looks its minutes up instead of reading those of all time.
_of_queue = (
    select(TaskMinute.minute, *_totals[:2])
    .where(TaskMinute.queue_name == Queue.queue_name, TaskMinute.minute >= _since)
    .group_by(TaskMinute.minute)
    .correlate(Queue)
    .lateral("of_queue")
)
LATEST = (
    select(Queue.queue_name, _of_queue.c.minute, _of_queue.c.completed, _of_queue.c.failed)
    .join(_of_queue, true())
    .where(or_(_chosen.is_(None), Queue.queue_name == func.any(_chosen)))
)
"""The tasks of the chosen queues, or of all, that ended in each minute since a time."""

_task_name = bindparam("task_name", type_=Text())
_bucket = func.floor(
    func.extract("epoch", TaskMinute.minute - _since) / cast(bindparam("seconds", type_=Integer()), Integer())
)
OF_QUEUE = (
    select(
        cast(_bucket, Integer()).label("bucket"),
        TaskMinute.task_name,
        *_totals,
        func.max(TaskMinute.slowest).label("slowest"),
    )
    .where(
        TaskMinute.queue_name == bindparam("queue_name", type_=Text()),
        TaskMinute.minute >= _since,
        or_(cast(_task_name, Text()).is_(None), TaskMinute.task_name == _task_name),
    )
    .group_by(func.grouping_sets(tuple_(_bucket), tuple_(TaskMinute.task_name)))
)
"""The tasks of a queue, or of one name, that ended since a time: a row for each period of so many seconds, whose
`task_name` is null, and one for each name, whose `bucket` is null.
"""
