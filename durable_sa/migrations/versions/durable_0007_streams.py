"""Streams of tasks.

Workers of durable_0001 and later continue beside these tables, and can be restarted.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from durable_sa.migrations import running

revision = "durable_0007"
down_revision = "durable_0006"
branch_labels = None
depends_on = None
oldest = "durable_0001"

TIMESTAMP = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    op.create_table(
        "streams",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("block_id", sa.Uuid(), comment="the block that is open; null: none is"),
        sa.Column(
            "step_key",
            sa.Uuid(),
            nullable=False,
            comment="of the step of the last block, or of the block in the task's body",
        ),
        sa.Column("try_id", sa.Uuid(), nullable=False, comment="the try of that step"),
        sa.Column(
            "began_after",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="the last position when that step began to write",
        ),
        sa.Column(
            "last_position",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="of the last item, while no block is open",
        ),
        sa.Column(
            "reserved",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="positions up to this may have been seen by readers",
        ),
        sa.Column(
            "restarts_after", sa.ARRAY(sa.BigInteger()), comment="of each restart, the last position that still counts"
        ),
        sa.Column(
            "restarts_through",
            sa.ARRAY(sa.BigInteger()),
            comment="of each restart, the last position that is superseded",
        ),
        sa.Column("closed_at", TIMESTAMP, comment="set: readers come to the end"),
        sa.Column("opened_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.CheckConstraint("octet_length(name) BETWEEN 1 AND 200", name=op.f("streams_name_check")),
        sa.PrimaryKeyConstraint("task_id", "name", name=op.f("streams_pkey")),
        schema=schema,
    )
    op.create_table(
        "stream_items",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False, comment="of the last of the items"),
        sa.Column("step_key", sa.Uuid(), nullable=False),
        sa.Column("try_id", sa.Uuid(), nullable=False),
        sa.Column("items", sa.JSON(), nullable=False, comment="an array"),
        sa.Column("written_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("task_id", "name", "position", name=op.f("stream_items_pkey")),
        schema=schema,
    )


def down(op: Operations, schema: str) -> None:
    op.drop_table("stream_items", schema=schema)
    op.drop_table("streams", schema=schema)
