"""tasks of orders"""

import sqlalchemy as sa
from alembic import op
from durable_sa import migrations as durable

revision = "orders_0002"
down_revision = "orders_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    durable.upgrade("durable_0009")
    op.add_column("orders", sa.Column("task_id", sa.Uuid(), nullable=True))
    op.create_index(op.f("orders_task_id_idx"), "orders", ["task_id"], unique=False)
    op.create_foreign_key(
        op.f("orders_task_id_fkey"),
        "orders",
        "tasks",
        ["task_id"],
        ["task_id"],
        referent_schema="durable",
        ondelete="SET NULL",
    )


def downgrade() -> None:
    op.drop_constraint(op.f("orders_task_id_fkey"), "orders", type_="foreignkey")
    op.drop_index(op.f("orders_task_id_idx"), table_name="orders")
    op.drop_column("orders", "task_id")
    durable.downgrade("base", since="durable_0009")
