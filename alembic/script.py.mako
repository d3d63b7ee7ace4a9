"""${message}"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations
${imports}
from durable_sa.migrations import running

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(**_: object) -> None:
    running.upgrade_branch(revision, since=down_revision)


def downgrade(**_: object) -> None:
    running.downgrade_branch(down_revision, since=revision)


def up(op: Operations, schema: str) -> None:
    ${upgrades.replace("schema='durable'", "schema=schema") if upgrades else "pass"}


def down(op: Operations, schema: str) -> None:
    ${downgrades.replace("schema='durable'", "schema=schema") if downgrades else "pass"}
