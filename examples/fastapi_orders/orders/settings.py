"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("ORDERS_DATABASE_URL", "postgresql+asyncpg://localhost/orders")
OPERATOR_PASSWORD = os.environ.get("ORDERS_OPERATOR_PASSWORD")
"""The password of the dashboard's user. If it is not set, the dashboard refuses every request."""
