"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("BILLING_DATABASE_URL", "postgresql+psycopg://localhost/billing")
TRIAL_DAYS = float(os.environ.get("BILLING_TRIAL_DAYS", "14"))
OPERATOR_PASSWORD = os.environ.get("BILLING_OPERATOR_PASSWORD")
"""The password of the dashboard's user. If it is not set, the dashboard refuses every request."""
