"""Limits, fairness and unique keys: columns of tasks, and the tables of keys.

Workers of the revisions before continue on these tables, as long as no queue has a limit. The new columns are null in
all tasks, and the new indexes of `tasks` empty. They are built concurrently if the table is large, since a build would
hold spawns and claims up while it reads the table.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.sql import quoted_name

from durable_sa.migrations import concurrent, running
from durable_sa.migrations.sql import quoted, verbatim

revision = "durable_0005"
down_revision = "durable_0004"
branch_labels = None
depends_on = None
oldest = "durable_0001"

NOW = sa.text("clock_timestamp()")
TIMESTAMP = sa.DateTime(timezone=True)


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    op.create_table(
        "limits",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False, comment="queue, per_key or key"),
        sa.Column("limit_key", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "limited",
            sa.Boolean(),
            nullable=False,
            comment="false: the key has a weight of its own, and the limit of each key",
        ),
        sa.Column("concurrency", sa.Integer()),
        sa.Column("rate_count", sa.Integer()),
        sa.Column("rate_seconds", sa.Float(precision=53), comment="rate_count starts in so many seconds"),
        sa.Column("rate_interval", sa.Interval(), comment="between starts, rounded up"),
        sa.Column("burst", sa.Integer()),
        sa.Column("hold", sa.Text(), server_default="run", nullable=False, comment="run or task"),
        sa.Column("weight", sa.Integer(), comment="of a key: its share of turns"),
        sa.CheckConstraint("scope IN ('queue', 'per_key', 'key')", name=op.f("limits_scope_check")),
        sa.PrimaryKeyConstraint("queue_name", "scope", "limit_key", name=op.f("limits_pkey")),
        schema=schema,
    )
    op.create_table(
        "limit_keys",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("limit_key", sa.Text(), nullable=False),
        sa.Column(
            "running", sa.Integer(), server_default="0", nullable=False, comment="slots held, before pending arrivals"
        ),
        sa.Column("tat", TIMESTAMP, comment="when the rate's bucket is full: the theoretical arrival time"),
        sa.Column("closed_until", TIMESTAMP),
        sa.Column("ready_at", TIMESTAMP, comment="when claims look at it; null: it is full, or has no task"),
        sa.Column(
            "version", sa.BigInteger(), server_default="0", nullable=False, comment="rises with each drain and claim"
        ),
        sa.Column("floor_at", TIMESTAMP, comment="no ready task is available earlier"),
        sa.Column("floor_of", sa.BigInteger(), comment="hash of the task names that floor_at is true of"),
        sa.Column("served", sa.Integer(), server_default="0", nullable=False, comment="tasks claimed in its turn"),
        sa.Column("used_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("queue_name", "limit_key", name=op.f("limit_keys_pkey")),
        schema=schema,
    )
    op.create_index(
        "limit_keys_ready_idx",
        "limit_keys",
        ["queue_name", "ready_at", "limit_key"],
        schema=schema,
        postgresql_where=sa.text("ready_at IS NOT NULL"),
    )
    op.create_table(
        "limit_totals",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("running", sa.Integer(), server_default="0", nullable=False),
        sa.Column("tat", TIMESTAMP),
        sa.PrimaryKeyConstraint("queue_name", name=op.f("limit_totals_pkey")),
        schema=schema,
    )
    op.create_table(
        "limit_arrivals",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("arrival_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("limit_key", sa.Text(), nullable=False),
        sa.Column("available_at", TIMESTAMP, comment="when the task may be claimed"),
        sa.Column("slots", sa.Integer(), server_default="0", nullable=False, comment="taken; negative: given back"),
        sa.Column("closed_until", TIMESTAMP, comment="when a key opens that a task has closed"),
        sa.PrimaryKeyConstraint("queue_name", "arrival_id", name=op.f("limit_arrivals_pkey")),
        schema=schema,
    )
    op.execute(verbatim(f"ALTER TABLE {quoted(schema)}.limit_keys SET (fillfactor = 50)"))
    op.execute(verbatim(f"ALTER TABLE {quoted(schema)}.limit_totals SET (fillfactor = 10)"))

    # Alembic splits a schema that is no `quoted_name` at its dots.
    named = quoted_name(schema, quote=None)
    queue_columns: list[sa.Column[Any]] = [
        sa.Column("limited_at", TIMESTAMP, comment="set: its tasks are claimed key by key, under limits and in turn"),
        sa.Column(
            "limits_ready_at",
            TIMESTAMP,
            comment="when the tasks that ran at limited_at had been counted; until then none is claimed",
        ),
    ]
    task_columns: list[sa.Column[Any]] = [
        sa.Column("limit_key", sa.Text(), comment="empty: none, in a queue with limits"),
        sa.Column("weight", sa.SmallInteger(), comment="its share of a rate; null: 1"),
        sa.Column("slot", sa.Text(), comment="run or task: it holds a slot until its run ends, or it ends"),
        sa.Column(
            "resumes_at",
            TIMESTAMP,
            comment="available_at of a begun task in a queue with limits: it is claimed before new ones",
        ),
        sa.Column("unique_key", sa.Text(), comment="of one unfinished task of the queue at most"),
    ]
    # In the order in which spawns and claims lock them: another would be a deadlock, which lasts a second.
    for column in task_columns:
        op.add_column("tasks", column, schema=named)
    for column in queue_columns:
        op.add_column("queues", column, schema=named)
    op.add_column(
        "workers",
        sa.Column("knows_limits", sa.Boolean(), comment="null: of a version that claims without regard to limits"),
        schema=named,
    )
    # Last, because they may have to be built after the end of this transaction.
    concurrent.create_indexes(op, schema)


def down(op: Operations, schema: str) -> None:
    concurrent.drop_indexes(op, schema)
    named = quoted_name(schema, quote=None)
    for name in ("limit_key", "weight", "slot", "resumes_at", "unique_key"):
        op.drop_column("tasks", name, schema=named)
    op.drop_column("workers", "knows_limits", schema=named)
    op.drop_column("queues", "limited_at", schema=named)
    op.drop_column("queues", "limits_ready_at", schema=named)
    for table in ("limit_arrivals", "limit_totals", "limit_keys", "limits"):
        op.drop_table(table, schema=schema)
