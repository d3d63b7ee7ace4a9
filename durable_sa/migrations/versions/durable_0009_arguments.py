"""Checkpoints know the arguments of their steps.

Workers of durable_0001 and later continue on these tables. Their checkpoints have no arguments.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.sql import quoted_name

from durable_sa.migrations import running

revision = "durable_0009"
down_revision = "durable_0008"
branch_labels = None
depends_on = None
oldest = "durable_0001"


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    _describe_long_steps(op, schema, "task_id, step, arguments, started_at")
    # Last, because it excludes all writes of workers until the end of the transaction. No row is rewritten.
    op.add_column(
        "checkpoints",
        sa.Column("arguments", sa.Text(), comment="the beginning of those of a step or transaction, as JSON"),
        # Alembic splits a schema that is no `quoted_name` at its dots.
        schema=quoted_name(schema, quote=None),
    )


def down(op: Operations, schema: str) -> None:
    op.drop_column("checkpoints", "arguments", schema=quoted_name(schema, quote=None))
    _describe_long_steps(op, schema, "task_id, step, started_at")


def _describe_long_steps(op: Operations, schema: str, fields: str) -> None:
    op.alter_column(
        "workers",
        "long_steps",
        existing_type=sa.JSON(),
        comment=f"steps that have run for more than a second: {fields}",
        schema=quoted_name(schema, quote=None),
    )
