"""The durable tables as mapped classes, for ``select()`` and joins beside an application's own models.

They have a ``MetaData`` of their own in the schema ``durable``, so that neither their names nor their migrations
collide with the application's. Read the tables freely, but write them only through :class:`durable_sa.Durable`, because
every write has to respect the fences.
"""

# No `from __future__ import annotations`: SQLAlchemy evaluates texts one by one, which takes 10 ms at import.
import uuid
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    DDL,
    JSON,
    REAL,
    BigInteger,
    CheckConstraint,
    DateTime,
    Float,
    Identity,
    Index,
    Integer,
    Interval,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    Uuid,
    event,
    insert,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA = "durable"
DEFAULT_QUEUE = "default"
REVISION = "durable_0009"
OLDEST = "durable_0001"
"""The oldest revision whose versions of the package work with these tables."""
RETENTION = "30 days"
"""The default retention of a queue's ended tasks and events."""

READABLE = (-62135510400, 253402128000)
"""The first and last second that drivers can read: the years 1 to 9999, in any time zone."""

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    },
)


class Base(DeclarativeBase):
    """The declarative base of durable's tables; an application's models have their own."""

    metadata = metadata
    type_annotation_map = {
        str: Text(),
        datetime: DateTime(timezone=True),
        timedelta: Interval(),
        uuid.UUID: Uuid(),
        float: Float(53),
        list[str]: ARRAY(Text()),
    }


_now = text("clock_timestamp()")


def _readable(column: str) -> CheckConstraint:
    """Constrain a time to what drivers can read, which excludes infinity."""
    first, last = READABLE
    return CheckConstraint(f"{column} BETWEEN to_timestamp({first}) AND to_timestamp({last})", name=column)


class Queue(Base):
    """A named queue, to which tasks, events and schedules belong, with their retention."""

    __tablename__ = "queues"
    __table_args__ = (
        CheckConstraint("retention BETWEEN '0' AND '36525 days'", name="retention"),
        CheckConstraint("event_retention BETWEEN '0' AND '36525 days'", name="event_retention"),
        {"comment": f"schema version: {REVISION} (for {OLDEST} and later)"},
    )

    queue_name: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=_now)
    paused_at: Mapped[datetime | None] = mapped_column(comment="set: nothing is claimed until it is resumed")
    retention: Mapped[timedelta | None] = mapped_column(
        server_default=RETENTION, comment="age at which finished tasks are deleted; null: never"
    )
    event_retention: Mapped[timedelta | None] = mapped_column(
        server_default=RETENTION, comment="age at which events are deleted; null: never"
    )
    limited_at: Mapped[datetime | None] = mapped_column(
        comment="set: its tasks are claimed key by key, under limits and in turn"
    )
    limits_ready_at: Mapped[datetime | None] = mapped_column(
        comment="when the tasks that ran at limited_at had been counted; until then none is claimed"
    )


