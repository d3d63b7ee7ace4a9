"""articles and their tasks"""

import sqlalchemy as sa
from alembic import op
from durable_sa import migrations as durable

revision = "reviews_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    durable.upgrade("durable_0009", schema="jobs")
    op.create_table(
        "articles",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("findings", sa.ARRAY(sa.String()), nullable=False),
        sa.Column("reader", sa.String(), nullable=True),
        sa.Column("task_id", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )


def downgrade() -> None:
    op.drop_table("articles")
    durable.downgrade("base", since="durable_0009", schema="jobs")
