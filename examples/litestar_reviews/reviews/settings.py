"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("REVIEWS_DATABASE_URL", "postgresql+psycopg://localhost/reviews")
DURABLE_SCHEMA = "jobs"
OPERATOR_PASSWORD = os.environ.get("REVIEWS_OPERATOR_PASSWORD")
"""What the dashboard asks for. Without it, no one may see it."""