class TaskRow(Base):
    """One row per task, from its spawn to its deletion: input, policy, schedule, lease and outcome."""

    __tablename__ = "tasks"

    task_id: Mapped[uuid.UUID] = mapped_column(primary_key=True, comment="UUIDv7, drawn by the spawning client")
    queue_name: Mapped[str]
    task_name: Mapped[str]
    params: Mapped[Any | None] = mapped_column(JSON(), comment="SQL null: the task takes none")
    headers: Mapped[dict[str, Any] | None] = mapped_column(JSONB())
    state: Mapped[str] = mapped_column(
        server_default="pending", comment="pending, running, sleeping, completed, failed or cancelled"
    )
    outcome: Mapped[str | None] = mapped_column(comment="null until the end, then completed, failed or cancelled")
    priority: Mapped[int] = mapped_column(SmallInteger(), server_default="0", comment="smaller is claimed first")
    attempt: Mapped[int] = mapped_column(Integer(), server_default="0", comment="attempts begun")
    run_id: Mapped[uuid.UUID] = mapped_column(comment="of the attempt that runs, or comes next")
    failures: Mapped[int] = mapped_column(Integer(), server_default="0", comment="failures of the task's own code")
    lease_losses: Mapped[int] = mapped_column(
        Integer(), server_default="0", comment="workers lost in a row while running it; from 2 on it runs alone"
    )
    max_attempts: Mapped[int] = mapped_column(Integer(), comment="failures at which it is given up")
    retry_kind: Mapped[str] = mapped_column(comment="none, fixed or exponential")
    retry_base_delay: Mapped[float] = mapped_column(comment="seconds")
    retry_factor: Mapped[float]
    retry_max_backoff: Mapped[float] = mapped_column(comment="seconds")
    retry_jitter: Mapped[float] = mapped_column(comment="share of the delay, 0 to 1")
    max_pending_time: Mapped[timedelta | None] = mapped_column(comment="from available_at to the first start")
    max_running_time: Mapped[timedelta | None] = mapped_column(comment="from the first start on")
    cancel_at: Mapped[datetime | None] = mapped_column(comment="when the limit in force now cancels it")
    parent_task_id: Mapped[uuid.UUID | None]
    cancelled_by: Mapped[uuid.UUID | None] = mapped_column(comment="the ancestor whose end cancelled it")
    parent_fence: Mapped[int | None] = mapped_column(
        BigInteger(), comment="the parent's when it was put back by hand: that end of the parent is none of its concern"
    )
    idempotency_key: Mapped[str | None]
    fence: Mapped[int] = mapped_column(
        BigInteger(), server_default="0", comment="rises with every change of hands; a run writes only under its own"
    )
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(comment="workers.worker_id that runs it; null: nobody")
    created_at: Mapped[datetime] = mapped_column(server_default=_now)
    available_at: Mapped[datetime | None] = mapped_column(comment="when it may be claimed; null: once a wait resolves")
    first_started_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None] = mapped_column(comment="start of the current attempt")
    finished_at: Mapped[datetime | None]
    output: Mapped[Any | None] = mapped_column(JSON())
    error: Mapped[Any | None] = mapped_column(JSON(), comment="the last failure: name, message, traceback, raw")
    max_lost_workers: Mapped[int | None] = mapped_column(
        Integer(), comment="workers lost in a row, while it ran alone, at which it is given up; null: 5"
    )
    limit_key: Mapped[str | None] = mapped_column(comment="empty: none, in a queue with limits")
    weight: Mapped[int | None] = mapped_column(SmallInteger(), comment="its share of a rate; null: 1")
    slot: Mapped[str | None] = mapped_column(comment="run or task: it holds a slot until its run ends, or it ends")
    resumes_at: Mapped[datetime | None] = mapped_column(
        comment="available_at of a begun task in a queue with limits: it is claimed before new ones"
    )
    unique_key: Mapped[str | None] = mapped_column(comment="of one unfinished task of the queue at most")
    follow_ups: Mapped[Any | None] = mapped_column(
        JSON(), comment="by outcome (failed, cancelled) the task that is spawned then"
    )

    # Only checks whose violation would stop or hide other tasks, because the server prepares each check anew for every
    # statement, in 6 us: fifteen checks took as long as inserting the row.
    __table_args__ = (
        CheckConstraint(
            "state IN ('pending', 'running', 'sleeping', 'completed', 'failed', 'cancelled')", name="state"
        ),
        CheckConstraint("(finished_at IS NULL) = (outcome IS NULL)", name="finished"),
        _readable("available_at"),
        _readable("cancel_at"),
        # The claim scans this index and changes none of its columns, so that claiming a task is a heap-only update.
        Index(
            "tasks_claim_idx",
            "queue_name",
            "priority",
            "available_at",
            "task_id",
            postgresql_where=text("finished_at IS NULL"),
        ),
        Index(
            "tasks_finished_idx",
            "queue_name",
            "outcome",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
        Index(
            "tasks_cancel_at_idx", "cancel_at", postgresql_where=text("finished_at IS NULL AND cancel_at IS NOT NULL")
        ),
        Index("tasks_parent_idx", "parent_task_id", postgresql_where=text("parent_task_id IS NOT NULL")),
        Index(
            "tasks_idempotency_idx",
            "queue_name",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        # Tasks of limited queues alone are in these; claims and ends of other tasks change none of their columns.
        Index(
            "tasks_limit_idx",
            "queue_name",
            "limit_key",
            "priority",
            "available_at",
            "task_id",
            postgresql_where=text("finished_at IS NULL AND limit_key IS NOT NULL"),
        ),
        Index(
            "tasks_resuming_idx",
            "queue_name",
            "limit_key",
            "resumes_at",
            "task_id",
            postgresql_where=text("finished_at IS NULL AND resumes_at IS NOT NULL"),
        ),
        Index(
            "tasks_suspects_idx",
            "queue_name",
            "limit_key",
            postgresql_where=text("finished_at IS NULL AND limit_key IS NOT NULL AND lease_losses >= 2"),
        ),
        # Ended tasks are found by their unique keys, too.
        Index("tasks_unique_keys_idx", "queue_name", "unique_key", postgresql_where=text("unique_key IS NOT NULL")),
        Index(
            "tasks_unique_idx",
            "queue_name",
            "unique_key",
            unique=True,
            postgresql_where=text("unique_key IS NOT NULL AND finished_at IS NULL"),
        ),
    )


class RunRow(Base):
    """One row per ended attempt. ``failed`` includes lost workers and releases at shutdown; see ``error``."""

    __tablename__ = "runs"

    task_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer(), primary_key=True, autoincrement=False)
    run_id: Mapped[uuid.UUID]
    state: Mapped[str]
    worker_id: Mapped[uuid.UUID | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime] = mapped_column(server_default=_now)
    error: Mapped[Any | None] = mapped_column(JSON())


class Checkpoint(Base):
    """The recorded result of a call in a task: a step's result, a child, an event's payload, a timeout, a wake time."""

    __tablename__ = "checkpoints"

    task_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[uuid.UUID] = mapped_column(
        primary_key=True, comment="hash of kind, name, arguments, branch and occurrence"
    )
    kind: Mapped[str]
    name: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="completed")
    value: Mapped[Any | None] = mapped_column(JSON())
    child_task_id: Mapped[uuid.UUID | None] = mapped_column(
        comment="the child that was spawned or joined, or the message that was received"
    )
    created_at: Mapped[datetime] = mapped_column(server_default=_now)
    duration: Mapped[float | None] = mapped_column(REAL(), comment="seconds that a step, a try or a wait took")
    arguments: Mapped[str | None] = mapped_column(comment="the beginning of those of a step or transaction, as JSON")


