"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("ORDERS_DATABASE_URL", "postgresql+asyncpg://localhost/orders")
