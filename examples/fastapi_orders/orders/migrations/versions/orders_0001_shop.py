"""the shop"""

import sqlalchemy as sa
from alembic import op

revision = "orders_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "products",
        sa.Column("sku", sa.String(), nullable=False),
        sa.Column("stock", sa.Integer(), nullable=False),
        sa.CheckConstraint("stock >= 0", name=op.f("products_stock_check")),
        sa.PrimaryKeyConstraint("sku", name=op.f("products_pkey")),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("reference", sa.String(), nullable=False),
        sa.Column("sku", sa.String(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), server_default="new", nullable=False),
        sa.Column("tracking_code", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["sku"], ["products.sku"], name=op.f("orders_sku_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("orders_pkey")),
        sa.UniqueConstraint("reference", name=op.f("orders_reference_key")),
    )


def downgrade() -> None:
    op.drop_table("orders")
    op.drop_table("products")
