"""What is due for maintenance, in one look."""

from __future__ import annotations

from sqlalchemy import Uuid, bindparam, exists, func, select

from ..models import Event, Schedule, Task, WorkerRow
from .expressions import clock

LOOK = select(
    select(func.min(Task.cancel_at))
    .where(Task.finished_at.is_(None), Task.cancel_at.is_not(None))
    .scalar_subquery()
    .label("next_cancel_at"),
    select(func.min(WorkerRow.expires_at))
    .where(WorkerRow.lost_at.is_(None), WorkerRow.worker_id != bindparam("worker_id", type_=Uuid()))
    .scalar_subquery()
    .label("next_expiry_at"),
    exists().where(WorkerRow.lost_at.is_not(None)).label("lost_workers"),
    exists().where(Event.delivered_at.is_(None)).label("undelivered_events"),
    select(func.min(Schedule.next_tick_at))
    .where(Schedule.paused_at.is_(None), Schedule.backend == "worker")
    .scalar_subquery()
    .label("next_tick_at"),
    clock().label("now"),
)
"""When the next limit, lease or schedule is over, and whether events or lost workers are waiting to be dealt with."""
