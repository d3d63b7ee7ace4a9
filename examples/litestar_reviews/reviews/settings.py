"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("REVIEWS_DATABASE_URL", "postgresql+psycopg://localhost/reviews")
DURABLE_SCHEMA = "jobs"
OPERATOR_PASSWORD = os.environ.get("REVIEWS_OPERATOR_PASSWORD")
"""The password of the dashboard's user. If it is not set, the dashboard refuses every request."""