class Event(Base):
    """An emitted event; the first emit of a name in a queue wins."""

    __tablename__ = "events"
    __table_args__ = (
        CheckConstraint("octet_length(name) BETWEEN 1 AND 200 AND left(name, 1) <> '$'", name="name"),
        Index("events_undelivered_idx", "emitted_at", postgresql_where=text("delivered_at IS NULL")),
        Index("events_emitted_at_idx", "queue_name", "emitted_at"),
    )

    queue_name: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    payload: Mapped[Any | None] = mapped_column(JSON())
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB())
    emitted_at: Mapped[datetime] = mapped_column(server_default=_now)
    delivered_at: Mapped[datetime | None] = mapped_column(comment="when workers had handed it to every waiter")


class Wait(Base):
    """An unresolved wait of a task: for an event, for the end of a child, or for a message of the topic `name`."""

    __tablename__ = "waits"
    __table_args__ = (
        _readable("due_at"),
        Index("waits_event_idx", "queue_name", "event_name", postgresql_where=text("event_name IS NOT NULL")),
        Index("waits_child_idx", "child_task_id", postgresql_where=text("child_task_id IS NOT NULL")),
    )

    task_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[uuid.UUID] = mapped_column(primary_key=True, comment="of the checkpoint that will resolve it")
    kind: Mapped[str]
    name: Mapped[str]
    queue_name: Mapped[str]
    event_name: Mapped[str | None]
    child_task_id: Mapped[uuid.UUID | None]
    due_at: Mapped[datetime | None] = mapped_column(comment="when it times out")
    created_at: Mapped[datetime] = mapped_column(server_default=_now)


