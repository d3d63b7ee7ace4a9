"""Tasks say how many workers they may end while they run alone.

Workers of before continue on these tables, and can be restarted. They count lost workers as before and claim a suspect
beside other tasks, so a suspect runs alone for certain once all of them have been replaced.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.sql import quoted_name

from durable_sa.migrations import running

revision = "durable_0003"
down_revision = "durable_0002"
branch_labels = None
depends_on = None
oldest = "durable_0001"


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    # Without a default no row is rewritten, and a task that does not set the option takes no space for it.
    op.add_column(
        "tasks",
        sa.Column(
            "max_lost_workers",
            sa.Integer(),
            comment="workers lost in a row, while it ran alone, at which it is given up; null: 5",
        ),
        schema=quoted_name(schema, quote=None),
    )
    _comment_on_losses(op, schema, "workers lost in a row while running it; from 2 on it runs alone")


def down(op: Operations, schema: str) -> None:
    _comment_on_losses(op, schema, "workers lost in a row while running it")
    op.drop_column("tasks", "max_lost_workers", schema=quoted_name(schema, quote=None))


def _comment_on_losses(op: Operations, schema: str, comment: str) -> None:
    op.alter_column(
        "tasks",
        "lease_losses",
        existing_type=sa.Integer(),
        existing_nullable=False,
        existing_server_default=sa.text("0"),
        comment=comment,
        schema=quoted_name(schema, quote=None),
    )
