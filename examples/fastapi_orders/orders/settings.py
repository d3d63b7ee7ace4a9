"""What differs from one deployment to the next."""

import os

DATABASE_URL = os.environ.get("ORDERS_DATABASE_URL", "postgresql+asyncpg://localhost/orders")