class Message(Base):
    """A message to a task, deleted when it is received. With an idempotency key it is kept, without its payload."""

    __tablename__ = "messages"
    __table_args__ = (
        PrimaryKeyConstraint("task_id", "message_id"),
        CheckConstraint("octet_length(topic) BETWEEN 1 AND 200 AND left(topic, 1) <> '$'", name="topic"),
        Index("messages_topic_idx", "task_id", "topic", "seq", postgresql_where=text("received_at IS NULL")),
        Index("messages_undelivered_idx", "sent_at", postgresql_where=text("delivered_at IS NULL")),
    )

    task_id: Mapped[uuid.UUID] = mapped_column(comment="the receiver")
    message_id: Mapped[uuid.UUID] = mapped_column(comment="drawn by the sender, or the hash of the idempotency key")
    seq: Mapped[int] = mapped_column(BigInteger(), Identity(always=True), comment="the order of receiving")
    topic: Mapped[str]
    payload: Mapped[Any | None] = mapped_column(JSON())
    idempotency_key: Mapped[str | None]
    sent_at: Mapped[datetime] = mapped_column(server_default=_now)
    delivered_at: Mapped[datetime | None] = mapped_column(
        comment="when workers had found that no stored wait of the task is for it"
    )
    received_at: Mapped[datetime | None]


class TaskValueRow(Base):
    """A value that a task has published, the last one of its name."""

    __tablename__ = "task_values"
    __table_args__ = (
        PrimaryKeyConstraint("task_id", "name"),
        CheckConstraint("octet_length(name) BETWEEN 1 AND 200 AND left(name, 1) <> '$'", name="name"),
    )

    task_id: Mapped[uuid.UUID]
    name: Mapped[str]
    value: Mapped[Any | None] = mapped_column(JSON())
    version: Mapped[int] = mapped_column(
        BigInteger(), server_default="1", comment="rises whenever the value is written"
    )
    updated_at: Mapped[datetime] = mapped_column(server_default=_now)


class Stream(Base):
    """A stream that a task writes: who may write it now, and what readers have to know besides the items."""

    __tablename__ = "streams"
    __table_args__ = (
        PrimaryKeyConstraint("task_id", "name"),
        CheckConstraint("octet_length(name) BETWEEN 1 AND 200", name="name"),
    )

    task_id: Mapped[uuid.UUID]
    name: Mapped[str]
    block_id: Mapped[uuid.UUID | None] = mapped_column(comment="the block that is open; null: none is")
    step_key: Mapped[uuid.UUID] = mapped_column(
        comment="of the step of the last block, or of the block in the task's body"
    )
    try_id: Mapped[uuid.UUID] = mapped_column(comment="the try of that step")
    began_after: Mapped[int] = mapped_column(
        BigInteger(), server_default="0", comment="the last position when that step began to write"
    )
    last_position: Mapped[int] = mapped_column(
        BigInteger(), server_default="0", comment="of the last item, while no block is open"
    )
    reserved: Mapped[int] = mapped_column(
        BigInteger(), server_default="0", comment="positions up to this may have been seen by readers"
    )
    restarts_after: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger()), comment="of each restart, the last position that still counts"
    )
    restarts_through: Mapped[list[int] | None] = mapped_column(
        ARRAY(BigInteger()), comment="of each restart, the last position that is superseded"
    )
    closed_at: Mapped[datetime | None] = mapped_column(comment="set: readers come to the end")
    opened_at: Mapped[datetime] = mapped_column(server_default=_now)


class StreamItems(Base):
    """Items of a stream that were written together."""

    __tablename__ = "stream_items"
    __table_args__ = (PrimaryKeyConstraint("task_id", "name", "position"),)

    task_id: Mapped[uuid.UUID]
    name: Mapped[str]
    position: Mapped[int] = mapped_column(BigInteger(), autoincrement=False, comment="of the last of the items")
    step_key: Mapped[uuid.UUID]
    try_id: Mapped[uuid.UUID]
    items: Mapped[Any] = mapped_column(JSON(), comment="an array")
    written_at: Mapped[datetime] = mapped_column(server_default=_now)


class TaskMinute(Base):
    """The tasks of a name that ended in a minute, as one worker has counted them.

    For charts, not for accounting: a worker that is lost takes the counts of its last seconds with it.
    """

    __tablename__ = "task_minutes"
    # In the order in which charts read it and retention deletes it.
    __table_args__ = (PrimaryKeyConstraint("queue_name", "minute", "task_name", "worker_id"),)

    queue_name: Mapped[str]
    minute: Mapped[datetime] = mapped_column(comment="its beginning")
    task_name: Mapped[str]
    worker_id: Mapped[uuid.UUID]
    completed: Mapped[int] = mapped_column(BigInteger(), server_default="0")
    failed: Mapped[int] = mapped_column(BigInteger(), server_default="0", comment="for good")
    cancelled: Mapped[int] = mapped_column(BigInteger(), server_default="0")
    milliseconds: Mapped[int] = mapped_column(
        BigInteger(), server_default="0", comment="from the claims of the last runs to their ends, in total"
    )
    slowest: Mapped[int] = mapped_column(BigInteger(), server_default="0", comment="milliseconds of the longest")


