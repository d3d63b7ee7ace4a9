"""All tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects.postgresql import JSONB

from durable_sa.migrations import running
from durable_sa.migrations.sql import quoted, verbatim

revision = "durable_0001"
down_revision = None
branch_labels = ("durable",)
depends_on = None

NOW = sa.text("clock_timestamp()")
TIMESTAMP = sa.DateTime(timezone=True)
READABLE = "BETWEEN to_timestamp(-62135510400) AND to_timestamp(253402128000)"


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    queues = op.create_table(
        "queues",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("paused_at", TIMESTAMP, comment="set: nothing is claimed until it is resumed"),
        sa.Column(
            "retention",
            sa.Interval(),
            server_default="30 days",
            comment="age at which finished tasks are deleted; null: never",
        ),
        sa.Column(
            "event_retention",
            sa.Interval(),
            server_default="30 days",
            comment="age at which events are deleted; null: never",
        ),
        sa.CheckConstraint("retention BETWEEN '0' AND '36525 days'", name=op.f("queues_retention_check")),
        sa.CheckConstraint("event_retention BETWEEN '0' AND '36525 days'", name=op.f("queues_event_retention_check")),
        sa.PrimaryKeyConstraint("queue_name", name=op.f("queues_pkey")),
        schema=schema,
    )
    op.bulk_insert(queues, [{"queue_name": "default"}])

    op.create_table(
        "tasks",
        sa.Column("task_id", sa.Uuid(), nullable=False, comment="UUIDv7, drawn by the spawning client"),
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("task_name", sa.Text(), nullable=False),
        sa.Column("params", sa.JSON(), comment="SQL null: the task takes none"),
        sa.Column("headers", JSONB()),
        sa.Column(
            "state",
            sa.Text(),
            server_default="pending",
            nullable=False,
            comment="pending, running, sleeping, completed, failed or cancelled",
        ),
        sa.Column("outcome", sa.Text(), comment="null until the end, then completed, failed or cancelled"),
        sa.Column(
            "priority", sa.SmallInteger(), server_default="0", nullable=False, comment="smaller is claimed first"
        ),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False, comment="attempts begun"),
        sa.Column("run_id", sa.Uuid(), nullable=False, comment="of the attempt that runs, or comes next"),
        sa.Column(
            "failures", sa.Integer(), server_default="0", nullable=False, comment="failures of the task's own code"
        ),
        sa.Column(
            "lease_losses",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="workers lost in a row while running it",
        ),
        sa.Column("max_attempts", sa.Integer(), nullable=False, comment="failures at which it is given up"),
        sa.Column("retry_kind", sa.Text(), nullable=False, comment="none, fixed or exponential"),
        sa.Column("retry_base_delay", sa.Float(precision=53), nullable=False, comment="seconds"),
        sa.Column("retry_factor", sa.Float(precision=53), nullable=False),
        sa.Column("retry_max_backoff", sa.Float(precision=53), nullable=False, comment="seconds"),
        sa.Column("retry_jitter", sa.Float(precision=53), nullable=False, comment="share of the delay, 0 to 1"),
        sa.Column("max_pending_time", sa.Interval(), comment="from available_at to the first start"),
        sa.Column("max_running_time", sa.Interval(), comment="from the first start on"),
        sa.Column("cancel_at", TIMESTAMP, comment="when the limit in force now cancels it"),
        sa.Column("parent_task_id", sa.Uuid()),
        sa.Column("cancelled_by", sa.Uuid(), comment="the ancestor whose end cancelled it"),
        sa.Column(
            "parent_fence",
            sa.BigInteger(),
            comment="the parent's when it was put back by hand: that end of the parent is none of its concern",
        ),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="rises with every change of hands; a run writes only under its own",
        ),
        sa.Column("claimed_by", sa.Uuid(), comment="workers.worker_id that runs it; null: nobody"),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("available_at", TIMESTAMP, comment="when it may be claimed; null: once a wait resolves"),
        sa.Column("first_started_at", TIMESTAMP),
        sa.Column("started_at", TIMESTAMP, comment="start of the current attempt"),
        sa.Column("finished_at", TIMESTAMP),
        sa.Column("output", sa.JSON()),
        sa.Column("error", sa.JSON(), comment="the last failure: name, message, traceback, raw"),
        sa.CheckConstraint(f"available_at {READABLE}", name=op.f("tasks_available_at_check")),
        sa.CheckConstraint(f"cancel_at {READABLE}", name=op.f("tasks_cancel_at_check")),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'sleeping', 'completed', 'failed', 'cancelled')",
            name=op.f("tasks_state_check"),
        ),
        sa.CheckConstraint("(finished_at IS NULL) = (outcome IS NULL)", name=op.f("tasks_finished_check")),
        sa.PrimaryKeyConstraint("task_id", name=op.f("tasks_pkey")),
        schema=schema,
    )
    op.create_index(
        "tasks_cancel_at_idx",
        "tasks",
        ["cancel_at"],
        schema=schema,
        postgresql_where=sa.text("finished_at IS NULL AND cancel_at IS NOT NULL"),
    )
    op.create_index(
        "tasks_claim_idx",
        "tasks",
        ["queue_name", "priority", "available_at", "task_id"],
        schema=schema,
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_index(
        "tasks_finished_idx",
        "tasks",
        ["queue_name", "outcome", "finished_at"],
        schema=schema,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "tasks_idempotency_idx",
        "tasks",
        ["queue_name", "idempotency_key"],
        unique=True,
        schema=schema,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "tasks_parent_idx",
        "tasks",
        ["parent_task_id"],
        schema=schema,
        postgresql_where=sa.text("parent_task_id IS NOT NULL"),
    )
    # A row grows when it is claimed, and has to find room on its page to be a heap-only update.
    op.execute(verbatim(f"ALTER TABLE {quoted(schema)}.tasks SET (fillfactor = 40)"))

    op.create_table(
        "runs",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Uuid()),
        sa.Column("started_at", TIMESTAMP),
        sa.Column("finished_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("error", sa.JSON()),
        sa.PrimaryKeyConstraint("task_id", "attempt", name=op.f("runs_pkey")),
        schema=schema,
    )

    op.create_table(
        "checkpoints",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Uuid(), nullable=False, comment="hash of kind, name, arguments, branch and occurrence"),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="completed", nullable=False),
        sa.Column("value", sa.JSON()),
        sa.Column("child_task_id", sa.Uuid(), comment="the child that was spawned or joined"),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("task_id", "key", name=op.f("checkpoints_pkey")),
        schema=schema,
    )

    op.create_table(
        "events",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("payload", sa.JSON()),
        sa.Column("metadata", JSONB()),
        sa.Column("emitted_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("delivered_at", TIMESTAMP, comment="when workers had handed it to every waiter"),
        sa.CheckConstraint(
            "octet_length(name) BETWEEN 1 AND 200 AND left(name, 1) <> '$'", name=op.f("events_name_check")
        ),
        sa.PrimaryKeyConstraint("queue_name", "name", name=op.f("events_pkey")),
        schema=schema,
    )
    op.create_index("events_emitted_at_idx", "events", ["queue_name", "emitted_at"], schema=schema)
    op.create_index(
        "events_undelivered_idx",
        "events",
        ["emitted_at"],
        schema=schema,
        postgresql_where=sa.text("delivered_at IS NULL"),
    )

    op.create_table(
        "waits",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Uuid(), nullable=False, comment="of the checkpoint that will resolve it"),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("event_name", sa.Text()),
        sa.Column("child_task_id", sa.Uuid()),
        sa.Column("due_at", TIMESTAMP, comment="when it times out"),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.CheckConstraint(f"due_at {READABLE}", name=op.f("waits_due_at_check")),
        sa.PrimaryKeyConstraint("task_id", "key", name=op.f("waits_pkey")),
        schema=schema,
    )
    op.create_index(
        "waits_child_idx",
        "waits",
        ["child_task_id"],
        schema=schema,
        postgresql_where=sa.text("child_task_id IS NOT NULL"),
    )
    op.create_index(
        "waits_event_idx",
        "waits",
        ["queue_name", "event_name"],
        schema=schema,
        postgresql_where=sa.text("event_name IS NOT NULL"),
    )

    op.create_table(
        "schedules",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("task_name", sa.Text(), nullable=False),
        sa.Column("cron_expression", sa.Text(), nullable=False),
        sa.Column("timezone", sa.Text(), server_default="UTC", nullable=False),
        sa.Column("params", sa.JSON()),
        sa.Column("spawn_options", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("metadata", JSONB()),
        sa.Column("backend", sa.Text(), server_default="worker", nullable=False),
        sa.Column("pgcron_job_name", sa.Text()),
        sa.Column("misfire", sa.Text(), server_default="run_once", nullable=False),
        sa.Column("overlap", sa.Text(), server_default="allow", nullable=False),
        sa.Column("paused_at", TIMESTAMP),
        sa.Column("next_tick_at", TIMESTAMP, comment="null: the expression never fires again"),
        sa.Column("last_tick_at", TIMESTAMP),
        sa.Column("last_task_id", sa.Uuid()),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("updated_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.CheckConstraint("backend IN ('worker', 'pg_cron')", name=op.f("schedules_backend_check")),
        sa.CheckConstraint("misfire IN ('skip', 'run_once', 'run_all')", name=op.f("schedules_misfire_check")),
        sa.CheckConstraint(
            "name ~ '^[A-Za-z0-9_-]+$' AND octet_length(name) <= 200", name=op.f("schedules_name_check")
        ),
        sa.CheckConstraint("overlap IN ('allow', 'skip')", name=op.f("schedules_overlap_check")),
        sa.CheckConstraint(f"next_tick_at {READABLE}", name=op.f("schedules_next_tick_at_check")),
        sa.PrimaryKeyConstraint("name", name=op.f("schedules_pkey")),
        schema=schema,
    )
    op.create_index(
        "schedules_next_tick_idx",
        "schedules",
        ["next_tick_at"],
        schema=schema,
        postgresql_where=sa.text("paused_at IS NULL"),
    )

    op.create_table(
        "workers",
        sa.Column("worker_id", sa.Uuid(), nullable=False, comment="drawn anew at every start"),
        sa.Column("name", sa.Text(), nullable=False, comment="a label, host:pid unless given"),
        sa.Column("queue_names", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "claim_timeout", sa.Interval(), nullable=False, comment="how long it may be silent before others take over"
        ),
        sa.Column("started_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("heartbeat_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("expires_at", TIMESTAMP, nullable=False),
        sa.Column("lost_at", TIMESTAMP, comment="when another worker found it silent"),
        sa.CheckConstraint(
            "array_position(queue_names, NULL) IS NULL AND coalesce(array_ndims(queue_names), 1) = 1",
            name=op.f("workers_queue_names_check"),
        ),
        sa.CheckConstraint(f"expires_at {READABLE}", name=op.f("workers_expires_at_check")),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("workers_pkey")),
        schema=schema,
    )


def down(op: Operations, schema: str) -> None:
    for table in ("workers", "schedules", "waits", "events", "checkpoints", "runs", "tasks", "queues"):
        op.drop_table(table, schema=schema)
