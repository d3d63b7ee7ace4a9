"""The tasks that ended per minute.

Workers of durable_0001 and later continue beside this table, and can be restarted.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from durable_sa.migrations import running

revision = "durable_0008"
down_revision = "durable_0007"
branch_labels = None
depends_on = None
oldest = "durable_0001"

TIMESTAMP = sa.DateTime(timezone=True)


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    op.create_table(
        "task_minutes",
        sa.Column("queue_name", sa.Text(), nullable=False),
        sa.Column("minute", TIMESTAMP, nullable=False, comment="its beginning"),
        sa.Column("task_name", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        _number("completed"),
        _number("failed", "for good"),
        _number("cancelled"),
        _number("milliseconds", "from the claims of the last runs to their ends, in total"),
        _number("slowest", "milliseconds of the longest"),
        sa.PrimaryKeyConstraint("queue_name", "minute", "task_name", "worker_id", name=op.f("task_minutes_pkey")),
        schema=schema,
    )


def down(op: Operations, schema: str) -> None:
    op.drop_table("task_minutes", schema=schema)


def _number(name: str, comment: str | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default="0", nullable=False, comment=comment)