class Schedule(Base):
    """A cron schedule of a queue; each tick spawns its task once across the fleet."""

    __tablename__ = "schedules"
    __table_args__ = (
        PrimaryKeyConstraint("queue_name", "name"),
        CheckConstraint("name ~ '^[A-Za-z0-9_-]+$' AND octet_length(name) <= 200", name="name"),
        CheckConstraint("backend IN ('worker', 'pg_cron')", name="backend"),
        CheckConstraint("misfire IN ('skip', 'run_once', 'run_all')", name="misfire"),
        CheckConstraint("overlap IN ('allow', 'skip')", name="overlap"),
        _readable("next_tick_at"),
        Index("schedules_next_tick_idx", "next_tick_at", postgresql_where=text("paused_at IS NULL")),
    )

    name: Mapped[str]
    queue_name: Mapped[str]
    task_name: Mapped[str]
    cron_expression: Mapped[str]
    timezone: Mapped[str] = mapped_column(server_default="UTC")
    params: Mapped[Any | None] = mapped_column(JSON())
    spawn_options: Mapped[dict[str, Any]] = mapped_column(JSONB(), server_default=text("'{}'"))
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB())
    backend: Mapped[str] = mapped_column(server_default="worker")
    pgcron_job_name: Mapped[str | None]
    misfire: Mapped[str] = mapped_column(server_default="run_once")
    overlap: Mapped[str] = mapped_column(server_default="allow")
    paused_at: Mapped[datetime | None]
    next_tick_at: Mapped[datetime | None] = mapped_column(comment="null: the expression never fires again")
    last_tick_at: Mapped[datetime | None]
    last_task_id: Mapped[uuid.UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=_now)
    updated_at: Mapped[datetime] = mapped_column(server_default=_now)


class WorkerRow(Base):
    """One row per start of a worker. Its lease covers all runs that the worker holds."""

    __tablename__ = "workers"
    __table_args__ = (
        CheckConstraint(
            "array_position(queue_names, NULL) IS NULL AND coalesce(array_ndims(queue_names), 1) = 1",
            name="queue_names",
        ),
        _readable("expires_at"),
    )

    worker_id: Mapped[uuid.UUID] = mapped_column(primary_key=True, comment="drawn anew at every start")
    name: Mapped[str] = mapped_column(comment="a label, host:pid unless given")
    queue_names: Mapped[list[str]]
    claim_timeout: Mapped[timedelta] = mapped_column(comment="how long it may be silent before others take over")
    started_at: Mapped[datetime] = mapped_column(server_default=_now)
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=_now)
    expires_at: Mapped[datetime]
    lost_at: Mapped[datetime | None] = mapped_column(comment="when another worker found it silent")
    long_steps: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSON(), comment="steps that have run for more than a second: task_id, step, arguments, started_at"
    )
    knows_limits: Mapped[bool | None] = mapped_column(comment="null: of a version that claims without regard to limits")


class LimitRow(Base):
    """A limit of a queue, of each of its keys, or of one key; or the weight of one key."""

    __tablename__ = "limits"
    __table_args__ = (CheckConstraint("scope IN ('queue', 'per_key', 'key')", name="scope"),)

    queue_name: Mapped[str] = mapped_column(primary_key=True)
    scope: Mapped[str] = mapped_column(primary_key=True, comment="queue, per_key or key")
    limit_key: Mapped[str] = mapped_column(primary_key=True, server_default="")
    limited: Mapped[bool] = mapped_column(comment="false: the key has a weight of its own, and the limit of each key")
    concurrency: Mapped[int | None] = mapped_column(Integer())
    rate_count: Mapped[int | None] = mapped_column(Integer())
    rate_seconds: Mapped[float | None] = mapped_column(comment="rate_count starts in so many seconds")
    rate_interval: Mapped[timedelta | None] = mapped_column(comment="between starts, rounded up")
    burst: Mapped[int | None] = mapped_column(Integer())
    hold: Mapped[str] = mapped_column(server_default="run", comment="run or task")
    weight: Mapped[int | None] = mapped_column(Integer(), comment="of a key: its share of turns")


