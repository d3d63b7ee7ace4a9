"""Messages to tasks, values that tasks publish, and tasks that follow a failure or a cancellation.

Workers of durable_0001 and later continue on these tables, and can be restarted.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.sql import quoted_name

from durable_sa.migrations import running

revision = "durable_0006"
down_revision = "durable_0005"
branch_labels = None
depends_on = None
oldest = "durable_0001"

TIMESTAMP = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")
CHILD = "the child that was spawned or joined"


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    op.create_table(
        "messages",
        sa.Column("task_id", sa.Uuid(), nullable=False, comment="the receiver"),
        sa.Column(
            "message_id", sa.Uuid(), nullable=False, comment="drawn by the sender, or the hash of the idempotency key"
        ),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="the order of receiving"),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("payload", sa.JSON()),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("sent_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column(
            "delivered_at", TIMESTAMP, comment="when workers had found that no stored wait of the task is for it"
        ),
        sa.Column("received_at", TIMESTAMP),
        sa.CheckConstraint(
            "octet_length(topic) BETWEEN 1 AND 200 AND left(topic, 1) <> '$'", name=op.f("messages_topic_check")
        ),
        sa.PrimaryKeyConstraint("task_id", "message_id", name=op.f("messages_pkey")),
        schema=schema,
    )
    op.create_index(
        "messages_topic_idx",
        "messages",
        ["task_id", "topic", "seq"],
        schema=schema,
        postgresql_where=sa.text("received_at IS NULL"),
    )
    op.create_index(
        "messages_undelivered_idx",
        "messages",
        ["sent_at"],
        schema=schema,
        postgresql_where=sa.text("delivered_at IS NULL"),
    )
    op.create_table(
        "task_values",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.JSON()),
        sa.Column(
            "version",
            sa.BigInteger(),
            server_default="1",
            nullable=False,
            comment="rises whenever the value is written",
        ),
        sa.Column("updated_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.CheckConstraint(
            "octet_length(name) BETWEEN 1 AND 200 AND left(name, 1) <> '$'", name=op.f("task_values_name_check")
        ),
        sa.PrimaryKeyConstraint("task_id", "name", name=op.f("task_values_pkey")),
        schema=schema,
    )
    _comment(op, schema, f"{CHILD}, or the message that was received", CHILD)
    # Last, because it excludes all others from the tasks until the end of the transaction. Alembic splits a schema that
    # is no `quoted_name` at its dots.
    op.add_column(
        "tasks",
        sa.Column("follow_ups", sa.JSON(), comment="by outcome (failed, cancelled) the task that is spawned then"),
        schema=quoted_name(schema, quote=None),
    )


def down(op: Operations, schema: str) -> None:
    op.drop_column("tasks", "follow_ups", schema=quoted_name(schema, quote=None))
    op.drop_table("task_values", schema=schema)
    op.drop_table("messages", schema=schema)
    _comment(op, schema, CHILD, f"{CHILD}, or the message that was received")


def _comment(op: Operations, schema: str, comment: str, former: str) -> None:
    op.alter_column(
        "checkpoints",
        "child_task_id",
        existing_type=sa.Uuid(),
        comment=comment,
        existing_comment=former,
        schema=quoted_name(schema, quote=None),
    )
