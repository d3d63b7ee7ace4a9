"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("ORDERS_DATABASE_URL", "postgresql+asyncpg://localhost/orders")
OPERATOR_PASSWORD = os.environ.get("ORDERS_OPERATOR_PASSWORD")
"""What the dashboard asks for. Without it, no one may see it."""
