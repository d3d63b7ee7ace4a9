"""The one query that tells maintenance what is due, the status of a transaction, and savepoints."""

from __future__ import annotations

from sqlalchemy import Text, Uuid, bindparam, cast, exists, func, literal_column, select

from ..models import Event, Message, Schedule, TaskRow, WorkerRow
from .expressions import clock, constant, statement_time
from .sql import Sql

_fired = (Schedule.paused_at.is_(None), Schedule.backend == constant("worker"))

NEXT_DUE = select(
    select(func.min(TaskRow.cancel_at))
    .where(TaskRow.finished_at.is_(None), TaskRow.cancel_at.is_not(None))
    .scalar_subquery()
    .label("next_cancel_at"),
    select(func.min(WorkerRow.expires_at))
    .where(WorkerRow.lost_at.is_(None), WorkerRow.worker_id != bindparam("worker_id", type_=Uuid()))
    .scalar_subquery()
    .label("next_expiry_at"),
    exists().where(WorkerRow.lost_at.is_not(None)).label("lost_workers"),
    exists().where(Event.delivered_at.is_(None)).label("undelivered_events"),
    exists().where(Message.delivered_at.is_(None), Message.sent_at <= statement_time()).label("undelivered_messages"),
    exists().where(*_fired, Schedule.next_tick_at <= statement_time()).label("due_ticks"),
    # Only future ticks: a due schedule that cannot be fired would hide when the next one is due.
    select(func.min(Schedule.next_tick_at))
    .where(*_fired, Schedule.next_tick_at > statement_time())
    .scalar_subquery()
    .label("next_tick_at"),
    clock().label("now"),
)
"""The next time limit, lease expiry and tick; and whether lost workers, undelivered events or messages, or due ticks
exist now.
"""

TRANSACTION_ID = select(cast(func.pg_current_xact_id_if_assigned(), Text()))
"""The id of this transaction; null if it has written nothing."""

TRANSACTION_STATUS = select(
    func.pg_xact_status(bindparam("transaction_id", type_=Text()).op("::")(literal_column("xid8"))).label("status")
)
"""The status of a transaction: committed, aborted or in progress."""

SAVEPOINT = Sql("SAVEPOINT durable_script")
ROLLBACK_TO_SAVEPOINT = Sql("ROLLBACK TO SAVEPOINT durable_script")
RELEASE_SAVEPOINT = Sql("RELEASE SAVEPOINT durable_script")
