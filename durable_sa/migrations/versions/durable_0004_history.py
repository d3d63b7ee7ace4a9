"""Checkpoints know how long they took, and the labels of workers outlive them.

Workers of earlier revisions continue on these tables. Their checkpoints have no duration, and their labels are lost
when they end, as before.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.sql import quoted_name

from durable_sa.migrations import running

revision = "durable_0004"
down_revision = "durable_0003"
branch_labels = None
depends_on = None
oldest = "durable_0001"


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    # Alembic splits a schema that is no `quoted_name` at its dots.
    name = quoted_name(schema, quote=None)
    op.create_table(
        "ended_workers",
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("ended_workers_pkey")),
        schema=name,
    )
    # Last, because it excludes all writes of workers until the end of the transaction. No row is rewritten.
    op.add_column(
        "checkpoints",
        sa.Column("duration", sa.REAL(), comment="seconds that a step, a try or a wait took"),
        schema=name,
    )


def down(op: Operations, schema: str) -> None:
    name = quoted_name(schema, quote=None)
    op.drop_table("ended_workers", schema=name)
    op.drop_column("checkpoints", "duration", schema=name)
