"""Schedules are known by queue and name, and workers show the steps that run for long.

Workers of durable_0001 continue on these tables, and can be restarted. Their `create_schedule` fails, because it relies
on the primary key of before; whatever else they do with schedules works.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.sql import quoted_name

from durable_sa.errors import InvalidState
from durable_sa.migrations import running

revision = "durable_0002"
down_revision = "durable_0001"
branch_labels = None
depends_on = None
oldest = "durable_0001"


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    _change_key(op, schema, ["queue_name", "name"])
    # Last, because it excludes heartbeats until the end of the transaction. Alembic splits a schema that is no
    # `quoted_name` at its dots.
    op.add_column(
        "workers",
        sa.Column(
            "long_steps", sa.JSON(), comment="steps that have run for more than a second: task_id, step, started_at"
        ),
        schema=quoted_name(schema, quote=None),
    )


def down(op: Operations, schema: str) -> None:
    _refuse_shared_names(op, schema)
    _change_key(op, schema, ["name"])
    op.drop_column("workers", "long_steps", schema=quoted_name(schema, quote=None))


def _change_key(op: Operations, schema: str, columns: list[str]) -> None:
    op.drop_constraint(op.f("schedules_pkey"), "schedules", type_="primary", schema=schema)
    op.create_primary_key(op.f("schedules_pkey"), "schedules", columns, schema=schema)


def _refuse_shared_names(op: Operations, schema: str) -> None:
    if op.get_context().as_sql:
        return
    schedules = sa.table("schedules", sa.column("name"), schema=schema)
    shared = sa.select(schedules.c.name).group_by(schedules.c.name).having(sa.func.count() > 1).limit(1)
    if (name := op.get_bind().scalar(shared)) is not None:
        raise InvalidState(
            f"Schedule {name!r}",
            "defined in more than one queue",
            "Revision durable_0001 knows schedules by name alone. Delete all but one of that name.",
        )
