"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("REVIEWS_DATABASE_URL", "postgresql+psycopg://localhost/reviews")
DURABLE_SCHEMA = "jobs"