class LimitKeyRow(Base):
    """The state of a key of a limited queue: the slots that its tasks hold, its rate, and when it is looked at next.

    Only workers write it, in short transactions: drains add what `limit_arrivals` tells, claims charge what they take.
    """

    __tablename__ = "limit_keys"
    __table_args__ = (
        Index(
            "limit_keys_ready_idx",
            "queue_name",
            "ready_at",
            "limit_key",
            postgresql_where=text("ready_at IS NOT NULL"),
        ),
    )

    queue_name: Mapped[str] = mapped_column(primary_key=True)
    limit_key: Mapped[str] = mapped_column(primary_key=True)
    running: Mapped[int] = mapped_column(Integer(), server_default="0", comment="slots held, before pending arrivals")
    tat: Mapped[datetime | None] = mapped_column(comment="when the rate's bucket is full: the theoretical arrival time")
    closed_until: Mapped[datetime | None]
    ready_at: Mapped[datetime | None] = mapped_column(
        comment="when claims look at it; null: it is full, or has no task"
    )
    version: Mapped[int] = mapped_column(BigInteger(), server_default="0", comment="rises with each drain and claim")
    floor_at: Mapped[datetime | None] = mapped_column(comment="no ready task is available earlier")
    floor_of: Mapped[int | None] = mapped_column(
        BigInteger(), comment="hash of the task names that floor_at is true of"
    )
    served: Mapped[int] = mapped_column(Integer(), server_default="0", comment="tasks claimed in its turn")
    used_at: Mapped[datetime] = mapped_column(server_default=_now)


class LimitTotalRow(Base):
    """The state of a queue with a limit of its own: the slots that its tasks hold, and its rate."""

    __tablename__ = "limit_totals"

    queue_name: Mapped[str] = mapped_column(primary_key=True)
    running: Mapped[int] = mapped_column(Integer(), server_default="0")
    tat: Mapped[datetime | None]


class LimitArrivalRow(Base):
    """News of a key that any transaction may append and workers drain: a task became claimable, a slot was given back.

    A transaction of the application never touches `limit_keys`, where it would hold up all tasks of the key.
    """

    __tablename__ = "limit_arrivals"

    queue_name: Mapped[str] = mapped_column(primary_key=True)
    arrival_id: Mapped[int] = mapped_column(BigInteger(), Identity(always=True), primary_key=True)
    limit_key: Mapped[str]
    available_at: Mapped[datetime | None] = mapped_column(comment="when the task may be claimed")
    slots: Mapped[int] = mapped_column(Integer(), server_default="0", comment="taken; negative: given back")
    closed_until: Mapped[datetime | None] = mapped_column(comment="when a key opens that a task has closed")


class EndedWorker(Base):
    """A worker that has ended or was lost: its label, for the history of the tasks that it ran."""

    __tablename__ = "ended_workers"

    worker_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    ended_at: Mapped[datetime] = mapped_column(server_default=_now)


FILLFACTOR = {"tasks": 40, "limit_keys": 50, "limit_totals": 10}
"""Percentage to which pages are filled: a claimed row grows, and must stay on its page for a heap-only update."""

for _table, _percent in FILLFACTOR.items():
    event.listen(
        metadata.tables[f"{SCHEMA}.{_table}"],
        "after_create",
        DDL(f"ALTER TABLE %(fullname)s SET (fillfactor = {_percent})"),  # type: ignore[no-untyped-call]
    )


@event.listens_for(Queue.__table__, "after_create")
def _create_default_queue(target: Any, connection: Connection, **_: Any) -> None:
    """Create the default queue with the tables, as the migration does."""
    connection.execute(insert(target).values(queue_name=DEFAULT_QUEUE))


Task = TaskRow
"""The name for applications; `durable_sa` exports the class as `TaskRow`, because `Task` is the declaration there."""
Run = RunRow
